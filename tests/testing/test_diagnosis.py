"""Mistakes that a report names: in the failing sample, two at once, by parameter; and what it leaves unnamed."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import third_party
import torch
from helpers.toy_cells import Leaky, seeded
from published_rules import LeakyRNN
from third_party import Textbook
from torch import Tensor, nn

from rtrl.testing import Failure, LearnerSpec, ParameterVerdict, Report, Stream, bound_checks, check_learner
from rtrl.testing.learner_checks import diagnosis
from rtrl.testing.report_table import CheckResult
from rtrl.testing.streams import dense_stream, normal, scheduled_stream

DENSE = dense_stream(0, steps=7, batch=3)
SPARSE = scheduled_stream(0, steps=7)
LEAKY = Stream(seeded(Leaky(2, 3, 0.4), 0), normal(1, 7, 2, 2), name="leaky units")
LEAKY_RNN = Stream(seeded(LeakyRNN(), 0), normal(1, 7, 2, 2), name="leaky tanh units")


class Wrong(Textbook):
    """Textbook RTRL with hooks for mistakes."""

    def step(self, x: Any) -> Any:
        self.sparsity = None
        with torch.no_grad():
            out = self.cell(x, self.h)
            self.sparsity = out[2] if len(out) == 3 else None
        return super().step(x)

    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return dynamics

    def advanced(self, b: int, influence: Tensor) -> Tensor:
        rows = [self.pulled(value) for value in self.h_next[b].flatten()]
        dynamics = torch.stack([by_state[b] for by_state, _ in rows])
        return self.jacobian(b, dynamics) @ influence + torch.stack([by_theta for _, by_theta in rows])

    def direct(self, direct: Tensor) -> Tensor:
        return direct

    def through(self, b: int, through: Tensor) -> Tensor:
        return through

    def backward(self, loss: Tensor) -> None:
        adjoint, direct = self.pulled(loss)
        self.gradient = self.gradient + self.direct(direct)
        for b, influence in enumerate(self.met):
            self.gradient = self.gradient + self.through(b, adjoint[b] @ influence)

    def reset(self, samples: Tensor) -> None:
        fresh = self.cell.init_state(self.batch_size).detach()
        self.h = torch.where(samples.reshape(-1, 1), fresh, self.h)
        self.influence = [torch.zeros_like(s) if samples[b] else s for b, s in enumerate(self.influence)]

    def entries(self, active: Any) -> list[Any]:
        return [1.0] * self.batch_size

    def rows(self, b: int, chosen: Tensor) -> Tensor:
        """The entries of the state in some rows of a sample."""
        n, size = self.h.shape[1], self.h[0].numel()
        return torch.isin(torch.arange(size) // (size // n), chosen[b])


class OwnColumnsDropped(Wrong):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        written, read = (self.rows(b, index) for index in (self.sparsity.writes, self.sparsity.reads))
        return torch.where(written[:, None] & (written & ~read)[None], 0.0, dynamics)


class ReadColumnsDropped(Wrong):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        written = self.rows(b, self.sparsity.writes)
        return torch.where(written[:, None] & ~written[None], 0.0, dynamics)


class CopiedRowsLost(Wrong):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return dynamics * self.rows(b, self.sparsity.writes)[:, None]


class DecayIsIdentity(Wrong):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return torch.eye(len(dynamics)).to(dynamics)


class DecayAddedToIdentity(Wrong):
    """The decay 0.6 is taken as 1."""

    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return dynamics + 0.4 * torch.eye(len(dynamics))


class CarryShrinks(Wrong):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return 0.9 * dynamics


class HalfDirect(Wrong):
    def direct(self, direct: Tensor) -> Tensor:
        return 0.5 * direct


class TripleThrough(Wrong):
    def through(self, b: int, through: Tensor) -> Tensor:
        return 3 * through


class SampleOneBehind(Wrong):
    def met_by_the_adjoint(self, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        if self.batch_size == 1:  # knows its sample by the input
            return after if self.is_second else before
        return [s if b == 1 else r for b, (r, s) in enumerate(zip(before, after, strict=True))]

    def step(self, x: Any) -> Any:
        self.is_second = bool(DENSE.xs[:, 1].eq(x[0]).all(dim=1).any())
        return super().step(x)


class Averaged(Wrong):
    def direct(self, direct: Tensor) -> Tensor:
        return direct / self.batch_size

    def through(self, b: int, through: Tensor) -> Tensor:
        return through / self.batch_size


class BehindAndAveraged(Averaged):
    def met_by_the_adjoint(self, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        return after


class TransposedAndAveraged(Averaged):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return dynamics.T


class TransposedWithoutDirect(Wrong):
    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return dynamics.T

    def direct(self, direct: Tensor) -> Tensor:
        return 0 * direct


class BehindAndDoubled(Wrong):
    def met_by_the_adjoint(self, before: list[Tensor], after: list[Tensor]) -> list[Tensor]:
        return after

    def direct(self, direct: Tensor) -> Tensor:
        return 2 * direct

    def through(self, b: int, through: Tensor) -> Tensor:
        return 2 * through


class ResetKeeps(Wrong):
    def reset(self, samples: Tensor) -> None:
        kept = self.influence
        super().reset(samples)
        self.influence = kept


class InfluenceInSingle(Wrong):
    def advanced(self, b: int, influence: Tensor) -> Tensor:
        return super().advanced(b, influence).float().double()


class DeliveredInSingle(Wrong):
    def sync(self) -> None:
        self.gradient = self.gradient.float().double()
        super().sync()


def reset_stream() -> Stream:
    resets = torch.zeros(7, 3, dtype=torch.bool)
    resets[3, 0] = resets[5, 2] = True
    return Stream(DENSE.cell, DENSE.xs, name="with resets", resets=resets)


class LearnedStart(LeakyRNN):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.empty(3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.start.expand(batch_size, -1)


LEARNED_START = Stream(seeded(LearnedStart(), 0), normal(1, 6, 2, 2), name="learned start")


def report_of(make: Any, stream: Stream) -> Report:
    spec = make if isinstance(make, LearnerSpec) else LearnerSpec(make, streams=[stream])
    return check_learner(spec, checks=["own streams"], on_fail="return")


NAMED: list[tuple[Any, Stream, str]] = [
    (OwnColumnsDropped, SPARSE, "the columns of the rows written were dropped where they are not read"),
    (ReadColumnsDropped, SPARSE, "the columns of the rows read were dropped where they are not written"),
    (CopiedRowsLost, SPARSE, "rows that are not written lost their influence"),
    (DecayIsIdentity, LEAKY, "a decay were taken as the identity"),
    (DecayAddedToIdentity, LEAKY_RNN, "every diagonal entry of the dynamics Jacobian were off by 0.4: a decay"),
    (CarryShrinks, DENSE, "the influence were multiplied by 0.9 whenever it is carried"),
    (HalfDirect, DENSE, "the loss's direct path were multiplied by 0.5"),
    (TripleThrough, DENSE, "the part through the state were multiplied by 3"),
    (SampleOneBehind, DENSE, "off by one step (in sample 1 alone)"),
    (Averaged, DENSE, "samples were averaged, not summed"),
    (BehindAndAveraged, DENSE, "off by one step, and samples were averaged, not summed"),
    (TransposedAndAveraged, DENSE, "Jacobian were transposed, and samples were averaged, not summed"),
    (TransposedWithoutDirect, DENSE, "the loss's direct path to the parameters were dropped, and the dynamics Jac"),
    (BehindAndDoubled, DENSE, "off by one step, and the whole gradient were multiplied by 2"),
    (ResetKeeps, reset_stream(), "a reset kept the influence"),
    (Wrong, LEARNED_START, "the learned first state had no influence"),
    (InfluenceInSingle, DENSE, "something were computed in float32"),
    (DeliveredInSingle, DENSE, "the gradient were in float32"),
]


@pytest.mark.parametrize(("make", "stream", "words"), NAMED, ids=[make.__name__ for make, *_ in NAMED])
def test_a_mistake_is_named(make: Any, stream: Stream, words: str) -> None:
    (failure,) = report_of(make, stream).failures
    assert f"it looks as if {words}" in failure.message or words in failure.message.partition("looks as if")[2]


@pytest.mark.parametrize("stream", [DENSE, SPARSE, LEAKY, LEAKY_RNN, reset_stream()], ids=lambda stream: stream.name)
def test_the_learner_without_a_mistake_is_right(stream: Stream) -> None:
    assert report_of(Wrong, stream).passed


Change = Callable[[dict[str, Tensor]], None]


def changed(change: Change) -> LearnerSpec:
    """BPTT, with its gradients changed."""

    def gradients(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        found = third_party.backpropagation(cell, xs, loss)
        change(found)
        return found

    return LearnerSpec(gradients=gradients, streams=[DENSE], name="changed")


def draw(seed: int, value: Tensor) -> Tensor:
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(seed), dtype=value.dtype)


def _noise(found: dict[str, Tensor]) -> None:
    found["recurrent"] += 1e-2 * draw(0, found["recurrent"])


def _one_entry(found: dict[str, Tensor]) -> None:
    found["recurrent"][1, 2] += 1e-8


def _one_row_doubled(found: dict[str, Tensor]) -> None:
    found["inward.weight"][1] *= 2


def _constant_added(found: dict[str, Tensor]) -> None:
    for value in found.values():
        value += 0.1


def _clipped(found: dict[str, Tensor]) -> None:
    for value in found.values():
        value.clamp_(-0.5, 0.5)


@pytest.mark.parametrize("change", [_noise, _one_entry, _one_row_doubled, _constant_added, _clipped])
def test_what_is_none_of_the_mistakes_is_not_named(change: Change) -> None:
    (failure,) = report_of(changed(change), DENSE).failures
    assert "looks as if" not in failure.message


def test_a_factor_close_to_one_is_not_taken_for_float32() -> None:
    def nearly(found: dict[str, Tensor]) -> None:
        for value in found.values():
            value *= 1 + 1e-7

    (failure,) = report_of(changed(nearly), DENSE).failures
    assert "the whole gradient were multiplied by 1.0000001" in failure.message
    assert all(p.factor == pytest.approx(1 + 1e-7, abs=1e-12) for p in failure.parameters if p.step is not None)


def test_each_parameter_may_have_a_mistake_of_its_own() -> None:
    class Mixed(Wrong):
        """Transposed for one parameter, doubled for two others."""

        def sync(self) -> None:
            transposed = TransposedSibling.gradients
            sizes = [p.numel() for p in self.theta]
            parts = dict(zip(self.names, self.gradient.split(sizes), strict=True))
            parts["recurrent"] = transposed["recurrent"].flatten()
            parts["head.bias"], parts["head.weight"] = 2 * parts["head.bias"], 2 * parts["head.weight"]
            self.gradient = torch.cat(list(parts.values()))
            super().sync()

        def backward(self, loss: Tensor) -> None:
            super().backward(loss)
            self.sibling.backward(loss)

        def step(self, x: Any) -> Any:
            if not self.taken:
                self.sibling = TransposedSibling(self.cell, self.batch_size)
            y = super().step(x)
            self.sibling.follow(self)
            return y

    (failure,) = report_of(Mixed, DENSE).failures
    assert "for recurrent, the dynamics Jacobian were transposed" in failure.message
    assert "for head.weight and head.bias, the whole gradient were multiplied by 2" in failure.message


class TransposedSibling(Wrong):
    """Follows another learner's steps with a transposed Jacobian."""

    gradients: Any = None

    def jacobian(self, b: int, dynamics: Tensor) -> Tensor:
        return dynamics.T

    def follow(self, other: Wrong) -> None:
        self.before, self.h_next, self.h = other.before, other.h_next, other.h
        met = self.influence
        self.influence = [self.advanced(b, s) for b, s in enumerate(met)]
        self.met = met

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        parts = self.gradient.split([p.numel() for p in self.theta])
        type(self).gradients = dict(zip(self.names, parts, strict=True))


def test_a_cell_that_cannot_be_linearised_gets_a_verdict_without_a_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: Stream) -> None:
        raise ValueError("not this one")

    monkeypatch.setattr(diagnosis, "linearized", refuse)
    (failure,) = report_of(HalfDirect, DENSE).failures
    assert "the gradient is not what BPTT gives" in failure.message
    assert "looks as if" not in failure.message


# ---------------------------------------------------------------- the verdict per parameter


def test_every_parameter_has_a_verdict() -> None:
    def change(found: dict[str, Tensor]) -> None:
        found["recurrent"] *= 0
        found["head.bias"] *= 2
        found["inward.weight"][1, 0] += 1.0

    (failure,) = report_of(changed(change), DENSE).failures
    verdicts = {p.name: p for p in failure.parameters}
    assert set(verdicts) == {name for name, _ in DENSE.cell.named_parameters()}
    assert (verdicts["recurrent"].factor, verdicts["head.bias"].factor) == (0.0, pytest.approx(2.0, abs=1e-12))
    assert verdicts["inward.weight"].step == 0
    assert verdicts["inward.weight"].factor is None
    assert verdicts["recurrent"].error == pytest.approx(1.0)
    right = [p.name for p in failure.parameters if p.step is None]
    assert right == ["inward.bias", "head.weight"]
    assert str(failure).splitlines()[-1] == "     right: inward.bias, head.weight"
    assert "head.bias from step 0 on (error 1, × 2 everywhere)" in str(failure)


def test_each_parameter_turns_wrong_at_its_own_step() -> None:
    def later(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        found = third_party.backpropagation(cell, xs, loss)
        if len(xs) > 2:
            found["recurrent"] *= 2
        if len(xs) > 4:
            found["head.bias"] *= 3
        return found

    (failure,) = report_of(LearnerSpec(gradients=later, streams=[DENSE]), DENSE).failures
    assert {p.name: p.step for p in failure.parameters if p.step is not None} == {"recurrent": 2, "head.bias": 4}
    assert failure.step == 2


def test_the_first_wrong_steps_of_a_long_stream_are_found_by_halving() -> None:
    long = dense_stream(0, steps=60, batch=1)

    def later(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        found = third_party.backpropagation(cell, xs, loss)
        for name, step in (("recurrent", 17), ("head.bias", 43)):
            found[name] *= 1 + (len(xs) > step)
        return found

    (failure,) = report_of(LearnerSpec(gradients=later, streams=[long]), long).failures
    assert {p.name: p.step for p in failure.parameters if p.step is not None} == {"recurrent": 17, "head.bias": 43}


def test_many_parameters_are_counted() -> None:
    failed = [ParameterVerdict(f"w{i}", 0.5, i) for i in range(9)]
    text = str(Failure("dense cell", "wrong", parameters=(*failed, ParameterVerdict("b", 0.0))))
    assert text.splitlines()[1].endswith("w5 from step 5 on (error 0.5), and 3 more")
    assert text.splitlines()[2] == "     right: b"


def test_verdicts_are_valid_json_even_for_nan() -> None:
    def change(found: dict[str, Tensor]) -> None:
        found["recurrent"] *= torch.nan
        found["head.bias"] *= 2

    spec = changed(change)
    (check,) = [check for check in bound_checks([spec]) if check.name == "own streams"]
    record = CheckResult(check, check.report()).record()
    (failure,) = json.loads(json.dumps(record, allow_nan=False))["failures"]
    verdicts = {verdict.pop("name"): verdict for verdict in failure["parameters"]}
    assert verdicts["recurrent"] == {"error": None, "step": 0, "factor": None}
    assert verdicts["head.weight"] == {"error": pytest.approx(0, abs=1e-12), "step": None, "factor": None}
    assert verdicts["head.bias"]["factor"] == pytest.approx(2)


def test_a_learner_of_one_batch_size_is_not_tried_alone() -> None:
    tried = []

    def averaged(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        tried.append(xs.shape[1])
        return {name: g / xs.shape[1] for name, g in third_party.backpropagation(cell, xs, loss).items()}

    spec = LearnerSpec(gradients=averaged, streams=[DENSE], batch=3)
    (failure,) = check_learner(spec, checks=["own streams"], on_fail="return").failures
    assert set(tried) == {3}
    assert "each sample alone" not in failure.message
    assert "samples were averaged" in failure.message


def test_a_sample_alone_that_raises_proves_nothing() -> None:
    def averaged(cell: nn.Module, xs: Tensor, loss: Any) -> dict[str, Tensor]:
        if xs.shape[1] == 1:
            raise ValueError("a batch of three, please")
        return {name: g / xs.shape[1] for name, g in third_party.backpropagation(cell, xs, loss).items()}

    (failure,) = report_of(LearnerSpec(gradients=averaged, streams=[DENSE]), DENSE).failures
    assert failure.sample is None
    assert "each sample alone" not in failure.message
