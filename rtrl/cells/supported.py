"""Which modules a learner can take at all, decided when it is made; and what stands between a module and its class."""

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from rtrl.errors import ConfigError


def original(cell: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped; any other module itself."""
    while "_orig_mod" in cell._modules:
        cell = cell.get_submodule("_orig_mod")
    return cell


def runs_as_written(module: nn.Module) -> bool:
    """Whether calling a module does what its class says: it has no hooks, and no ``forward`` of its own."""
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _global_forward_pre_hooks
        or _global_forward_hooks
        or "forward" in module.__dict__
    )


def check_supported(cell: nn.Module) -> None:
    """Refuse a module whose steps cannot be linearised exactly.

    Raises:
        ConfigError: it is a bare recurrent module of PyTorch, has a scripted part, a parameter without a shape, or
            an embedding whose gradient is sparse or depends on other samples.
    """
    kind = type(cell)
    if isinstance(cell, (nn.RNNCellBase, nn.RNNBase)) and kind.forward.__module__.startswith("torch."):
        raise ConfigError(
            f"a bare nn.{kind.__name__} returns no pair (y, next state); wrap it by rtrl.cells.from_torch(cell)"
        )
    for name, module in cell.named_modules():
        where = f"{type(module).__name__} {name!r}" if name else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"{where} is a scripted module, and how it uses its parameters cannot be seen; give the module as it "
                "was before torch.jit.script or torch.jit.trace"
            )
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.weight.requires_grad:
            if module.sparse:
                raise ConfigError(f"{where} has sparse=True, but learners deliver dense gradients; set sparse=False")
            if module.scale_grad_by_freq:
                raise ConfigError(
                    f"{where} has scale_grad_by_freq=True, so that the gradient of one sample depends on the others; "
                    "set it to False"
                )
    for name, parameter in cell.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ConfigError(f"parameter {name!r} has no shape yet: run the cell once first, on an x and a state")
