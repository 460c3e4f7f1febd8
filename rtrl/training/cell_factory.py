"""Cells by name, or from a user's module, as wide as a task needs them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from rtrl._utils import named_factories, validation
from rtrl._utils.import_target import load
from rtrl.cells import LRU, RTU, ElementwiseLSTM, MinGRU, RecurrentMoE, Stack, from_torch
from rtrl.errors import ConfigError

MakeCell = Callable[[int, int], nn.Module]


def _moe(
    *,
    d_model: int = 32,
    n_slots: int = 8,
    n_experts: int = 16,
    topk: int = 2,
    n_heads: int = 2,
    read_slots: int = 2,
    write_slots: int = 2,
    expert_hidden: int | None = None,
    ffn_hidden: int | None = None,
) -> MakeCell:
    sizes = (d_model, n_slots, n_experts, topk, n_heads, read_slots, write_slots, expert_hidden, ffn_hidden)
    return lambda d_in, d_out: RecurrentMoE(d_in, d_out, *sizes)


def _of_torch(kind: type[nn.RNNCell] | type[nn.GRUCell] | type[nn.LSTMCell]) -> Callable[..., MakeCell]:
    def maker(*, hidden: int = 32, layers: int = 1) -> MakeCell:
        validation.integer("hidden", hidden)
        validation.integer("layers", layers)

        def make(d_in: int, d_out: int) -> nn.Module:
            cells = [kind(d_in if layer == 0 else hidden, hidden) for layer in range(layers)]
            return from_torch(cells[0] if layers == 1 else cells, nn.Linear(hidden, d_out))

        return make

    return maker


def _with_rows(kind: Callable[[int, int], nn.Module], outputs: int = 1) -> Callable[..., MakeCell]:
    """Layers of a cell with independent rows, which has ``outputs`` numbers of y per unit, and a linear readout."""

    def maker(*, hidden: int = 32, layers: int = 1) -> MakeCell:
        validation.integer("hidden", hidden)
        validation.integer("layers", layers)

        def make(d_in: int, d_out: int) -> nn.Module:
            cells = [kind(d_in if layer == 0 else outputs * hidden, hidden) for layer in range(layers)]
            return Stack([*cells, nn.Linear(outputs * hidden, d_out)])

        return make

    return maker


def _lru(d_in: int, hidden: int) -> nn.Module:
    return LRU(d_in, hidden, hidden)


CELLS: Mapping[str, Callable[..., MakeCell]] = {
    "moe": _moe,
    "rnn": _of_torch(nn.RNNCell),
    "gru": _of_torch(nn.GRUCell),
    "lstm": _of_torch(nn.LSTMCell),
    "mingru": _with_rows(MinGRU),
    "elstm": _with_rows(ElementwiseLSTM),
    "lru": _with_rows(_lru),
    "rtu": _with_rows(RTU, outputs=2),
}
"""Name → a function of that cell's options that returns ``make(d_in, d_out)``."""


def make_cell(
    name: str,
    d_in: int,
    d_out: int,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> nn.Module:
    """Make the cell of this name for x of width ``d_in`` and y of width ``d_out``.

    ``moe`` is ``rtrl.RecurrentMoE``, whose sizes are its options; ``rnn``, ``gru`` and ``lstm`` (hidden=32, layers=1)
    are PyTorch's with a linear readout; ``mingru``, ``elstm``, ``lru`` and ``rtu`` (hidden=32, layers=1) are those of
    ``rtrl.cells`` with independent rows, in a ``Stack`` that ends in a linear map; ``package.module:name`` is a user's
    cell: a module, or a function or class that is called as ``name(d_in, d_out, **options)``, or as
    ``name(**options)`` if it takes no widths.

    Args:
        name: one of ``CELLS``, or ``package.module:name``.
        d_in: the width of x.
        d_out: the width of y.
        seed: of the first weights, which are drawn on the CPU; PyTorch's global random numbers stay as they are.
        dtype: of the parameters; by default as the cell makes them.
        device: where the cell is moved; on "meta" it is made without memory, to look at its shapes.
        **options: the cell's sizes.

    Raises:
        ConfigError: the cell or an option does not exist, a size is out of range, or a user's cell cannot be made.

    >>> make_cell("gru", 3, 2, hidden=8).init_state(5).shape
    torch.Size([5, 8])
    """
    without_memory = device is not None and torch.device(device).type == "meta"
    with torch.random.fork_rng(devices=[]), torch.device("meta" if without_memory else "cpu"):
        torch.manual_seed(seed)
        if ":" in name:
            cell = _module(_called(name, (d_in, d_out), options), name, "a torch.nn.Module")
        elif name in CELLS:
            make: MakeCell = named_factories.make_named("cell", name, CELLS, options)
            cell = make(d_in, d_out)
        else:
            raise ConfigError(
                f"there is no cell {name!r}; there are: {', '.join(CELLS)}, and package.module:name for one of your own"
            )
    return cell.to(device=device, dtype=dtype)


def load_cell(target: str) -> tuple[nn.Module, list[Any] | None]:
    """Load the cell that ``package.module:name`` stands for, and the inputs of some steps if it gives any.

    Args:
        target: a module, a function without arguments that returns one, or one that returns a pair (cell, inputs).

    Raises:
        ConfigError: the target is not any of these.
    """
    found, inputs = _called(target, (), {}), None
    if isinstance(found, tuple) and len(found) == 2:
        found, inputs = found[0], list(found[1])
    return _module(found, target, "a cell, or a pair (cell, inputs)"), inputs


def _called(target: str, widths: tuple[int, ...], options: Mapping[str, Any]) -> Any:
    """What a target gives: itself if it is a module, else what it returns, called with the widths if it takes them."""
    found = load(target)
    if isinstance(found, nn.Module) or not callable(found):
        if options:
            raise ConfigError(f"{target} is a cell that was made already; it takes no options")
        return found
    try:
        signature: inspect.Signature | None = inspect.signature(found)
    except (TypeError, ValueError):
        signature = None  # it does not say; then as one that takes widths
    if signature is not None and not _binds(signature, widths, options):
        widths = ()
    try:
        return found(*widths, **options)
    except Exception as error:
        arguments = ", ".join([*map(str, widths), *(f"{k}={v!r}" for k, v in options.items())])
        raise ConfigError(f"{target}({arguments}) raised {type(error).__name__}: {error}") from error


def _module(found: Any, target: str, expected: str) -> nn.Module:
    if not isinstance(found, nn.Module):
        raise ConfigError(f"{target} must give {expected}, got {type(found).__name__}")
    return found


def _binds(signature: inspect.Signature, widths: tuple[int, ...], options: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*widths, **options)
    except TypeError:
        return False
    return True
