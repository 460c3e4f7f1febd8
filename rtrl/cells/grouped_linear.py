"""The grouped linear map: each sample uses only the slices of a stacked weight that it selects."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from rtrl.errors import ShapeError


def grouped_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Apply the selected slices of a stacked linear map, per sample.

    Equation:
        ``out[b, k, l] = weight[index[b, k]] @ inputs[b, k, l] + bias[index[b, k]]``.

    Args:
        inputs: (B, K or 1, L, I); a dimension of 1 shares the inputs between all K selected slices.
        weight: (E, O, I).
        bias: (E, O) or None.
        index: LongTensor (B, K), the slices that each sample selects.

    Returns:
        The outputs (B, K, L, O).

    Raises:
        ShapeError: the shapes do not fit; the message lists those expected.

    Cost:
        B·K·L·O·I multiply-adds; B·K·O·I numbers gathered.

    Example:
        >>> import torch
        >>> grouped_linear(torch.ones(2, 1, 3, 4), torch.ones(5, 6, 4), None, torch.tensor([[0], [4]])).shape
        torch.Size([2, 1, 3, 6])
    """
    arguments = (inputs, weight) if bias is None else (inputs, weight, bias)
    if has_torch_function(arguments):
        return handle_torch_function(grouped_linear, arguments, inputs, weight, bias, index)
    if inputs.ndim != 4 or weight.ndim != 3 or index.ndim != 2 or inputs.shape[1] not in (1, index.shape[1]):
        raise ShapeError(
            "grouped_linear expects inputs (B, K or 1, L, I), weight (E, O, I), index (B, K), got "
            f"{tuple(inputs.shape)}, {tuple(weight.shape)}, {tuple(index.shape)}"
        )
    out = torch.matmul(inputs, weight[index].transpose(-1, -2))
    return out if bias is None else out + bias[index].unsqueeze(2)


def frozen_grouped_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Apply ``grouped_linear`` with a gradient for the inputs alone, whose backward pass is batched at no extra cost.

    Under ``vmap``, PyTorch would copy the selected slices once for each of the batched cotangents; here all cotangents
    share one product.
    """
    out: Tensor = _Product.apply(inputs, weight.detach()[index])  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias.detach()[index].unsqueeze(2)


class _Product(torch.autograd.Function):
    """``inputs @ chosenᵀ`` for inputs (B, K or 1, L, I) and constant chosen (B, K, O, I)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(inputs: Tensor, chosen: Tensor) -> Tensor:
        return torch.matmul(inputs, chosen.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.shared = inputs[0].shape[1] == 1 and inputs[1].shape[1] > 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        back: Tensor = _Back.apply(gradient, chosen)  # type: ignore[no-untyped-call]
        return (back.sum(dim=1, keepdim=True) if ctx.shared else back), None


class _Back(torch.autograd.Function):
    """``gradient @ chosen`` for gradients (B, K, L, O) and constant chosen (B, K, O, I)."""

    @staticmethod
    def forward(gradient: Tensor, chosen: Tensor) -> Tensor:
        return torch.matmul(gradient, chosen)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (chosen,) = ctx.saved_tensors
        back: Tensor = _Product.apply(gradient, chosen)  # type: ignore[no-untyped-call]
        return back, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], gradient: Tensor, chosen: Tensor) -> tuple[Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None:  # the engine does not batch like this
            gradient, chosen = (
                t.unsqueeze(0).expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim in zip((gradient, chosen), in_dims, strict=True)
            )
            return torch.matmul(gradient, chosen), 0
        lined = gradient.movedim(in_dims[0], 2)  # (B, K, V, L, O)
        back = torch.matmul(lined.flatten(2, 3), chosen)
        return back.unflatten(2, lined.shape[2:4]), 2
