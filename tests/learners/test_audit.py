"""The learner audits itself: wrong derivatives are mended by another way, or refused; and it refuses what it stored
wrongly."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.strategies import normal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import rtrl
from rtrl._engine import taps
from rtrl._engine.recorded import RecordedStep
from rtrl._engine.unrolled import pull_back_unrolled
from rtrl._influence.store import ParameterInfluence
from rtrl.errors import AuditError, CellError, ConfigError, PerformanceWarning, RTRLError
from rtrl.learners import audit as auditing
from rtrl.learners import carried
from rtrl.profiling import MacCounter
from rtrl.testing.streams import dormant_stream

F64 = torch.float64
SLOW = pytest.mark.filterwarnings("ignore:the cell does not run under torch.func")


class OneUnit(nn.Module):
    """A cell with one unit and a bias; subclasses say how the state goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.carried(h) + x + self.bias
        return h, h

    def carried(self, h: Tensor) -> Tensor:
        raise NotImplementedError


class _Clamped(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad.clamp(-1, 1)


class ClampsTheGradient(OneUnit):
    def carried(self, h: Tensor) -> Tensor:
        return _Clamped.apply(h)  # type: ignore[no-any-return]


class HooksTheGradient(OneUnit):
    def carried(self, h: Tensor) -> Tensor:
        h = h * 1.0
        if h.requires_grad:
            h.register_hook(lambda grad: grad.clamp(-1, 1))
        return h


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad / len(grad)


class SharesTheGradient(OneUnit):
    """A gradient that is divided by the size of the batch."""

    def carried(self, h: Tensor) -> Tensor:
        return 0.5 * h + _Shared.apply(self.bias.expand_as(h))


def drive(learner: rtrl.BlockRTRL, steps: int, x: Tensor, scale: float = 1.0) -> None:
    for _ in range(steps):
        learner.backward(scale * learner.step(x).sum())
    learner.sync()


ONES = torch.ones(1, 1, dtype=F64)


@SLOW
@pytest.mark.parametrize("cell", [ClampsTheGradient, HooksTheGradient])
@pytest.mark.parametrize("block", [2, 4])
def test_a_backward_pass_that_is_not_linear_is_refused_before_anything_changes(
    cell: Callable[[], nn.Module], block: int
) -> None:
    learner = rtrl.BlockRTRL(cell(), 1, block=block, audit="first")
    with pytest.raises(AuditError, match=r"steps 0 … \d: the gradient of .* No way .* a backward pass that is not"):
        drive(learner, 4, ONES, scale=3.0)
    assert all(p.grad is None for p in learner.cell.parameters())
    with pytest.raises(AuditError):
        learner.sync()
    learner.reset(discard=True)
    assert learner.audits.count == 0


def plain_gradients(cell: nn.Module, xs: Tensor) -> dict[str, Tensor]:
    """By autograd alone, unrolled."""
    h, total = cell.init_state(xs.shape[1]), torch.zeros((), dtype=F64)
    for x in xs:
        y, h = cell(x, h)
        total = total + y.square().sum()
    return dict(zip(dict(cell.named_parameters()), torch.autograd.grad(total, list(cell.parameters())), strict=True))


def learn(learner: rtrl.BlockRTRL, xs: Tensor) -> dict[str, Tensor]:
    for x in xs:
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    return {name: p.grad for name, p in learner.cell.named_parameters() if p.grad is not None}


def assert_exact(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, value in right.items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-13)


@SLOW
def test_a_gradient_that_depends_on_the_batch_is_exact_step_by_step_or_refused() -> None:
    cell, xs = SharesTheGradient(), normal(1, 7, 1, 1)
    learner = rtrl.BlockRTRL(cell, 1, block=3, audit="first")
    with pytest.warns(PerformanceWarning, match="linearised in a slower way, which agrees: each step by itself"):
        found = learn(learner, xs)
    assert learner.audits.fallback is not None
    assert_exact(found, plain_gradients(cell, xs))
    learner = rtrl.BlockRTRL(SharesTheGradient(), 2, block=3, audit="first")
    with pytest.raises(AuditError, match="parameter 'bias'"):
        learn(learner, normal(1, 7, 2, 1))


def test_a_use_that_is_recorded_wrongly_is_mended_by_recording_none(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = taps._RULES[F.linear]

    def wrong(recorder: taps.TapRecorder, input: Tensor, *rest: Any) -> Any:
        out = rule(recorder, input, *rest)
        if out is not NotImplemented:
            recorder.by_output[-1] = [
                tap if tap.inputs is None else replace(tap, inputs=2 * tap.inputs) for tap in recorder.by_output[-1]
            ]
        return out

    monkeypatch.setitem(taps._RULES, F.linear, wrong)
    cell, xs = seeded(PlainRNN(2, 3), 1), normal(1, 7, 2, 2)
    right = plain_gradients(cell, xs)
    unaudited = learn(rtrl.BlockRTRL(cell, 2, block=3, audit="off"), xs)
    assert not torch.allclose(unaudited["inward.weight"], right["inward.weight"])
    cell.zero_grad()
    learner = rtrl.BlockRTRL(cell, 2, block=3, audit="first")
    with pytest.warns(PerformanceWarning, match="no use of a parameter recorded"):
        found = learn(learner, xs)
    assert_exact(found, right)


# ---------------------------------------------------------------------- what is stored


def applied_twice(catch_up: Callable[..., int]) -> Callable[..., int]:
    def wrong(history: Any, outdated: Any) -> int:
        catch_up(history, outdated)
        return catch_up(history, outdated)

    return wrong


def test_a_wrong_catch_up_is_refused_and_so_is_all_that_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = dormant_stream(0)
    monkeypatch.setattr(carried, "catch_up", applied_twice(carried.catch_up))
    learner = rtrl.BlockRTRL(stream.cell, stream.batch_size, block=2, audit=1)
    with pytest.raises(AuditError, match=r"the influence of dormant slices .* The fault is in the learner"):
        learn(learner, stream.xs)
    for refused in (learner.sync, learner.state_dict, learner.reset, lambda: learner.influence("cell.router.weight")):
        with pytest.raises(RTRLError, match=r"left half changed. Load a saved learner"):
            refused()
    assert all(p.grad is None for p in stream.cell.parameters())
    monkeypatch.undo()
    learner.reset(discard=True)
    found = []
    for one in (learner, rtrl.BlockRTRL(stream.cell, stream.batch_size, block=2)):
        stream.cell.zero_grad()
        found.append(learn(one, stream.xs[:7]))
    assert_exact(*found)


def test_an_influence_added_in_the_wrong_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    add = ParameterInfluence.add_products

    def wrong(self: ParameterInfluence, *rest: Any) -> None:
        add(self, *rest)
        self.values.copy_(self.values.roll(1, dims=1))

    monkeypatch.setattr(ParameterInfluence, "add_products", wrong)
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=3, audit="first")
    with pytest.raises(AuditError, match="after the block"):
        learn(learner, normal(1, 7, 2, 2))


@pytest.mark.parametrize("samples", [[True, False], [True, True]], ids=["some", "all"])
def test_a_reset_that_touches_other_samples_or_leaves_influence_is_refused(
    monkeypatch: pytest.MonkeyPatch, samples: list[bool]
) -> None:
    clear = ParameterInfluence.clear_samples

    def wrong(self: ParameterInfluence, which: Tensor) -> None:
        if not bool(which.all()):
            clear(self, which)
            self.values.mul_(1 + 1e-9)

    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=3, audit="first")
    learn(learner, normal(1, 4, 2, 2))
    monkeypatch.setattr(ParameterInfluence, "clear_samples", wrong)
    with pytest.raises(AuditError, match="a reset left influence"):
        learner.reset(torch.tensor(samples))


def test_a_refused_block_leaves_the_way_of_linearising_as_it_was() -> None:
    class Mended(OneUnit):
        clamps = True

        def carried(self, h: Tensor) -> Tensor:
            return _Clamped.apply(h) if self.clamps else 0.5 * h

    learner = rtrl.BlockRTRL(Mended(), 1, block=2, audit="first")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PerformanceWarning)
        with pytest.raises(AuditError):
            drive(learner, 4, ONES, scale=3.0)
        learner.reset(discard=True)
        learner.cell.clamps = False  # type: ignore[assignment]
        drive(learner, 2, ONES)
    assert learner.audits.count == 1 and learner.audits.fallback is None


@pytest.mark.parametrize(("change", "refused"), [(1e-9, False), (1e-3, True), (float("nan"), True)])
@pytest.mark.parametrize("name", ["recurrent", "head.bias"])
def test_the_worst_error_is_that_of_any_parameter(
    monkeypatch: pytest.MonkeyPatch, name: str, change: float, refused: bool
) -> None:
    pull_back = auditing.pull_back_result

    def wrong(*args: Any) -> Any:
        block, immediate = pull_back(*args)
        parameters = {each: g * (1 + change) if each == name else g for each, g in block.parameters.items()}
        return replace(block, parameters=parameters), immediate

    monkeypatch.setattr(auditing, "pull_back_result", wrong)
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=3, audit="first")
    for x in normal(1, 3, 2, 2):
        learner.backward(learner.step(x).square().sum())
    if refused:
        with pytest.raises(AuditError, match=f"'{name}' differs"):
            learner.sync()
    else:
        learner.sync()
        assert learner.audits.worst_error == pytest.approx(change, rel=0.01)


# ---------------------------------------------------------------------- when, and at what price


@pytest.mark.parametrize(("audit", "count"), [("off", 0), ("first", 2), (2, 6), (1, 10), (1000, 2)])
def test_which_blocks_are_audited(audit: Any, count: int) -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=3, audit=audit)
    learner.step(normal(0, 2, 2))
    learner.sync()  # a block of one step, of another kind
    learn(learner, normal(1, 27, 2, 2))
    assert learner.audits.count == count
    assert learner.audits.worst_error < 1e-13


def test_the_first_losses_are_audited_though_blocks_came_before() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=3, audit="first")
    for x in normal(0, 6, 2, 2):
        learner.step(x)
    learner.sync()
    assert learner.audits.count == 1
    learn(learner, normal(1, 6, 2, 2))
    assert learner.audits.count == 2


@pytest.mark.parametrize("audit", [0, -1, "always", 1.5, None, True])
def test_an_unknown_mode_is_refused(audit: Any) -> None:
    with pytest.raises(ConfigError, match="audit"):
        rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, audit=audit)


def test_an_audit_changes_nothing_and_draws_from_no_generator_of_the_user() -> None:
    xs, found = normal(1, 20, 2, 2), []
    for audit in ("off", 1):
        learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, block=3, audit=audit)  # type: ignore[arg-type]
        torch.manual_seed(3)
        found.append((learn(learner, xs), torch.rand(1), learner.state_dict()))
    (first, draw, saved), (second, other_draw, other_saved) = found
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(draw, other_draw)
    assert str(saved) == str(other_saved)


@pytest.mark.parametrize("gain", [0.3, 1.0, 4.0])
def test_rounding_in_single_precision_is_no_mismatch(gain: float) -> None:
    """Contracting, critical and chaotic units, in blocks long enough for rounding errors to grow."""
    cell = rtrl.cells.from_torch(nn.RNNCell(1, 12))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in cell.parameters():
            p.copy_(torch.randn_like(p) * gain / 12**0.5)
    learner = rtrl.BlockRTRL(cell, 2, block=100, audit=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PerformanceWarning)
        learn(learner, normal(1, 300, 2, 1).float())
    assert learner.audits.count == 3


def test_an_audit_can_be_counted() -> None:
    """All that it does has a count of multiply-adds; audits and witnesses add to it."""
    counts = []
    for audit in ("off", 1):
        stream = dormant_stream(0)
        learner = rtrl.BlockRTRL(stream.cell, stream.batch_size, block=2, window=3, audit=audit)  # type: ignore[arg-type]
        with MacCounter() as counter:
            learn(learner, stream.xs[:14])
            learner.reset(torch.tensor([True, False]))
            learner.influence("cell.expert_up")
        counts.append(counter.macs)
    assert 0 < counts[0] < counts[1]


class ChoosesAgain(nn.Module):
    """Each call of it declares another slice as active, though it computes the same; it takes no replay."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 1, dtype=F64))
        self.calls = 0

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        self.calls += 1
        h = torch.tanh(0.5 * h + x)
        index = torch.full((len(x), 1), self.calls % 2)
        return h, h, rtrl.Sparsity(active={"weight": index})


def test_another_choice_without_replay_is_refused_and_not_a_crash() -> None:
    cell = ChoosesAgain()
    step = RecordedStep(ONES, cell.init_state(1), cell(ONES, cell.init_state(1))[2], [], 0)
    with pytest.raises(CellError, match="step 0: run a second time, the cell makes other choices"):
        pull_back_unrolled(cell, dict(cell.named_parameters()), [step], torch.tanh(ONES), ONES)
