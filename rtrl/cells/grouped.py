"""The grouped product: each sample uses only the slices of a stacked weight that it selected."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from rtrl.errors import ShapeError


def grouped_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Tensor:
    """Apply the selected slices of a stacked linear map, per sample.

    Equation: ``out[b, k, l] = weight[index[b, k]] @ inputs[b, k, l] + bias[index[b, k]]``.

    Args:
        inputs: (B, K or 1, L, I); a dimension of 1 shares the inputs between all K selected slices.
        weight: (E, O, I).
        bias: (E, O) or None.
        index: LongTensor (B, K).

    Returns:
        (B, K, L, O).

    Raises:
        ShapeError: the shapes do not fit.

    Cost: B·K·L·O·I multiply-adds; B·K·O·I numbers gathered.

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
