"""Calling a module with other values of its parameters, and leaving it as it was."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(module: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any = None) -> Any:
    """``torch.func.functional_call`` for any sharing: tensors shared by several modules, and modules held under several
    names.

    Each tensor is replaced once in each module that owns it, whatever it is called. By default PyTorch replaces it once
    a name, and then a module with two names keeps the replacement.

    Args:
        module: whose parameters and buffers. values: by name, one name a tensor being enough; other names are ignored.
    """
    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    new = {id(held[name]): value for name, value in values.items() if name in held}
    everywhere = {
        f"{prefix}.{name}" if prefix else name: new[id(tensor)]
        for prefix, owner in module.named_modules()  # each once
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]
        if id(tensor) in new
    }
    return torch.func.functional_call(module, everywhere, args, kwargs, tie_weights=False)
