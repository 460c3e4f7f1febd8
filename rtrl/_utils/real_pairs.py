"""Complex tensors as pairs of real numbers. Derivatives are taken by the pairs, so that nothing has to be holomorphic.

The gradient of a real number by ``a + i b`` is ``∂/∂a + i ∂/∂b``, as PyTorch's own: its pairs are the derivatives by
the pairs.
"""

from collections.abc import ItemsView, Iterator, Mapping

import torch
from torch import Tensor


def is_continuous(value: Tensor) -> bool:
    """Whether a tensor holds numbers that can be differentiated by: real or complex ones."""
    return value.is_floating_point() or value.is_complex()


def as_real(value: Tensor) -> Tensor:
    """Return a complex tensor (...) as its pairs (..., 2), in the same memory where possible; a real one itself."""
    return torch.view_as_real(value.resolve_conj()) if value.is_complex() else value


def paired(value: Tensor) -> Tensor:
    """Return a copy of a complex tensor as pairs; unlike for ``as_real``, gradients of any strides flow back."""
    value = value.resolve_conj()  # the imaginary part of a lazy conjugate has no rule for batches
    return torch.stack([value.real, value.imag], dim=-1)


def as_like(value: Tensor, like: Tensor) -> Tensor:
    """Return real numbers in the shape of ``like``, its pairs if it is complex."""
    return unpaired(value.reshape(*like.shape, 2), like) if like.is_complex() else value.reshape(like.shape)


def unpaired(value: Tensor, like: Tensor) -> Tensor:
    """Return pairs (..., 2) as complex numbers (...) if ``like`` is complex; else the value itself."""
    return torch.complex(value[..., 0], value[..., 1]) if like.is_complex() else value


def real_numbers(value: Tensor) -> int:
    """Return the number of real numbers in a tensor."""
    return value.numel() * (2 if value.is_complex() else 1)


class RealForms(Mapping[str, Tensor]):
    """Parameters by name, each complex one as its pairs without a graph.

    Args:
        parameters: name → parameter; may change.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        return as_real(parameter.detach()) if parameter.is_complex() else parameter

    def items(self) -> ItemsView[str, Tensor]:
        """Return the names and forms; where none is complex, at the price of a dict's."""
        if any(parameter.is_complex() for parameter in self._parameters.values()):
            return super().items()
        return self._parameters.items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)
