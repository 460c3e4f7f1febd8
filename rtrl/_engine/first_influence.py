"""Learned first states: the influence ``∂h₀/∂θ`` of the parameters that a cell's first state depends on."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.parameter_hooks import hooks_suspended
from rtrl._engine.untapped import jacobian_rows
from rtrl._utils.real_pairs import as_real, real_numbers
from rtrl.errors import ConfigError, NonFiniteError


def check_constant(state: Any) -> None:
    """Refuse a first state that a user passes and that requires grad: no gradient would reach it.

    Raises:
        ConfigError: it does.
    """
    if isinstance(state, Tensor) and state.requires_grad:
        raise ConfigError(
            "the state passed requires grad, but no gradient reaches it; pass state.detach(), or make it a parameter "
            "of the cell that init_state(batch_size) returns"
        )


def first_influence(
    first: Tensor, parameters: Mapping[str, nn.Parameter], samples: Tensor | None = None
) -> dict[str, Tensor]:
    """Return name → ``∂h₀/∂θ`` (B, H, p), of each parameter that a first state depends on.

    Args:
        first: (B, n, ...), with its graph.
        parameters: the trainable parameters by name.
        samples: Boolean (B,), the samples that take this state; the others get zeros. None for all.

    Raises:
        ConfigError: it depends on a tensor that requires grad and is not one of these parameters.
        NonFiniteError: NaN or infinity in a Jacobian.

    Cost: nothing for a constant; else H backward passes through ``init_state`` in one batch, for each sample that takes
        the state, or once for all where it is one state expanded.
    """
    if not first.requires_grad:
        return {}
    reached = checks.reached_leaves(first)
    found = {name: parameter for name, parameter in parameters.items() if id(parameter) in reached}
    if others := reached.keys() - set(map(id, found.values())):
        shape = tuple(reached[min(others)].shape)
        raise ConfigError(
            f"init_state returns a state that depends on a tensor {shape} that requires grad and is not a trainable "
            "parameter of the cell; register it as a parameter of the cell, or detach it"
        )
    taken = list(range(len(first))) if samples is None else samples.nonzero().flatten().tolist()
    expanded = first.stride(0) == 0
    jacobians = {name: first.new_zeros(len(first), first[0].numel(), real_numbers(p)) for name, p in found.items()}
    rows: list[Tensor] = []
    for sample in taken:
        if not (expanded and rows):
            with hooks_suspended(found.values()):
                rows = jacobian_rows(first[sample].reshape(1, -1), list(found.values()))
        for jacobian, of_sample in zip(jacobians.values(), rows, strict=True):
            jacobian[sample] = as_real(of_sample).flatten(1)
    for name, jacobian in jacobians.items():
        if not checks.finite(jacobian):
            raise NonFiniteError(f"NaN or infinity in the derivative of the first state by parameter {name!r}")
    return jacobians


def replace_samples(held: Mapping[str, Tensor], new: Mapping[str, Tensor], samples: Tensor) -> dict[str, Tensor]:
    """Return ``held`` by name, with these samples, Boolean (B,), taken from ``new``; a missing name means zeros."""
    kept = {name: value.masked_fill(samples[:, None, None], 0.0) for name, value in held.items()}
    return kept | {name: kept[name] + value if name in kept else value for name, value in new.items()}
