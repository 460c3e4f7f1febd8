"""Learners that are moved to another dtype, copied or pickled at any moment, and loaded into another block."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, F64, normal
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ConfigError, LossError, NonFiniteError, ParameterChangedError
from rtrl.learners import BPTT, SnAp
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows

Make = Callable[..., Any]
BLOCKS = [
    pytest.param(functools.partial(rtrl.BlockRTRL, block=4, window=2), id="block"),
    pytest.param(functools.partial(rtrl.BlockRTRL, block=3, lazy=False), id="eager"),
]
ALL = [*BASELINES, *BLOCKS]
FIRST = torch.tensor([True, False])


class Rows(nn.Module):
    """One row of a table per sample and step; a learned first state. Its rows sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix, self.h0 = (nn.Parameter(normal(i, *s)) for i, s in enumerate([(4, 3), (3, 3), (3,)]))

    def init_state(self, batch_size: int) -> Tensor:
        return self.h0.expand(batch_size, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        index = x[:, 0].long()
        h_next = torch.tanh(h @ self.mix + nn.functional.embedding(index, self.table)) + 0 * x[:, :1]
        return h_next * h, h_next, rtrl.Sparsity(active={"table": index[:, None]})


XS = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 0], [0, 2], [3, 3]] * 3, dtype=F64)[:, :, None]


def through_pickle(learner: Any) -> Any:
    return pickle.loads(pickle.dumps(learner))


def through_torch(learner: Any) -> Any:
    file = io.BytesIO()
    torch.save(learner, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def along(learner: Any, start: int, stop: int, dtype: torch.dtype = F64) -> None:
    for t in range(start, stop):
        if t == 6:
            learner.reset(FIRST)
        learner.backward((learner.step(XS[t].to(dtype)) - 0.1 * t).square().sum())


COPIES = [
    *(pytest.param(*param.values, copy.deepcopy, id=f"{param.id}-copy") for param in ALL),
    *(
        pytest.param(*param.values, through_pickle, id=f"{param.id}-pickle")
        for param in (ALL[0], ALL[3], ALL[7], ALL[8])
    ),
    pytest.param(*ALL[8].values, through_torch, id="block-file"),
]


@pytest.mark.parametrize(("make", "how"), COPIES)
def test_a_copy_continues_bit_for_bit_at_any_moment(make: Make, how: Callable[[Any], Any]) -> None:
    """Before the first step, inside an open block with losses, right after a reset, and at the end of a block."""
    learner = make(Rows(), 2)
    copies, start = [how(learner)], [0]
    for stop in (1, 6, 9):
        along(learner, start[-1], stop)
        if stop == 6:
            learner.reset(~FIRST)
        if stop == 9:
            learner.sync()
        copies.append(how(learner))
        start.append(stop)
    before = gradients(learner.cell)  # a copy of a module has no .grad
    along(learner, 9, 14)
    learner.sync()
    expected, held = gradients(learner.cell), learner.retained_bytes()
    for number, (one, begin) in enumerate(zip(copies, start, strict=True)):
        assert one.cell is not learner.cell and type(one) is type(learner) and one.steps_taken == begin
        for stop in (6, 9, 14):
            along(one, begin, stop)
            begin = max(begin, stop)
            if stop == 6 and number < 2:
                one.reset(~FIRST)
            if stop == 9 and number < 3:
                one.sync()
        one.sync()
        found = gradients(one.cell)
        for name, value in found.items():
            total = value + before[name] if number == 3 else value
            assert torch.equal(total, expected[name])
        assert one.retained_bytes() == held


def test_a_y_of_the_original_does_not_reach_a_copy_and_neither_disturbs_the_other() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 0), 2, block=3)
    y = learner.step(torch.ones(2, 2, dtype=F64))
    learner.backward(y.sum())
    other = copy.deepcopy(learner)
    with pytest.raises(LossError, match="does not depend on the y"):
        other.backward(y.square().sum())
    learner.backward(y.square().sum())
    with torch.no_grad():
        for parameter in other.cell.parameters():
            assert parameter.grad is None
    other.sync()
    assert all(p.grad is None for p in learner.cell.parameters())
    learner.sync()
    with torch.no_grad():
        next(other.cell.parameters()).add_(1)
    learner.step(torch.ones(2, 2, dtype=F64))


def test_a_learner_and_its_optimizer_are_copied_together() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    pair = rtrl.BlockRTRL(cell, 2), torch.optim.SGD(cell.parameters(), lr=0.1)
    learner, optimizer = copy.deepcopy(pair)
    assert optimizer.param_groups[0]["params"][0] is next(learner.cell.parameters())


def test_a_learner_whose_parameters_changed_in_the_open_block_is_not_copied() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 0), 2, block=3)
    learner.step(torch.ones(2, 2, dtype=F64))
    with torch.no_grad():
        next(learner.cell.parameters()).add_(1)
    with pytest.raises(ParameterChangedError):
        copy.deepcopy(learner)


@pytest.mark.parametrize("saved_at", [5, 6])
@pytest.mark.parametrize("other", [{"block": 2}, {"block": 7}, {"window": 1}, {"window": 9}, {"lazy": False}])
def test_a_learner_saved_at_the_end_of_a_block_is_loaded_into_another(saved_at: int, other: dict[str, Any]) -> None:
    """Also into a shorter window than the dormant slices need, and with gradients that are not delivered."""
    arguments = {"block": 3, "window": 2}
    cell = Rows()
    exact = oracles.bptt(cell, XS, lambda t, y: (y - 0.1 * t).square().sum())
    learner = rtrl.BlockRTRL(cell, 2, **arguments)  # type: ignore[arg-type]

    def run(learner: rtrl.BlockRTRL, start: int, stop: int) -> None:
        for t in range(start, stop):
            learner.backward((learner.step(XS[t]) - 0.1 * t).square().sum())

    run(learner, 0, saved_at)
    into = rtrl.BlockRTRL(cell, 2, **{**arguments, **other})  # type: ignore[arg-type]
    name = next(iter(other))
    with pytest.raises(ConfigError, match=rf"has {name}=.*, and an open block; call sync\(\) before saving it"):
        into.load_state_dict(learner.state_dict())
    assert into.steps_taken == 0
    learner.sync(dormant=False)
    into.load_state_dict(learner.state_dict())
    for name in ("table", "mix", "h0"):
        assert_influences_equal({name: into.influence(name)}, {name: learner.influence(name)})
    saved = into.state_dict()
    into = rtrl.BlockRTRL(cell, 2, **{**arguments, **other})  # type: ignore[arg-type]
    into.load_state_dict(saved)  # once more, before its first step
    run(into, saved_at, len(XS))
    into.sync()
    assert_gradients_equal(gradients(cell), exact)


@pytest.mark.parametrize("make", ALL[3:])
def test_a_learner_is_moved_to_single_precision_and_back(make: Make) -> None:
    cell = Rows()
    learner = make(cell, 2)
    parameters = list(cell.parameters())
    along(learner, 0, 8)
    reference = copy.deepcopy(learner)
    reference.sync()
    learner.sync()
    assert learner.to(torch.float32) is learner and learner.state.dtype == torch.float32
    assert all(one is two for one, two in zip(cell.parameters(), parameters, strict=True))
    along(learner, 8, 12, torch.float32)
    learner.reset(FIRST)
    learner.to(torch.ones(1, dtype=F64))
    along(learner, 12, 15)
    learner.sync()
    along(reference, 8, 12)
    reference.reset(FIRST)
    along(reference, 12, 15)
    reference.sync()
    for name, expected in gradients(reference.cell).items():
        found = gradients(cell)[name]
        assert found.dtype == F64
        if name != "unused":
            torch.testing.assert_close(found - expected, torch.zeros_like(found), atol=2e-5, rtol=0)


@pytest.mark.parametrize("make", [*BLOCKS, pytest.param(functools.partial(SnAp, order=99), id="snap")])
def test_what_is_carried_is_what_it_was_in_the_other_dtype(make: Make) -> None:
    """Single to double precision is without loss: state and influence, and every gradient after it."""
    cell = Rows().float()
    learner = make(cell, 2)
    along(learner, 0, 7, torch.float32)
    learner.sync()
    cell.zero_grad()
    names = ["table", "mix", "h0"]
    before, state = {name: learner.influence(name).double() for name in names}, learner.state.double()
    cell.double()  # by hand: the learner follows
    learner.to(torch.float64)
    for name in names:
        assert torch.equal(learner.influence(name), before[name])
    assert torch.equal(learner.state, state)
    h = state.clone().requires_grad_()
    total, last = torch.zeros((), dtype=F64), h
    for t in range(7, 12):
        y, last, _ = cell(XS[t], last)
        total = total + (y - 0.1 * t).square().sum()
        learner.backward((learner.step(XS[t]) - 0.1 * t).square().sum())
    learner.sync()
    adjoint, *direct = torch.autograd.grad(total, [h, *cell.parameters()], materialize_grads=True)
    expected = {
        name: g + torch.einsum("bh,bhp->p", adjoint, before[name]).reshape(g.shape)
        for (name, _), g in zip(cell.named_parameters(), direct, strict=True)
    }
    assert_gradients_equal(gradients(cell), expected)


def test_what_cannot_be_moved_is_refused() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 0), 2, state=torch.full((2, 3), 1e300, dtype=F64))
    for dtype in (torch.int64, torch.complex64):
        with pytest.raises(ConfigError, match="real floating-point dtype"):
            learner.to(dtype)
    with pytest.raises(NonFiniteError, match=r"torch\.float32 cannot hold"):
        learner.to(torch.float32)
    assert learner.state.dtype == F64 and next(learner.cell.parameters()).dtype == F64
    learner.reset(state=torch.zeros(2, 3, dtype=F64))
    assert learner.to("cpu").state.device.type == "cpu"
    learner.step(torch.ones(2, 2, dtype=F64))
    next(learner.cell.parameters()).data += 1
    learner.cell.float()
    with pytest.raises(ParameterChangedError):
        learner.to(torch.float32)


def test_everything_works_with_gradients_switched_off_and_in_inference_mode() -> None:
    """Also where the learner is made and reset there, with a first state that is learned."""
    found = []
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        cell = Rows()
        with context():
            learner = rtrl.BlockRTRL(cell, 2, block=3, window=2)
        for t, x in enumerate(XS):
            with context():
                if t == 5:
                    learner.reset(FIRST)
                if t == 9:
                    learner = copy.deepcopy(learner)
                if t == 11:
                    learner.sync()
                    learner.to(torch.float64)
                    learner.load_state_dict(learner.state_dict())
                y = learner.step(x)
                learner.influence("mix") if t == 13 else None
            if t < 13:
                learner.backward((y - 0.1 * t).square().sum())
        with context():
            learner.sync()
        found.append(gradients(learner.cell))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in found[0])


@pytest.mark.parametrize("make", ALL[:3])
def test_steps_that_are_held_keep_their_dtype(make: Make) -> None:
    """Run again in another one, they would not be what they were."""
    learner = make(Rows(), 2)
    along(learner, 0, 4)
    learner.sync()
    with pytest.raises(ConfigError, match=r"taken in torch\.float64.*reset\(state=learner\.state, discard=True\)"):
        learner.to(torch.float32)
    along(learner.to("cpu"), 4, 5)  # the same dtype
    learner.sync()
    state = learner.state
    learner.reset(state=state, discard=True)
    learner.cell.zero_grad()
    along(learner.to(torch.float32), 7, 9, torch.float32)
    learner.sync()
    one_go = BPTT(copy.deepcopy(learner.cell), 2, state=state.float())
    along(one_go, 7, 9, torch.float32)
    one_go.sync()
    found, expected = gradients(learner.cell), gradients(one_go.cell)
    assert all(bool(value.any()) for name, value in found.items() if name != "h0")
    torch.testing.assert_close(found, expected)  # a sliding window adds in another order


def test_a_copy_audits_itself_and_its_own_parameters() -> None:
    learner = rtrl.BlockRTRL(Rows(), 2, block=2, audit=1)
    along(learner, 0, 5)
    other = copy.deepcopy(learner)
    other.sync()
    other.cell.table.requires_grad_(False)
    along(other, 6, 11)
    other.sync()
    assert learner.audits.count == 2 and other.audits.count == 6 and other.cell.mix.grad is not None


def test_a_learner_that_a_failure_left_half_changed_is_neither_saved_nor_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    learner = rtrl.BlockRTRL(Rows(), 2, block=2)
    along(learner, 0, 4)
    with monkeypatch.context() as broken:
        broken.setattr(CarriedInfluence, "add", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learner.sync()
    for do in (learner.state_dict, lambda: copy.deepcopy(learner), lambda: learner.to("cpu")):
        with pytest.raises(rtrl.errors.RTRLError, match="left half changed"):
            do()
    learner.reset(discard=True)
    copy.deepcopy(learner)


def test_a_cell_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        cell = Rows()
    with pytest.raises(ConfigError, match=r"made under torch\.inference_mode.*make it outside"):
        rtrl.BlockRTRL(cell, 2)


@pytest.mark.parametrize("kind", [CarriedInfluence, CarriedRows])
def test_an_interruption_while_a_single_step_is_added_leaves_the_learner_refusing(
    kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = {CarriedInfluence: lambda: rtrl.from_torch(nn.GRUCell(2, 3)), CarriedRows: lambda: rtrl.cells.MinGRU(2, 3)}
    learner, x = rtrl.BlockRTRL(make[kind](), 1), torch.ones(1, 2)

    def interrupted(self: Any) -> None:
        raise KeyboardInterrupt

    def take(steps: int) -> None:
        for _ in range(steps):
            learner.backward(learner.step(x).square().sum())
        learner.sync()

    take(6)  # the first go the general way
    with monkeypatch.context() as broken:
        broken.setattr(kind, "count_block", interrupted)
        with pytest.raises(KeyboardInterrupt):
            take(1)
    for do in (
        learner.sync,
        learner.state_dict,
        lambda: learner.influence(next(iter(dict(learner.cell.named_parameters())))),
    ):
        with pytest.raises(
            rtrl.errors.RTRLError, match="step 6 was not added as a whole, and what the learner carries"
        ):
            do()
    learner.reset(discard=True)
    take(2)
