"""Short checks with fixed streams, one a promise: each passes on the code as it is and catches some bug."""

import copy
import gc
import math
from collections.abc import Callable

import pytest
import torch
from running import gradients, run
from strategies import normal
from tolerances import assert_gradients_equal, assert_influences_equal
from torch import Tensor, nn
from toy_cells import ForcedMoE, OddCell, PlainRNN, ScheduledCell, seeded

import oracles
import rtrl
from rtrl.errors import CellError, NonFiniteError, ParameterChangedError, SparsityError

Check = Callable[[], None]


def _loss(t: int, y: Tensor) -> Tensor | None:
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(y) if leaf.is_floating_point()]
    return sum(leaf.square().sum() + leaf.flatten(1)[:, 0].sum() for leaf in leaves) if t % 3 != 1 else None


def _against_oracles(cell: nn.Module, xs: Tensor, resets: Tensor | None = None, **options: int | bool) -> None:
    """Gradients against BPTT, gradients and influences against full RTRL; a reference that is zero proves nothing."""
    expected, influences = oracles.dense_rtrl(cell, xs, _loss, resets=resets, return_influence=True)
    found = run(cell, xs, _loss, resets=resets, **options)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, _loss, resets=resets))
    assert_gradients_equal(found.gradients, expected)
    assert_influences_equal(found.influences, influences[-1])


def _sets(t: int, b: int, size: int, period: int) -> list[int]:
    """Masks that differ between samples and steps, so that some things sleep for a while."""
    return [int((t // period + 2 * i + b) % (size + 1) < 2) for i in range(size)]


def _scheduled(largest: float = 0.7, steps: int = 14, batch: int = 2) -> tuple[nn.Module, Tensor]:
    rows, experts = 4, 3
    masks = [
        [_sets(t, b, rows, 2) + _sets(t + 1, b + 1, rows, 3) + _sets(t, b, experts, 4) for b in range(batch)]
        for t in range(steps)
    ]
    features = normal(0, steps, batch, 2).clamp(max=largest)  # beyond 0.8 this cell declares everything
    return seeded(ScheduledCell(2, rows, 2, experts), 4), torch.cat([features, torch.tensor(masks).double()], dim=-1)


def _sleepers(steps: int = 30) -> tuple[ForcedMoE, Tensor]:
    moe = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=5, topk=2, expert_hidden=2, ffn_hidden=2)
    cell = seeded(ForcedMoE(moe, (2, 1, 2)), 11)
    assert isinstance(cell, ForcedMoE)
    chosen = [
        [[t // 5 % 3, (t // 5 + 1) % 3, t // 5 % 3, (t // 7 + b) % 5, (t // 7 + b + 1) % 5] for b in range(2)]
        for t in range(steps)
    ]
    return cell, torch.cat([normal(0, steps, 2, 2), torch.tensor(chosen).double()], dim=-1)


class _Twice(PlainRNN):
    """Meets its recurrent weight in two linear maps."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h_next = super().forward(x, h)
        return y, torch.tanh(h_next + (h * h) @ self.recurrent)


class _ByHand(nn.Module):
    """What ``Stack`` of two layers is, written out."""

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 6, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        below, first = self.layers[0](x, h[:, :3])
        above, second = self.layers[1](below, h[:, 3:])
        return above, torch.cat([first, second], dim=1)


def dense_cells() -> None:
    for cell in (PlainRNN(2, 3), OddCell(2, 3), _Twice(2, 3)):
        _against_oracles(seeded(cell, 1), normal(2, 9, 2, 2), block=4)


def sparse_rows() -> None:
    cell, xs = _scheduled()
    for block in (1, 3):
        _against_oracles(cell, xs, block=block, window=3)


def everything_declared_now_and_then() -> None:
    cell, xs = _scheduled(largest=9.0)
    assert {bool(x[0, 0] > 0.8) for x in xs} == {False, True}
    _against_oracles(cell, xs, block=3, window=3)


def sleeping_slices() -> None:
    cell, xs = _sleepers()
    expected = oracles.bptt(cell, xs, _loss)
    for block, window in ((1, 3), (2, 4), (2, 64)):
        for syncs in ({}, dict.fromkeys(range(1, 30, 5), True), dict.fromkeys(range(0, 30, 3), False)):
            found = run(cell, xs, _loss, block=block, window=window, syncs=syncs, influences=False)
            assert_gradients_equal(found.gradients, expected)


def layers() -> None:
    cell = rtrl.cells.Stack([PlainRNN(2, 3, 3), PlainRNN(3, 3)])
    cell, xs = seeded(cell, 3), normal(5, 8, 2, 2)
    expected = oracles.bptt(_ByHand(cell.layers), xs, _loss)  # type: ignore[arg-type]
    assert_gradients_equal(run(cell, xs, _loss, block=3, influences=False).gradients, expected)


def resets() -> None:
    cell, xs = _scheduled()
    flags = torch.zeros(len(xs), 2, dtype=torch.bool)
    flags[4, 0] = flags[9, 1] = flags[10, 0] = True
    _against_oracles(cell, xs, resets=flags, block=3, window=3)


def tree_in_order() -> None:
    for capacity in (1, 2, 5, 8):
        tree = rtrl.CircularSegmentTree(capacity, lambda a, b: a + b, "")
        for step in range(3 * capacity + 1):
            tree.append(f"<{step}>")
            for start in range(tree.oldest, tree.stop + 1):
                for stop in range(start, tree.stop + 1):
                    assert tree.query(start, stop) == "".join(f"<{i}>" for i in range(start, stop))


def cell_equals_loops() -> None:
    cell = seeded(rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=4, n_experts=4, topk=2, read_slots=3), 7)
    assert isinstance(cell, rtrl.RecurrentMoE)
    x, h = normal(1, 3, 2), normal(2, 3, 4, 4)
    y, h_next, used = cell(x, h)
    wanted = oracles.moe.forward(
        {name: p.detach().numpy() for name, p in cell.named_parameters()},
        x.numpy(), h.numpy(), n_heads=2, topk=2, read_slots=3, write_slots=2,
    )  # fmt: skip
    torch.testing.assert_close(y.detach(), torch.from_numpy(wanted.y), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(h_next.detach(), torch.from_numpy(wanted.h_next), rtol=1e-11, atol=1e-12)
    for own, old, new in zip(used.writes.tolist(), h, h_next, strict=True):
        assert all(torch.equal(old[i], new[i]) for i in range(4) if i not in own)


class _Leaky(PlainRNN):
    """Three units, each a row of its own; declares too little: ``what`` is left out, "writes" or "reads"."""

    what = "nothing"

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        new = torch.tanh(self.inward(x)[:, :1] + h @ self.recurrent[:, :1])
        rest = 0.9 * h[:, 1:] if self.what == "writes" else h[:, 1:]
        first = torch.zeros(len(x), 1, dtype=torch.int64)
        reads = first if self.what == "reads" else None
        return self.head(h[:, :1].expand(-1, 6)), torch.cat([new, rest], dim=1), rtrl.Sparsity(reads, first)


def under_declared() -> None:
    for what in ("writes", "reads"):
        cell = seeded(_Leaky(2, 3), 1)
        cell.what = what  # type: ignore[assignment]
        learner = rtrl.BlockRTRL(cell, 2, block=2, state=normal(4, 2, 3))
        with pytest.raises(SparsityError):  # noqa: PT012
            for x in normal(3, 4, 2, 2):
                learner.backward(learner.step(x).square().sum())
            learner.sync()


class _NearTie(nn.Module):
    """Routes by a sum whose last bits depend on the batch it is taken in; honours ``replay``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2, dtype=torch.float64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 2), 0.5, dtype=torch.float64)

    def forward(
        self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None
    ) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        first = len(x) == 1  # a single step decides one way, a whole block of them the other
        chosen = torch.full((len(x), 1), int(first)) if replay is None else replay.writes
        new = torch.tanh((h @ self.weight).gather(1, chosen) + x[:, :1])
        used = rtrl.Sparsity(None, chosen) if replay is None else replay
        return new, h.scatter(1, chosen, new), used


def choices_are_replayed() -> None:
    cell, xs = _NearTie(), normal(6, 7, 1, 1)
    expected = oracles.bptt(cell, xs, _loss)
    assert_gradients_equal(run(cell, xs, _loss, block=3, influences=False).gradients, expected)


def parameters_changed_in_an_open_block() -> None:
    cell = seeded(PlainRNN(2, 3), 1)
    learner = rtrl.BlockRTRL(cell, 2, block=3)
    learner.backward(learner.step(normal(1, 2, 2)).square().sum())
    with torch.no_grad():
        cell.recurrent.add_(0.1)  # type: ignore[operator]
    with pytest.raises(ParameterChangedError):
        learner.sync()


def not_finite() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2)
    x = normal(1, 2, 2)
    x[0, 0] = math.nan
    with pytest.raises(NonFiniteError):
        learner.step(x)
    y = learner.step(normal(1, 2, 2))
    with pytest.raises(NonFiniteError):
        learner.backward((y * 0).sum().sqrt())


def samples_apart() -> None:
    class Mixing(PlainRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x, h - h.mean(dim=0))

    learner = rtrl.BlockRTRL(seeded(Mixing(2, 3), 1), 2, block=2)
    learner.backward(learner.step(normal(1, 2, 2)).square().sum())
    with pytest.raises(CellError, match="mixes samples"):
        learner.sync()


def bytes_held() -> None:
    cell, xs = _sleepers(60)
    learner = rtrl.BlockRTRL(cell, 2, block=2, window=3)

    def live() -> int:
        gc.collect()
        found = {id(o): o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)}
        return len(found)

    seen = []
    for t in range(240):
        learner.backward(learner.step(xs[t % 60]).square().sum())
        if t in (119, 239):
            learner.sync()
            cell.zero_grad()
            seen.append(live())
    assert seen[0] == seen[1]


def saved_and_loaded() -> None:
    cell, xs = _scheduled()
    options = {"block": 4, "window": 3, "syncs": {4: True, 9: False}}
    through = run(cell, xs, _loss, **options)
    resumed = run(cell, xs, _loss, saves={5, 10}, **options)
    assert all(torch.equal(through.gradients[n], resumed.gradients[n]) for n in through.gradients)
    assert all(torch.equal(through.influences[n], resumed.influences[n]) for n in through.influences)


def early_delivery() -> None:
    """A block cut short by ``sync`` earns what a full one does, and nothing is delivered twice."""
    cell, xs = _scheduled()
    once = oracles.bptt(cell, xs, _loss)
    learner = rtrl.BlockRTRL(cell, 2, block=5, window=3)
    for t, x in enumerate(xs):
        y = learner.step(x)
        loss = _loss(t, y)
        if loss is not None:
            learner.backward(loss)
        if t % 3 == 1:
            learner.sync()
    learner.sync()
    learner.sync()
    found = copy.deepcopy(gradients(cell))
    cell.zero_grad()
    assert_gradients_equal(found, once)


def whatever_the_default_device() -> None:
    cell, xs = _scheduled()
    expected = run(cell, xs, _loss, block=3, window=2)
    torch.set_default_device("meta")
    try:
        found = run(cell, xs, _loss, block=3, window=2)
    finally:
        torch.set_default_device(None)
    assert_gradients_equal(found.gradients, expected.gradients)
    assert_influences_equal(found.influences, expected.influences)


class _Heads(PlainRNN):
    """Gives its state, too, beside an output that no loss need reach."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:  # type: ignore[override]
        y, h_next = super().forward(x, h)
        return (y, h_next.square()), h_next


def losses_of_the_second_output() -> None:
    cell, xs = seeded(_Heads(2, 3), 1), normal(2, 7, 2, 2)
    loss = lambda t, y: y[1].square().sum() if t % 2 else None
    found = run(cell, xs, loss, block=3, influences=False)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        dense_cells,
        sparse_rows,
        everything_declared_now_and_then,
        sleeping_slices,
        layers,
        resets,
        tree_in_order,
        cell_equals_loops,
        under_declared,
        choices_are_replayed,
        parameters_changed_in_an_open_block,
        not_finite,
        samples_apart,
        bytes_held,
        saved_and_loaded,
        early_delivery,
        whatever_the_default_device,
        losses_of_the_second_output,
    )
}
