"""The checks that bugs must be caught by: those that users have, of ``rtrl.testing``, run on the package's own learner
and cell, and a few of things that only the package has. Each passes on the code as it is."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from running import run
from strategies import normal
from tolerances import assert_gradients_equal, assert_influences_equal
from torch import Tensor, nn
from toy_cells import PlainRNN, seeded

import oracles
import rtrl
from rtrl.errors import CellError, ParameterChangedError, SparsityError
from rtrl.testing import LearnerSpec, cell_checks, check_cell, check_learner, learner_checks
from rtrl.testing.specs import ERRORS, PROMISES
from rtrl.testing.streams import dense_stream, scheduled_stream

Check = Callable[[], None]


def _loss(t: int, y: Tensor) -> Tensor | None:
    return y.square().sum() + y.flatten(1)[:, 0].sum() if t % 3 != 1 else None


def learner_check(name: str) -> None:
    """A check of a user's, on BlockRTRL with blocks shorter and windows narrower than the streams."""
    make = functools.partial(rtrl.BlockRTRL, block=3, window=3)
    streams = [dense_stream(0)] if name == "own streams" else []
    spec = LearnerSpec(make, name="BlockRTRL", streams=streams, errors=ERRORS, **PROMISES)
    report = check_learner(spec, checks=[name])
    assert report.checks == [name], f"not judged: {report.skipped}"


def cell_check(name: str) -> None:
    """A check of a user's, on a RecurrentMoE whose samples go separate ways."""
    cell = seeded(rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=4, n_experts=4, topk=2, read_slots=3, write_slots=2), 7)
    report = check_cell(copy.deepcopy(cell), list(normal(1, 3, 3, 2)), state=normal(2, 3, 4, 4), on_fail="return")
    assert name in report.checks or report.failures, f"not judged: {report.skipped}"
    assert not [failure for failure in report.failures if failure.check == name], str(report)


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


def layers_by_hand() -> None:
    cell = rtrl.cells.Stack([PlainRNN(2, 3, 3), PlainRNN(3, 3)])
    cell, xs = seeded(cell, 3), normal(5, 8, 2, 2)
    expected = oracles.bptt(_ByHand(cell.layers), xs, _loss)  # type: ignore[arg-type]
    assert_gradients_equal(run(cell, xs, _loss, block=3, influences=False).gradients, expected)


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


def parameters_changed_in_an_open_block() -> None:
    cell = seeded(PlainRNN(2, 3), 1)
    learner = rtrl.BlockRTRL(cell, 2, block=3)
    learner.backward(learner.step(normal(1, 2, 2)).square().sum())
    with torch.no_grad():
        cell.recurrent.add_(0.1)  # type: ignore[operator]
    with pytest.raises(ParameterChangedError):
        learner.sync()


def samples_apart() -> None:
    class Mixing(PlainRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x, h - h.mean(dim=0))

    learner = rtrl.BlockRTRL(seeded(Mixing(2, 3), 1), 2, block=2)
    learner.backward(learner.step(normal(1, 2, 2)).square().sum())
    with pytest.raises(CellError, match="mixes samples"):
        learner.sync()


def whatever_the_default_device() -> None:
    stream = scheduled_stream(0)
    cell, xs = stream.cell, stream.xs
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
    **{f"learner: {name}": functools.partial(learner_check, name) for name in learner_checks()},
    **{f"cell: {name}": functools.partial(cell_check, name) for name in cell_checks()},
    **{
        check.__name__: check
        for check in (
            layers_by_hand,
            tree_in_order,
            cell_equals_loops,
            under_declared,
            parameters_changed_in_an_open_block,
            samples_apart,
            whatever_the_default_device,
            losses_of_the_second_output,
        )
    },
}
