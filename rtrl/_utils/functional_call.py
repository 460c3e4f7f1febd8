"""Call a module with other values of its parameters, without changing it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def functional_call(module: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any = None) -> Any:
    """Call ``torch.func.functional_call`` for any sharing: tensors of several modules, modules under several names.

    Each tensor is replaced once in each module that owns it. By default PyTorch replaces it once per name, and then a
    module with two names keeps the replacement.

    Args:
        module: whose parameters and buffers are replaced.
        values: by name; one name per tensor is enough, and other names are ignored.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    new = {id(tensors[name]): value for name, value in values.items() if name in tensors}
    everywhere = {
        f"{prefix}.{name}" if prefix else name: new[id(tensor)]
        for prefix, owner in module.named_modules()  # each once
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]
        if id(tensor) in new
    }
    return torch.func.functional_call(module, everywhere, args, kwargs, tie_weights=False)
