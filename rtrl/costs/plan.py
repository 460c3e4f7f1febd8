"""``rtrl.plan``: what each way to learn costs, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from rtrl._utils import pytrees, validation
from rtrl.costs.block_rtrl import block_rtrl
from rtrl.costs.devices import nominal_rates
from rtrl.costs.others import bptt, dense_rtrl, tbptt
from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice, Plan
from rtrl.errors import ConfigError
from rtrl.profiling.macs import Rule

WINDOWS = (16, 64)
HORIZONS = (16, 64, 256)
MOST_CROSSOVER = 2**50  # steps: a run that is longer has no end


def plan(
    cell: nn.Module,
    x: Any = None,
    *,
    steps: int,
    batch_size: int | None = None,
    memory_bytes: int | None = None,
    xs: Sequence[Any] | None = None,
    state: Tensor | None = None,
    blocks: Sequence[int] | None = None,
    windows: Sequence[int] | None = None,
    horizons: Sequence[int] | None = None,
    devices: Mapping[str, float] | None = None,
    rules: Mapping[str, Rule] | None = None,
) -> Plan:
    """Predict what each learning method costs on a cell, and name the cheapest exact one that fits a memory budget.

    The methods are full RTRL, BPTT, truncated BPTT, and ``BlockRTRL`` for several blocks and windows. Of a run of T
    steps with a loss at each of them and one ``sync`` at the end, it predicts what ``MacCounter`` counts, what
    ``retained_bytes`` gives at most, and how much memory is needed at once. The learners themselves are run for some
    steps, on a copy of the cell and on tensors without numbers (``rtrl.profiling.dry_run``), and what they take is
    extrapolated. The cell, its ``.grad`` and PyTorch's random numbers stay as they are.

    Args:
        cell: as for ``rtrl.BlockRTRL``.
        x: an example input of one step, a tensor (B, ...) or a tree of such. By default random numbers are drawn, if
            the cell or a module in it says how wide its x is (``d_in``, ``input_size``, ``in_features`` or an
            embedding).
        steps: T, of the run.
        batch_size: B; that of x, or 1, by default. Samples of x are repeated or cut to it.
        memory_bytes: the budget of what is needed at once, besides the cell, its ``.grad``, its optimizer, and what the
            user holds.
        xs: in place of x, the inputs of several steps in a row. For a cell that routes they say how long its slices
            are dormant; with x alone, choices are taken to be drawn evenly at random.
        state: the first state (B, n, ...); ``cell.init_state(B)`` by default.
        blocks: those of ``BlockRTRL``; powers of two and H by default.
        windows: those of ``BlockRTRL``; 16 and 64 by default. A cell without slices needs no window.
        horizons: those of truncated BPTT; 16, 64 and 256 by default.
        devices: device → multiply-adds per second, ``rtrl.costs.measured_rates()`` for instance; a few data sheets by
            default.
        rules: how to count operations that ``MacCounter`` does not know, as it takes them.

    Returns:
        A ``Plan``: ``best``, ``crossover_steps`` (T*), one ``Choice`` for each row; printed, it is a table.

    Raises:
        ConfigError: a number is not a positive integer, x and xs are both given, no x can be guessed, or the cell can
            be run neither without numbers nor, because of its size, with them.
        ShapeError: as ``BlockRTRL.step``, for the x that was given; so CellError, SparsityError, NonFiniteError.
        UnknownOperationError: the cell runs an operation without a count; ``rules`` can give one.

    Cost:
        A few hundred steps without arithmetic, about 2 ms each: two seconds or so for a GRU. A step of a large mixture
        takes up to 150 ms, and some thirty seconds pass; name fewer ``blocks`` and ``windows`` there.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(8, 16), torch.nn.Linear(16, 2))
        >>> found = rtrl.plan(cell, steps=10_000, batch_size=4, memory_bytes=8 * 2**20)
        >>> found.best.method
        'BlockRTRL'
        >>> found.fits(next(row for row in found.rows if row.method == "BPTT"))
        False
    """
    numbers = [("steps", steps), ("batch_size", batch_size), ("memory_bytes", memory_bytes)]
    numbers += [(name, size) for name, many in _named(blocks, windows, horizons) for size in many]
    for name, number in numbers:
        if number is not None:
            validation.integer(name, number)
    validation.integer("steps", steps)
    if not isinstance(cell, nn.Module):
        raise ConfigError(f"cell must be a torch.nn.Module, got {type(cell).__name__}")
    for name, rate in (devices or {}).items():
        if not isinstance(rate, int | float) or not 0 < rate < float("inf"):
            raise ConfigError(f"the rate of {name!r} must be a positive number of multiply-adds a second, got {rate!r}")
    stream = _stream(x, xs)
    if batch_size is None:
        batch_size = 1 if stream is None else _batch_of(stream[0])
    found = Profile(cell, stream, batch_size, state=state, rules=rules)
    rows = [bptt(found, steps), dense_rtrl(found, steps)]
    for horizon in horizons if horizons is not None else [k for k in HORIZONS if k < steps]:
        rows += [tbptt(found, steps, horizon, sliding) for sliding in (True, False)]
    for block in dict.fromkeys(blocks if blocks is not None else _blocks(found, steps)):
        for window in dict.fromkeys(windows if windows is not None else WINDOWS):
            rows.append(block_rtrl(found, steps, block, window))
            if rows[-1].window is None:  # nothing can be dormant
                break
    return Plan(
        cell=found.name,
        steps=steps,
        batch_size=batch_size,
        state_size=found.state_size,
        parameter_size=found.parameter_size,
        dtype=found.dtype,
        memory_bytes=memory_bytes,
        rows=tuple(_compared(found, row) for row in rows),
        devices=dict(nominal_rates(found.dtype) if devices is None else devices),
        notes=_notes(found, stream, rows),
    )


def _named(*many: Sequence[int] | None) -> list[tuple[str, Sequence[int]]]:
    return [(name, own) for name, own in zip(("block", "window", "horizon"), many, strict=True) if own is not None]


def _stream(x: Any, xs: Sequence[Any] | None) -> list[Any] | None:
    if x is not None and xs is not None:
        raise ConfigError("give x, an example of one step, or xs, those of several in a row, and not both")
    if xs is None:
        return None if x is None else [x]
    if not len(xs):
        raise ConfigError("xs is empty: give the x of at least one step")
    return list(xs)


def _batch_of(x: Any) -> int:
    leaf = next(iter(pytrees.tensors(x)), None)
    return leaf.shape[0] if leaf is not None and leaf.ndim and leaf.shape[0] else 1


def _blocks(profile: Profile, steps: int) -> list[int]:
    """Powers of two (of four, where each costs more to measure) up to twice H, and H."""
    most, factor = min(steps, 2 * profile.state_size), 4 if profile.declares else 2
    sizes = {1}
    while max(sizes) * factor <= most:
        sizes.add(max(sizes) * factor)
    return sorted(sizes | ({profile.state_size} if profile.state_size <= most else set()))


def _compared(profile: Profile, choice: Choice) -> Choice:
    """With the number of steps beyond which BPTT takes more memory."""
    if choice.method not in ("BlockRTRL", "DenseRTRL"):
        return choice
    grown = choice  # with its influence and full blocks
    if choice.block is not None and choice.steps <= 2 * choice.block:
        grown = block_rtrl(profile, 2 * choice.block + 1, choice.block, choice.window or 1)
    return replace(
        choice,
        crossover_steps=_last(lambda t: bptt(profile, t).held_bytes <= grown.held_bytes),
        crossover_peak_steps=_last(lambda t: bptt(profile, t).peak_bytes <= grown.peak_bytes),
    )


def _last(holds: Any) -> int | None:
    """The largest number of steps for which something holds; None if it holds on runs of any length."""
    if not holds(1):
        return 0
    low, high = 1, 2
    while holds(high):
        if high > MOST_CROSSOVER:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _notes(profile: Profile, stream: list[Any] | None, rows: list[Choice]) -> tuple[str, ...]:
    notes = [
        "Counted: a loss at every step, one sync at the end, the checks of the first blocks included, audits and the "
        "search for structure not. A "
        "choice is exact if its gradient is that of the whole run.",
        "Bytes: beside the cell, its .grad and its optimizer. Held: between two steps, at most. At its peak: at once, "
        "while a block closes or a gradient is delivered.",
        "Times are lower bounds: multiply-adds over the device's best rate. Memory traffic, launches and Python come "
        "on top, and on small cells they are most of it.",
    ]
    if stream is None:
        notes.append("x was guessed: random numbers as wide as the cell says. Give x= to be sure.")
    if any(row.extrapolated for row in rows):
        notes.append("Lengths beyond those that were measured are extrapolated.")
    if any(row.estimated for row in rows):
        if not profile.steady:
            notes.append("≈: steps differ in how much they touch; the first one stands for all.")
        elif profile.given <= 1:
            notes.append(
                "≈: after the first step, choices drawn evenly at random. Give xs=, some steps of a real stream."
            )
        else:
            notes.append(f"≈: the {profile.given} steps of xs= over and over.")
    return tuple(notes)
