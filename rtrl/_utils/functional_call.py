"""Call a module with other values of its parameters, without changing it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rtrl._utils.undo import undone


class Substitution(TorchFunctionMode):
    """While it is entered, every function of PyTorch that is given one of some tensors gets its value in its place.

    So each use is reached, by any name, list, dict or closure that holds the tensor. Code that PyTorch does not
    dispatch from Python is not: a scripted module, or the ``apply`` of an ``autograd.Function``, whose forward pass
    gets the values while its derivative goes to the tensor itself.

    Args:
        values: id of a tensor → its value.
    """

    def __init__(self, values: Mapping[int, Tensor]) -> None:
        super().__init__()
        self._values = values

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = [self._replaced(value) for value in args]
        return func(*args, **{name: self._replaced(value) for name, value in (kwargs or {}).items()})

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._values.get(id(value), value)
        if type(value) in (list, tuple):
            return type(value)(map(self._replaced, value))
        if type(value) is dict:
            return {name: self._replaced(part) for name, part in value.items()}
        return value


def functional_call(module: nn.Module, values: Mapping[str, Tensor], args: Any, kwargs: Any = None) -> Any:
    """Call a module with other values of its parameters and buffers; see ``Substitution`` for what that reaches.

    Tensors that the module stores under its own attributes meanwhile, such as a weight that a hook computes, are put
    back.

    Args:
        module: whose parameters and buffers are replaced.
        values: by name; one name per tensor is enough, and other names are ignored.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    new = {id(tensors[name]): value for name, value in values.items() if name in tensors}
    with attributes_kept(module), Substitution(new):
        return module(*args, **(kwargs or {}))


class NotSubstitutedError(RuntimeError):
    """A tensor was used itself, and not the value in its place."""


def check_substituted(result: Tensor) -> None:
    """Check a result inside ``torch.func``, computed from values that require no grad outside it, with grad enabled.

    Raises:
        NotSubstitutedError: it depends on a tensor that does, so that this one was not substituted.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(result):
        result = torch._C._functorch.get_unwrapped(result)
    if result.requires_grad:
        raise NotSubstitutedError("a parameter is used by code that PyTorch does not dispatch from Python")


@contextmanager
def attributes_kept(module: nn.Module, *, registered: bool = True) -> Iterator[None]:
    """Put back every attribute of a module or its parts in whose place a tensor has come or gone.

    Args:
        module: the module.
        registered: its parameters and buffers, too.
    """
    tables = [table for part in module.modules() for table in (part.__dict__, part._parameters, part._buffers)]
    before = [(table, dict(table)) for table in (tables if registered else tables[::3])]

    def put_back() -> None:
        for table, kept in before:
            for name in [name for name, value in table.items() if isinstance(value, Tensor) and name not in kept]:
                del table[name]
            for name, value in kept.items():
                now = table.get(name)
                if now is not value and (isinstance(now, Tensor) or isinstance(value, Tensor)):
                    table[name] = value

    with undone(put_back):
        yield


def attributes(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a module or its parts hold as a plain attribute, by its full name."""
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, part in module.named_modules()
        for name, value in part.__dict__.items()
        if isinstance(value, Tensor)
    }
