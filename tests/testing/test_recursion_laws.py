"""Laws by recursion: published rules obey them and wrong versions do not; the law says which trace meets the loss."""

import functools
import math
from typing import Any

import published_rules as rules
import pytest
import torch
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import Ring, seeded
from published_rules import AdaptiveSpikes, EProp, KeRNL, LeakyRNN, SurrogateRNN
from torch import Tensor

import oracles
from rtrl.errors import ConfigError
from rtrl.learners import RFLO, DiagonalRTRL, SnAp
from rtrl.testing import Exact, LearnerSpec, Masked, Recursion, RecursionStep, Report, Stream, check_learner
from rtrl.testing.linearized_steps import linearized
from rtrl.testing.streams import dense_stream, normal

LEAKY = Stream(seeded(LeakyRNN(), 0), normal(1, 6, 2, 2), name="leaky")
SPIKES = Stream(seeded(AdaptiveSpikes(), 4), 0.5 * normal(2, 6, 2, 2), name="spikes")
RING = Stream(seeded(Ring(2, 4), 0), normal(0, 6, 2, 2), name="ring")


def report_of(make: Any, law: Any, stream: Stream, *checks: str) -> Report:
    spec = LearnerSpec(make, law=law, streams=[stream])
    return check_learner(spec, checks=checks or ["own streams"], on_fail="return")


def rflo(step: RecursionStep, trace: Tensor) -> Tensor:
    return 0.6 * trace + step.immediate


def diagonal(step: RecursionStep, trace: Tensor) -> Tensor:
    return step.dynamics.diagonal(dim1=1, dim2=2).unsqueeze(2) * trace + step.immediate


def kernl(step: RecursionStep, trace: Tensor) -> Tensor:
    decay = trace.new_tensor([math.exp(-rate) for rate in step.learner.gamma])
    return decay[:, None] * trace + step.immediate


def beta(step: RecursionStep, trace: Tensor) -> Tensor:
    return trace.new_tensor(step.learner.beta) @ trace


def eprop(step: RecursionStep, trace: Tensor) -> Tensor:
    """J within each unit, without the spikes that it sends to itself by a weight."""
    v, a = step.h.unbind(dim=2)
    psi = rules.pseudo(v - 0.5 * a)
    of_v, of_a = trace.unflatten(1, (2, 2)).unbind(dim=2)
    psi = psi.unsqueeze(2)
    carried = torch.stack([0.8 * of_v, psi * of_v + (0.9 - 0.5 * psi) * of_a], dim=2)
    return carried.flatten(1, 2) + step.immediate


RFLO_LAW = Recursion(rflo, before_loss=True)
DIAGONAL_LAW = Recursion(diagonal, before_loss=True)
KERNL_LAW = Recursion(kernl, beta, before_loss=True)
EPROP_LAW = Recursion(eprop, before_loss=True)
MASKED = Masked(before_loss=True)

RIGHT = [
    ("RFLO", rules.RFLO, RFLO_LAW, LEAKY),
    ("D-RTRL", rules.Diagonal, DIAGONAL_LAW, LEAKY),
    ("KeRNL", KeRNL, KERNL_LAW, LEAKY),
    ("e-prop", EProp, EPROP_LAW, SPIKES),
    ("SnAp-1", rules.SnAp, MASKED, RING),
]


@pytest.mark.parametrize(("make", "law", "stream"), [pytest.param(*case[1:], id=case[0]) for case in RIGHT])
def test_a_published_rule_obeys_its_law_and_not_the_exact_one(make: Any, law: Any, stream: Stream) -> None:
    assert report_of(make, law, stream).passed, str(report_of(make, law, stream))
    assert not report_of(make, Exact(), stream).passed


@pytest.mark.parametrize(("make", "law", "stream"), [pytest.param(*case[1:], id=case[0]) for case in RIGHT])
def test_a_rule_whose_loss_meets_the_other_influence_hears_which(make: Any, law: Any, stream: Stream) -> None:
    (failure,) = report_of(make, law.variant(), stream).failures
    assert "before_loss=True) holds" in failure.message


WRONG = [
    (rules.RFLOWithoutLeak, RFLO_LAW, LEAKY),
    (rules.RFLOBehind, RFLO_LAW, LEAKY),
    (rules.RFLOSlopeTwice, RFLO_LAW, LEAKY),
    (rules.Diagonal, RFLO_LAW, LEAKY),
    (rules.DiagonalOldSlope, DIAGONAL_LAW, LEAKY),
    (rules.RFLO, DIAGONAL_LAW, LEAKY),
    (rules.KeRNLTransposed, KERNL_LAW, LEAKY),
    (rules.KeRNLRateNotExponent, KERNL_LAW, LEAKY),
    (rules.EPropWithoutAdaptation, EPROP_LAW, SPIKES),
    (rules.EPropResets, EPROP_LAW, SPIKES),
    (rules.SnApMaskedLater, MASKED, RING),
    (rules.SnApMasksWholeUnits, MASKED, RING),
]


@pytest.mark.parametrize(("make", "law", "stream"), WRONG, ids=[make.__name__ for make, *_ in WRONG])
def test_a_wrong_version_of_a_rule_is_refused(make: Any, law: Any, stream: Stream) -> None:
    (failure,) = report_of(make, law, stream).failures
    assert failure.where.startswith("parameter")
    right = {"SnApMaskedLater": Masked()}
    if make.__name__ in right:
        assert report_of(make, right[make.__name__], stream).passed


def test_a_biased_rule_is_exact_on_its_surrogate_cell() -> None:
    """The forward pass is equal; the backward pass of the surrogate is what the rule follows."""
    surrogate = SurrogateRNN().double()
    surrogate.load_state_dict(LEAKY.cell.state_dict())
    stream = Stream(surrogate, LEAKY.xs, name="surrogate")
    assert report_of(rules.RFLO, Exact(scope="surrogate cells"), stream).passed
    assert not report_of(rules.RFLOWithoutLeak, Exact(), stream).passed
    assert not report_of(rules.RFLO, Exact(), LEAKY).passed


def test_the_learners_of_this_package_obey_recursions() -> None:
    resets = torch.zeros(6, 2, dtype=torch.bool)
    resets[3, 1] = True
    stream = Stream(LEAKY.cell, LEAKY.xs, name="with a reset", resets=resets)
    for make, carry in ((functools.partial(RFLO, leak=0.4), rflo), (DiagonalRTRL, diagonal)):
        assert report_of(make, Recursion(carry), stream, "own streams", "influence").passed
        assert not report_of(make, Recursion(carry, before_loss=True), stream).passed


@pytest.mark.parametrize("before_loss", [False, True])
def test_the_recursion_of_rtrl_is_exact_through_resets_and_changed_parameters(before_loss: bool) -> None:
    plain = dense_stream(0, steps=5, batch=3)
    resets = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]]).bool()
    offsets = [{}, {}, {"recurrent": torch.full((3, 3), 0.1).double()}, {}, {"head.bias": torch.ones(2).double()}]
    stream = Stream(plain.cell, plain.xs, name="all", resets=resets, offsets=offsets)
    law = Recursion(lambda step, trace: step.dynamics @ trace + step.immediate, before_loss=before_loss)
    assert_gradients_equal(law.reference(stream, None), Exact().reference(stream, None))
    assert_influences_equal(law.reference_influence(stream, None), Exact().reference_influence(stream, None))
    everything = Masked(lambda learner, name: torch.ones(3, _count(stream, name), dtype=torch.bool), before_loss)
    assert_gradients_equal(everything.reference(stream, None), Exact().reference(stream, None))


def _count(stream: Stream, name: str) -> int:
    return dict(stream.cell.named_parameters())[name].numel()


@pytest.mark.parametrize("before_loss", [False, True])
def test_a_learned_first_state_has_an_influence(before_loss: bool) -> None:
    class Learned(LeakyRNN):
        def __init__(self) -> None:
            super().__init__()
            self.start = torch.nn.Parameter(torch.empty(3))

        def init_state(self, batch_size: int) -> Tensor:
            return torch.tanh(self.start).expand(batch_size, -1)

    cell, resets = seeded(Learned(), 3), torch.tensor([[0, 0], [0, 0], [1, 0], [0, 0]]).bool()
    stream = Stream(cell, normal(1, 4, 2, 2), resets=resets)
    law = Recursion(lambda step, trace: step.dynamics @ trace + step.immediate, before_loss=before_loss)

    h, total = cell.init_state(2), torch.zeros(()).double()  # type: ignore[operator]
    for t in range(4):
        h = torch.where(resets[t][:, None], cell.init_state(2), h)  # type: ignore[operator]
        y, h = cell(stream.xs[t], h)
        total = total + stream.loss(t, y)
    names, values = zip(*cell.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, values), strict=True))
    assert_gradients_equal(law.reference(stream, None), expected)


def test_the_recursion_reaches_parameters_in_a_list() -> None:
    class Listed(LeakyRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            weights = [self.inward, self.recurrent, self.readout]
            h_next = torch.tanh(x @ self.weights[0].T + h @ weights[1].T)
            return h_next @ weights[2].T, h_next

    cell: Any = seeded(Listed(), 0)
    cell.weights = [cell.inward]
    found = linearized(Stream(cell, LEAKY.xs))
    assert bool(found.by_name(found.steps[1].immediate)["inward"].any())


def test_masked_before_the_loss_is_the_recursion_written_out() -> None:
    learner = rules.SnAp(RING.cell, 2)
    found = MASKED.reference(RING, learner)
    exact = oracles.dense_rtrl(RING.cell, RING.xs, RING.loss, mask={n: learner.mask(n) for n in found})
    assert max(float((found[n] - exact[n]).abs().max()) for n in found) > 1e-3
    influence = MASKED.reference_influence(RING, learner)
    for x in RING.xs:
        learner.step(x)
    expected = dict(zip(found, learner.influence.split(learner.sizes, dim=2), strict=True))
    assert_influences_equal(influence, expected)


BAD: list[tuple[Any, str]] = [
    (lambda: Recursion(3), r"carry must be a function carry\(step, trace\)"),  # type: ignore[arg-type]
    (lambda: Recursion(rflo, 3), "influence must be a function"),  # type: ignore[arg-type]
    (lambda: Recursion(rflo, before_loss=1), "before_loss must be True or False"),  # type: ignore[arg-type]
    (lambda: Masked(before_loss="no"), "before_loss must be True or False"),  # type: ignore[arg-type]
    (lambda: Recursion(lambda step, trace: trace[0]).reference(LEAKY, None), "must return a trace"),
    (lambda: Recursion(lambda step, trace: None).reference(LEAKY, None), "NoneType"),  # type: ignore[arg-type, return-value]
    (lambda: Masked(lambda *_: torch.ones(1), True).reference(LEAKY, None), "must be Boolean"),
]


@pytest.mark.parametrize(("make", "match"), BAD)
def test_bad_recursions_are_refused(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make()


def test_snap_of_this_package_masks_after_the_loss() -> None:
    make = functools.partial(SnAp, order=1)
    assert report_of(make, Masked(), RING).passed
    (failure,) = report_of(make, Masked(before_loss=True), RING).failures
    assert "Masked(before_loss=False) holds" in failure.message
