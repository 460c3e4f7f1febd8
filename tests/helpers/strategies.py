"""What hypothesis draws: cells, sparsity patterns, dormancy, losses, resets, blocks and windows. All valid by
construction.

Shapes and masks are drawn directly and shrink toward one step, one sample, one row and nothing active; numbers come
from a seed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rtrl
from helpers.toy_cells import ForcedMoE, OddCell, PlainRNN, ScheduledCell, seeded

Draw = Callable[[st.SearchStrategy[Any]], Any]


def fewer(part: float) -> settings:
    """This part of the examples that the profile has: for tests whose examples are dear."""
    return settings(max_examples=max(1, round(part * settings().max_examples)))


@dataclass
class Case:
    """A cell, a stream and losses, and how the learner is to go through them."""

    cell: nn.Module
    xs: Tensor
    weights: list[Tensor | None]
    options: dict[str, Any]
    label: str

    def loss(self, t: int, y: Any) -> Tensor | None:
        """A smooth loss of everything in y that couples the samples, or None where the schedule has none."""
        weight = self.weights[t]
        if weight is None:
            return None
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(y) if leaf.is_floating_point()]
        mixed = torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)
        return (mixed.mean(dim=0) * weight[: mixed.shape[1]]).sum() + mixed.square().sum() / 2

    def __repr__(self) -> str:
        losses = "".join("." if w is None else "L" for w in self.weights)
        return f"Case({self.label}, T={self.xs.shape[0]}, B={self.xs.shape[1]}, losses={losses!r}, {self.options})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


seeds = st.integers(0, 999)
options = st.fixed_dictionaries(
    {"block": st.integers(1, 5), "window": st.integers(1, 6), "lazy": st.booleans() | st.just(True)}
)


@st.composite
def losses(draw: Draw, steps: int, seed: int) -> list[Tensor | None]:
    """A loss at any subset of the steps, at least one."""
    given = draw(st.lists(st.booleans(), min_size=steps, max_size=steps))
    given[draw(st.integers(0, steps - 1))] = True
    return [normal(seed + t, 64) if g else None for t, g in enumerate(given)]


@st.composite
def dormancy(draw: Draw, steps: int, size: int) -> list[list[list[bool]]]:
    """Which of ``size`` things each step touches, as masks by step and (at most two kinds of) sample, in runs so that
    they are dormant and active.

    Each is dormant always, active always, active in one run, at the two ends only, or at random steps.
    """
    active = []
    for _ in range(2):
        columns = []
        for _ in range(size):
            kind = draw(st.sampled_from(["never", "ends", "always", "run", "any"]))
            if kind == "never":
                column = [False] * steps
            elif kind == "always":
                column = [True] * steps
            elif kind == "ends":
                column = [t in (0, steps - 1) for t in range(steps)]
            elif kind == "run":
                start = draw(st.integers(0, steps - 1))
                stop = draw(st.integers(start, steps))
                column = [start <= t < stop for t in range(steps)]
            else:
                column = draw(st.lists(st.booleans(), min_size=steps, max_size=steps))
            columns.append(column)
        active.append(columns)
    return [[[active[kind][i][t] for i in range(size)] for kind in range(2)] for t in range(steps)]


@st.composite
def scheduled(draw: Draw, max_steps: int = 14) -> Case:
    """The scheduled cell: any reads, writes and experts, a set of its own for each sample."""
    steps, batch = draw(st.integers(1, max_steps)), draw(st.integers(1, 3))
    n_rows, width, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    seed = draw(seeds)
    masks = [draw(dormancy(steps, size)) for size in (n_rows, n_rows, n_experts)]
    bits = [torch.tensor(mask, dtype=torch.float64)[:, [b % 2 for b in range(batch)]] for mask in masks]
    xs = torch.cat([normal(seed, steps, batch, 2), *bits], dim=-1)
    cell = seeded(ScheduledCell(2, n_rows, width, n_experts), seed)
    return Case(
        cell,
        xs,
        draw(losses(steps, seed)),
        draw(options),
        f"scheduled n={n_rows} width={width} experts={n_experts} seed={seed}",
    )


@st.composite
def forced_moe(draw: Draw, max_steps: int = 10) -> Case:
    """The mixture of experts, its slots and experts laid down step by step and sample by sample."""
    steps, batch = draw(st.integers(1, max_steps)), draw(st.integers(1, 2))
    n_slots, n_experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    reads, experts = draw(st.integers(1, min(n_slots, 3))), draw(st.integers(1, min(n_experts, 2)))
    writes, seed = draw(st.integers(0, reads)), draw(seeds)
    # Few plans, repeated, make experts dormant for long and reactivate them together.
    plan = st.tuples(st.permutations(range(n_slots)), st.permutations(range(n_experts)))
    plans = draw(st.lists(plan, min_size=1, max_size=3))
    chosen = draw(st.lists(st.integers(0, len(plans) - 1), min_size=steps * batch, max_size=steps * batch))
    index = torch.tensor(
        [[*plans[c][0][:reads], *plans[c][0][:writes], *plans[c][1][:experts]] for c in chosen], dtype=torch.float64
    )
    xs = torch.cat([normal(seed, steps, batch, 2), index.reshape(steps, batch, -1)], dim=-1)
    moe = rtrl.RecurrentMoE(
        2,
        2,
        d_model=4,
        n_slots=n_slots,
        n_experts=n_experts,
        topk=1,
        read_slots=1,
        write_slots=1,
        expert_hidden=3,
        ffn_hidden=3,
    )
    cell = seeded(ForcedMoE(moe, (reads, writes, experts)), seed)
    label = f"forced moe slots={n_slots} experts={n_experts} r={reads} w={writes} k={experts} seed={seed}"
    return Case(cell, xs, draw(losses(steps, seed)), draw(options), label)


@st.composite
def routed_moe(draw: Draw, max_steps: int = 10) -> Case:
    """The mixture of experts left to its own choices: alone (any tokens a step), in two layers, or below an LSTM."""
    steps, batch, tokens = draw(st.integers(1, max_steps)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed, kind = draw(seeds), draw(st.sampled_from(["alone", "two layers", "below an LSTM"]))

    def moe(d_in: int, d_out: int, router_output: bool) -> rtrl.RecurrentMoE:
        return rtrl.RecurrentMoE(
            d_in,
            d_out,
            d_model=4,
            n_slots=3,
            n_experts=4,
            topk=2,
            expert_hidden=3,
            ffn_hidden=3,
            write_slots=1,
            router_output=router_output,
        )

    router_output = draw(st.booleans())
    cell: nn.Module = moe(2, 2, router_output)
    if kind == "two layers":
        cell = rtrl.cells.Stack([moe(2, 3, False), moe(3, 2, router_output)])
    elif kind == "below an LSTM":  # a layer that declares its rows below one that declares nothing
        cell = rtrl.cells.Stack([moe(2, 3, False), rtrl.cells.from_torch(nn.LSTMCell(3, 4))])
    tokens = tokens if kind == "alone" else 1
    xs = normal(seed, steps, batch, tokens, 2) if tokens > 1 else normal(seed, steps, batch, 2)
    label = f"routed moe {kind} tokens={tokens} router_output={router_output} seed={seed}"
    return Case(seeded(cell, seed), xs, draw(losses(steps, seed)), draw(options), label)


@st.composite
def dense(draw: Draw, max_steps: int = 12) -> Case:
    """Cells that declare nothing: our own, PyTorch's, and layers of them."""
    steps, batch, seed = draw(st.integers(1, max_steps)), draw(st.integers(1, 3)), draw(seeds)
    hidden = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["plain", "odd", "rnn", "gru", "lstm", "stack"]))
    readout = nn.Linear(hidden, 2)
    makers: dict[str, Callable[[], nn.Module]] = {
        "plain": lambda: PlainRNN(2, hidden),
        "odd": lambda: OddCell(2, hidden + 2),  # a norm over one entry is constant, over two almost
        "rnn": lambda: rtrl.cells.from_torch(nn.RNNCell(2, hidden), readout),
        "gru": lambda: rtrl.cells.from_torch(nn.GRUCell(2, hidden), readout),
        "lstm": lambda: rtrl.cells.from_torch(nn.LSTMCell(2, hidden), readout),
        "stack": lambda: rtrl.cells.Stack(
            [PlainRNN(2, hidden, 3), rtrl.cells.from_torch(nn.GRUCell(3, hidden)), PlainRNN(hidden, hidden)]
        ),
    }
    xs = normal(seed, steps, batch, 2)
    return Case(
        seeded(makers[kind](), seed),
        xs,
        draw(losses(steps, seed)),
        draw(options),
        f"{kind} hidden={hidden} seed={seed}",
    )


def cases() -> st.SearchStrategy[Case]:
    """Any case."""
    return scheduled() | forced_moe() | routed_moe() | dense()


@st.composite
def resets(draw: Draw, case: Case) -> Tensor:
    """Boolean (T, B): the samples that are reset before each step."""
    steps, batch = case.xs.shape[:2]
    flags = torch.zeros(steps, batch, dtype=torch.bool)
    for _ in range(draw(st.integers(1, 3))):
        flags[draw(st.integers(0, steps - 1)), draw(st.integers(0, batch - 1))] = True
    return flags
