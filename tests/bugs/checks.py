"""The checks that bugs must be caught by: those that users have, of ``rtrl.testing``, run on the package's own learner
and cell, and a few of things that only the package has. Each passes on the code as it is."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from complex_checks import COMPLEX_CHECKS
from fault_checks import FAULT_CHECKS
from helpers.analytic_cells import TwoMaps
from helpers.plain_autograd import assert_exact
from helpers.running import run
from helpers.sliced_cells import MatmulSlices, WeightAndBias, turns
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import PlainRNN, seeded
from lifecycle_checks import LIFECYCLE_CHECKS
from structure_checks import STRUCTURE_CHECKS
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from user_cell_checks import USER_CELL_CHECKS

import oracles
import rtrl
from rtrl._engine import buffers, immediate, reverse_sweep, untapped
from rtrl._influence import store
from rtrl._influence.transition import Transition
from rtrl.errors import CellError, ParameterChangedError, SparsityError
from rtrl.learners import BPTT
from rtrl.testing import LearnerSpec, cell_checks, check_cell, check_learner, learner_checks
from rtrl.testing.own_specs import ERRORS, PROMISES
from rtrl.testing.report import Report
from rtrl.testing.streams import dense_stream, dormant_stream, scheduled_stream, unusual_stream

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


def mixture_report() -> Report:
    """Every check of a cell, on a RecurrentMoE whose samples go separate ways."""
    moe = rtrl.RecurrentMoE(2, 2, d_model=4, n_slots=4, n_experts=4, topk=2, read_slots=3, write_slots=2)
    xs, state = list(normal(1, 3, 3, 2)), normal(2, 3, 4, 4)
    return check_cell(seeded(moe, 7), xs, state=state, on_fail="return")


def gru_report() -> Report:
    """Every check of a cell, on a GRU."""
    cell = seeded(rtrl.cells.from_torch(nn.GRUCell(2, 3)), 7)
    return check_cell(cell, list(normal(1, 3, 3, 2)), state=normal(2, 3, 3), on_fail="return")


def row_groups_report() -> Report:
    """Every check of a cell, on one that declares row groups."""
    xs, state = list(normal(1, 3, 3, 2)), normal(2, 3, 3, 2)
    return check_cell(seeded(rtrl.cells.RTU(2, 3), 7), xs, state=state, on_fail="return")


def cell_check(name: str, reports: Sequence[Callable[[], Report]] = (mixture_report, gru_report)) -> None:
    """A check of a user's, in reports on some cells."""
    for make in (*reports, *([row_groups_report] if name == "row groups hold" else [])):
        report = make()
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


def leaning_samples_are_found() -> None:
    """The first of two samples depends on the other in derivative alone."""

    class Leaning(PlainRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            y, h_next = super().forward(x, h)
            return y, h_next + torch.cat([h[1:] - h[1:].detach(), torch.zeros_like(h[:1])])

    learner = rtrl.BlockRTRL(seeded(Leaning(2, 3), 1), 2)
    learner.step(normal(1, 2, 2))
    with pytest.raises(CellError, match="depends on the state of another"):
        learner.sync()


def declared_slices() -> None:
    """Slices met by a matrix product, slices of a weight and its bias declared apart, and slices not declared."""
    for tokens in (1, 2):
        assert_exact(seeded(MatmulSlices(tokens), 2), turns(2, 4), 2, block=3, window=2)
    for bias in ("all", "not declared", "computed"):
        assert_exact(seeded(WeightAndBias(bias), 2), turns(1, 3), 2, block=3, window=2)

    class Undeclared(MatmulSlices):
        def forward(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
            y, h, sparsity = super().forward(*args, **options)
            return y, h, rtrl.Sparsity(active={"w": sparsity.active["w"][:, :1]})

    learner = rtrl.BlockRTRL(seeded(Undeclared(1), 2), 2)
    learner.step(turns(2, 4)[0])
    with pytest.raises(SparsityError, match="does not declare"):
        learner.sync()


def analytic_steps_of_several_kinds() -> None:
    """Two kinds in a block, two maps of the state, three readouts, two of them with one weight."""
    xs = [x if t % 3 else (3 * x).round().long() for t, x in enumerate(normal(1, 8, 2, 3))]
    assert_exact(seeded(TwoMaps(), 3), xs, 2, block=4)


def rows_in_pieces() -> None:
    """Products for rows of an influence that begin in one piece and do not go on so."""
    like = torch.zeros(0, dtype=torch.float64)
    influence = store.ParameterInfluence(torch.Size([6, 2]), True, 1, 4, like)
    influence.allocate(torch.arange(6), 0)
    block = Transition(None, None, normal(4, 1, 4, 4), normal(5, 1, 4), 2, 2)
    left, right, rows = normal(7, 3, 3, 4), normal(8, 3, 3, 2), torch.tensor([0, 1, 3])
    influence.add_products(rows, block, left, right, False)
    torch.testing.assert_close(influence.values[rows], left.mT @ right)


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
    expected = oracles.bptt(cell, xs, loss)
    assert_gradients_equal(run(cell, xs, loss, block=3, influences=False).gradients, expected)
    assert_gradients_equal(run(cell, xs, loss, influences=False, make=BPTT).gradients, expected)


TORCH_CELLS: dict[str, Callable[[int, int], nn.Module]] = {
    "tanh": nn.RNNCell,
    "relu": functools.partial(nn.RNNCell, nonlinearity="relu"),
    "gru": nn.GRUCell,
    "lstm": nn.LSTMCell,
    "gru without biases": functools.partial(nn.GRUCell, bias=False),
}


def _any_loss(t: int, y: object) -> Tensor | None:
    leaves = [leaf for leaf in pytree.tree_leaves(y) if leaf.is_floating_point()]
    return sum(_loss(0, leaf) for leaf in leaves) if t % 3 != 1 else None  # type: ignore[misc, return-value]


def equals_oracles(cell: nn.Module, xs: Tensor, *blocks: int, **options: int) -> None:
    """Gradients and influences, in blocks of every length, against both oracles."""
    expected, influences = oracles.dense_rtrl(cell, xs, _any_loss, return_influence=True)
    assert_gradients_equal(oracles.bptt(cell, xs, _any_loss), expected, may_be_zero=True)
    for block in blocks:
        found = run(cell, xs, _any_loss, block=block, **options)
        assert_gradients_equal(found.gradients, expected, may_be_zero=True)
        assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


class KnownCell(nn.Module):
    """``tanh(W x + U h) + a ∘ h``, y of h before and after the step, with its analytic derivatives."""

    def __init__(self, wrong: str = "nothing") -> None:
        super().__init__()
        self.wrong = wrong
        self.inward, self.recurrent = nn.Linear(2, 3), nn.Linear(3, 3, bias=False)
        self.head = nn.Linear(6, 2)
        self.register_buffer("keep", torch.tensor([0.3, 0.0, -0.2], dtype=torch.float64))

    def init_state(self, batch_size: int) -> Tensor:
        return self.inward.weight.new_full((batch_size, 3), 0.3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(self.inward(x) + self.recurrent(h)) + self.keep * h
        return self.head(torch.cat([h, h_next], dim=1)), h_next

    def analytic_step(self, x: Tensor, h: Tensor) -> rtrl.cells.AnalyticStep | None:
        if self.wrong == "none":
            return None
        with torch.no_grad():
            new = torch.tanh(self.inward(x) + self.recurrent(h))
            slope = (1 - new.square())[:, None, None]
            h_next = new + self.keep * h * (1.01 if self.wrong == "value" else 1)
            direct = self.keep.expand(len(h), 1, 1, 3) * (0.5 if self.wrong == "direct" else 1)
            by_h = slope * (0.5 if self.wrong == "response" else 1)
        ends = h_next.detach().requires_grad_()
        bias = None if self.wrong == "bias" else self.inward.bias
        taps = [
            rtrl.cells.UnitTap(self.inward.weight, bias, x, slope),
            rtrl.cells.UnitTap(self.recurrent.weight, None, h.detach(), by_h, part=0),
        ]
        seen = h.detach() if self.wrong == "readout" else h
        return rtrl.cells.AnalyticStep(self.head(torch.cat([seen, ends], dim=1)), ends, taps, direct)


def analytic_steps() -> None:
    readout = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Tanh())
    for name, kind in TORCH_CELLS.items():
        cell = seeded(rtrl.cells.from_torch(kind(3, 4), readout), 5)
        assert cell.analytic_step(torch.zeros(1, 3, dtype=torch.float64), cell.init_state(1)) is not None, name
        for size, blocks in ((1, (1, 5)), (2, (3, 7)), (3, (13,))):
            equals_oracles(cell, normal(6, 13, size, 3), *blocks)
    for wrong in ("nothing", "none"):
        for size, blocks in ((1, (5,)), (2, (3, 13))):
            equals_oracles(seeded(KnownCell(wrong), 3), normal(6, 13, size, 2), *blocks)


def wrong_analytic_steps_are_refused() -> None:
    for wrong in ("value", "direct", "response", "bias", "readout"):
        learner = rtrl.BlockRTRL(seeded(KnownCell(wrong), 3), 2, block=2)
        learner.backward(learner.step(normal(1, 2, 2)).square().sum())
        with pytest.raises(CellError, match="analytic_step"):
            learner.sync()


def long_blocks() -> None:
    """Blocks that are worked off in pieces: the limits are set so low that everything goes in several."""
    limits = (
        (untapped, "_CHUNK", 60),
        (untapped, "_ROWS_CHUNK", 60),
        (immediate, "_CHUNK", 60),
        (immediate, "_ROWS_CHUNK", 60),
        (immediate, "_LEAST_ROWS", 2),
        (immediate, "_LEAST_ROWS_DENSE", 2),
        (buffers, "_LEAST_BYTES", 1),
        (store, "BUFFER_NUMBERS", 30),
        (reverse_sweep, "_CHUNK", 40),
        (reverse_sweep, "_LAUNCH_MACS", {"cpu": 0}),
    )
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in limits:
            patch.setattr(module, name, value)
        streams = (
            scheduled_stream(0),
            dense_stream(0),
            dense_stream(0, batch=1),
            unusual_stream(0),
            dormant_stream(0),
        )
        cases = [(stream.cell, stream.xs) for stream in streams]
        for size in (1, 2):  # analytic derivatives, and a cell that has none after all
            gru = seeded(rtrl.cells.from_torch(nn.GRUCell(2, 3)), 4)
            known = [seeded(KnownCell(wrong), 3) for wrong in ("nothing", "none")]
            cases += [(cell, normal(6, 13, size, 2)) for cell in (gru, *known)]
        for cell, xs in cases:
            equals_oracles(cell, xs, 5, 11, len(xs), window=3)


def tiny_losses() -> None:
    """A loss near the smallest number there is earns as much of it as any other, however the products are taken."""
    cell, xs = seeded(PlainRNN(2, 3, start=0.3), 1), normal(2, 9, 2, 2)
    for block, scanned in ((2, True), (9, True), (9, False)):
        with pytest.MonkeyPatch.context() as patch:
            if not scanned:
                patch.setattr(reverse_sweep, "_LAUNCH_MACS", {"cpu": 0})
            found = run(cell, xs, lambda t, y: 1e-296 * y.square().sum(), block=block, influences=False).gradients
        expected = oracles.bptt(cell, xs, lambda t, y: y.square().sum())
        assert_gradients_equal({name: value * 1e296 for name, value in found.items()}, expected)


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
            leaning_samples_are_found,
            declared_slices,
            analytic_steps_of_several_kinds,
            rows_in_pieces,
            whatever_the_default_device,
            losses_of_the_second_output,
            analytic_steps,
            wrong_analytic_steps_are_refused,
            long_blocks,
            tiny_losses,
        )
    },
    **FAULT_CHECKS,
    **LIFECYCLE_CHECKS,
    **STRUCTURE_CHECKS,
    **USER_CELL_CHECKS,
    **COMPLEX_CHECKS,
}
