"""What hypothesis draws of structured cells: layers of every kind, structure that breaks, what happens on the way."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
from helpers import structured_cells as cells
from helpers.running import run, trainable
from helpers.strategies import Case, Draw, losses, normal, options, resets, seeds
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from helpers.unlasting_cells import Feedback, Opening, Passing

D = 2
"""The size of x; layers that may stand above themselves give a y of that size."""

LAYERS: dict[str, Callable[[int, int], cells.Layer]] = {
    "minGRU": cells.MinGRU,
    "eLSTM": cells.ElementwiseLSTM,
    "peephole": cells.Peephole,
    "complex pairs": cells.ComplexDiagonal,
    "complex planes": lambda d, n: cells.ComplexDiagonal(d, n, dim=1),
    "trace unit": lambda d, n: cells.ComplexDiagonal(d, n, nonlinear=True),
    "bmm": cells.BlockDiagonal,
    "einsum": lambda d, n: cells.BlockDiagonal(d, n, "einsum"),
    "reshape": lambda d, n: cells.BlockDiagonal(d, n, "reshape"),
    "mask": lambda d, n: cells.BlockDiagonal(d, n, "mask"),
    "columns": cells.Columns,
    "transposed": cells.Transposed,
    "normed": cells.Normed,
    "two widths": cells.TwoWidths,
    "placed": cells.Placed,
    "rolled start": cells.RolledStart,
}
STACKS: dict[str, list[str]] = {
    "two layers": ["minGRU", "eLSTM"],
    "three layers": ["complex pairs", "columns", "peephole"],
    "a dense layer above": ["minGRU", "dense"],
    "a dense layer below": ["dense", "einsum"],
}
"""Layers from below."""
OPENING = ("state", "balanced", "drive", "weight", "written", "moved", "zero")


def both_ways(given: dict[str, Any]) -> list[dict[str, Any]]:
    """The options with structure looked for, and with the dense engine."""
    return [{**given, "structure": way} for way in ("find", "off")]


@st.composite
def layered(draw: Draw, max_steps: int = 6) -> Case:
    """One to three layers, at most one of them dense, with everything that may stand beside them."""
    steps, batch, seed = draw(st.integers(2, max_steps)), draw(st.integers(1, 3)), draw(seeds)
    kinds = draw(st.lists(st.sampled_from([*LAYERS, "dense"]), min_size=1, max_size=3))
    n = draw(st.integers(2, 4 if len(kinds) == 1 else 2))
    sizes, layers = [D], []
    for kind in kinds:
        layers.append(cells.Dense(sizes[-1], n) if kind == "dense" else LAYERS[kind](sizes[-1], n))
        sizes.append(layers[-1].d_out)
    if sizes[-2] == sizes[-1] and len(layers) < 3 and draw(st.booleans()):
        layers.append(layers[-1])  # its parameters serve two layers
        kinds.append("the same")
    extras = {name: draw(st.booleans()) for name in ("between", "readout", "learned")}
    symbols = draw(st.sampled_from([0, 0, 3]))
    cell = seeded(cells.Layers(layers, D, symbols=symbols, **extras), seed)
    xs = normal(seed, steps, batch, D)
    if symbols:
        xs = (xs[..., 0].abs() * 10).long() % symbols
    label = f"{' + '.join(kinds)} n={n} symbols={symbols} {[name for name in extras if extras[name]]} seed={seed}"
    return Case(cell, xs, draw(losses(steps, seed)), draw(options), label)


@st.composite
def breaking(draw: Draw, max_steps: int = 7) -> Case:
    """Structure that ceases to hold at a drawn step of one sample or of all, alone or in one of two layers."""
    steps, batch, seed = draw(st.integers(3, max_steps)), draw(st.integers(1, 3)), draw(seeds)
    what, n = draw(st.sampled_from([*OPENING, "feedback"])), draw(st.integers(2, 3))
    place = draw(st.sampled_from(["alone", "below", "above"]))
    opens, who = draw(st.integers(1, steps - 1)), draw(st.integers(0, batch))
    if what == "feedback":
        cell: nn.Module = Feedback(D, n)
    else:
        opening, gru = Opening(D, n, what), cells.MinGRU
        cell = cells.Layers(
            {"alone": [opening], "below": [opening, gru(n, 2)], "above": [gru(D, D), opening]}[place], D
        )
    xs = normal(seed, steps, batch, D)
    xs[..., 0] = -xs[..., 0].abs()
    xs[opens:, who if who < batch else slice(None), 0] *= -1
    label = f"{what} {place} n={n} opens at {opens} for {who if who < batch else 'all'} seed={seed}"
    return Case(seeded(cell, seed), xs, draw(losses(steps, seed)), draw(options), label)


def placed(what: str, place: str, n: int) -> cells.Layers:
    """What opens, "alone", "below" a layer, or "above" one that passes on what it opens by."""
    opening = Opening(D, n, what)
    layers = {"alone": [opening], "below": [opening, cells.MinGRU(n, 2)], "above": [Passing(D, D), opening]}[place]
    return cells.Layers(layers, D)


@st.composite
def events(draw: Draw, case: Case) -> dict[str, Any]:
    """Syncs, changes of the parameters, resets of some samples, saves: the arguments of ``run``."""
    steps = case.xs.shape[0]
    at = st.integers(0, steps - 1)
    cuts = sorted(draw(st.sets(at, max_size=2)))
    moves = [
        {name: 0.1 * k * torch.sin(1 + torch.arange(p.numel()).to(p)).reshape(p.shape) for name, p in trained(case)}
        for k in range(len(cuts) + 1)
    ]
    return {
        "syncs": draw(st.dictionaries(at, st.booleans(), max_size=2)),
        "offsets": [moves[sum(cut <= t for cut in cuts)] for t in range(steps)] if cuts else None,
        "resets": draw(resets(case)) if draw(st.booleans()) else None,
        "saves": draw(st.sets(at, max_size=2)),
    }


def trained(case: Case) -> list[tuple[str, Tensor]]:
    return list(trainable(case.cell).items())


def check(case: Case, *, off: bool = False, resets: Tensor | None = None, offsets: Any = None, **others: Any) -> None:
    """Gradients against both oracles, influences against full RTRL; with ``off``, by the dense engine, too."""
    stream = (case.cell, case.xs, case.loss)
    changed = {"resets": resets, "offsets": offsets}
    expected, influences = oracles.dense_rtrl(*stream, **changed, return_influence=True)
    assert_gradients_equal(expected, oracles.bptt(*stream, **changed), may_be_zero=True)
    for way in both_ways(case.options)[: 1 + off]:
        result = run(*stream, **way, **changed, **others)
        assert_gradients_equal(result.gradients, expected, may_be_zero=True)
        assert_influences_equal(result.influences, influences[-1], may_be_zero=True)


def drawn(
    cell: nn.Module, *, steps: int = 8, batch: int = 2, seed: int = 1, xs: Tensor | None = None, **given: Any
) -> Case:
    """The cell with drawn parameters on a drawn stream, a loss at two steps of three."""
    weights = [None if t % 3 == 1 else normal(seed + t, 64) for t in range(steps)]
    xs = normal(seed, steps, batch, D) if xs is None else xs
    return Case(seeded(cell, seed), xs, weights, {"block": 3, **given}, type(cell).__name__)


def stack(kinds: list[str], n: int, **extras: Any) -> cells.Layers:
    layers: list[cells.Layer] = []
    for kind in kinds:
        make = cells.Dense if kind == "dense" else LAYERS[kind]
        layers.append(make(layers[-1].d_out if layers else D, n))
    return cells.Layers(layers, D, **extras)


def routes(steps: int) -> Tensor:
    """Inputs of ``Routed``: the two samples use different experts and write different rows, in runs."""
    chosen = [[(t // 5) % 3, t % 2, (t // 4 + 1) % 3, (t // 3) % 3] for t in range(steps)]
    index = torch.tensor(chosen, dtype=torch.float64).reshape(steps, 2, 2)
    return torch.cat([normal(3, steps, 2, D), index], dim=-1)
