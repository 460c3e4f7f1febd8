"""Bad input to a baseline raises an error of the package and changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, delivered, differ, normal, squares
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
from rtrl import learners
from rtrl.errors import CellError, ConfigError, LossError, NonFiniteError, ParameterChangedError, RTRLError, ShapeError
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, SnAp

NAN = float("nan")


def cell() -> PlainRNN:
    made = seeded(PlainRNN(2, 3), 0)
    assert isinstance(made, PlainRNN)
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TBPTT(cell(), 2, 0), "horizon must be a positive integer, got 0"),
        (lambda: TBPTT(cell(), 2, 2.0), "horizon"),  # type: ignore[arg-type]
        (lambda: TBPTT(cell(), 2, True), "horizon"),
        (lambda: SnAp(cell(), 2, 0), "order must be a positive integer, got 0"),
        (lambda: RFLO(cell(), 2, 1.5), "leak must be a number in 0 … 1"),
        (lambda: RFLO(cell(), 2, NAN), "leak"),
        (lambda: UORO(cell(), 2, generator=3), "generator"),  # type: ignore[arg-type]
        (lambda: BPTT(cell(), 0), "batch_size must be a positive integer"),
        (lambda: BPTT("cell", 2), "cell must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: DenseRTRL(nn.Linear(2, 2), 2), "has no init_state"),
        (lambda: DenseRTRL(cell().requires_grad_(False), 2), "no parameter that requires a gradient"),
        (lambda: DenseRTRL(cell(), 2).influence("nobody"), "no trainable parameter is called 'nobody'"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


STEP_ERRORS: list[tuple[Callable[[Any], Any], type[RTRLError]]] = [
    (lambda learner: learner.step(normal(0, 3, 2)), ShapeError),
    (lambda learner: learner.step(normal(0, 2, 7)), ShapeError),
    (lambda learner: learner.step(normal(0, 2, 2).float()), ShapeError),
    (lambda learner: learner.step(None), ShapeError),
    (lambda learner: learner.step(normal(0, 2, 2) * NAN), NonFiniteError),
    (lambda learner: learner.backward(torch.ones((), requires_grad=True)), LossError),
    (lambda learner: learner.backward(1.0), LossError),
    (lambda learner: learner.reset(torch.ones(3, dtype=torch.bool)), ShapeError),
    (lambda learner: learner.reset(torch.ones(2)), ShapeError),
    (lambda learner: learner.reset(state=normal(0, 2, 4)), ShapeError),
]


@pytest.mark.parametrize("make", BASELINES)
def test_nothing_has_changed_after_an_error(make: Callable[..., Any]) -> None:
    xs, made = normal(4, 6, 2, 2), cell()
    expected = delivered(make(made, 2), xs, squares)
    learner = make(made, 2)
    for p in made.parameters():
        p.grad = None
    old: Tensor | None = None
    for t, x in enumerate(xs):
        y = learner.step(x)
        for attack, error in STEP_ERRORS:
            with pytest.raises(error):
                attack(learner)
        if old is not None:
            with pytest.raises(LossError):
                learner.backward(old.sum())
            with pytest.raises(LossError, match="closed"):
                old.sum().backward()
        with pytest.raises(LossError, match="scalar"):
            learner.backward(y)
        loss = squares(t, y)
        learner.backward(loss)
        with pytest.raises(LossError, match="already added"):
            learner.backward(loss)
        assert learner.steps_taken == t + 1
        old = y
    learner.sync()
    assert_gradients_equal(gradients(made), expected)
    with pytest.raises(LossError, match="no step that can take a loss"):
        learner.backward(squares(5, y))


@pytest.mark.parametrize("make", BASELINES)
def test_each_loss_is_delivered_once_and_grad_accumulates(make: Callable[..., Any]) -> None:
    xs, made = normal(4, 6, 2, 2), cell()
    often = delivered(make(made, 2), xs, squares, frozenset(range(6)))
    assert_gradients_equal(often, delivered(make(made, 2), xs, squares))
    learner = make(made, 2)
    once = delivered(learner, xs, squares)
    learner.sync()
    assert_gradients_equal(gradients(made), once)


@pytest.mark.parametrize("make", BASELINES)
def test_samples_that_restart_forget(make: Callable[..., Any]) -> None:
    """A reset cuts the past of its samples alone: after a reset of all, a loss contributes as in a new stream."""
    xs, made = normal(4, 3, 2, 2), cell()
    learner = make(made, 2)
    for x in normal(9, 4, 2, 2):
        learner.step(x)
    learner.reset(torch.tensor([True, False]))
    learner.reset(torch.tensor([False, True]))
    assert torch.equal(learner.state, made.init_state(2))
    found = delivered(learner, xs, squares)
    if not isinstance(learner, UORO):
        assert_gradients_equal(found, delivered(make(made, 2), xs, squares))
    if isinstance(learner, BPTT | DenseRTRL):
        assert_gradients_equal(found, oracles.bptt(made, xs, squares))


@pytest.mark.parametrize("make", BASELINES)
def test_a_cell_with_another_parameter_is_refused(make: Callable[..., Any]) -> None:
    made = cell()
    learner = make(made, 2)
    learner.step(normal(0, 2, 2))
    made.recurrent = nn.Parameter(made.recurrent.detach().clone())
    with pytest.raises(ParameterChangedError):
        learner.step(normal(0, 2, 2))


class Mixing(PlainRNN):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h_next = super().forward(x, h)
        return y, h_next - 0.5 * h_next.mean(dim=0, keepdim=True)


def test_samples_that_interact_are_found_where_samples_are_run_alone() -> None:
    learner = DenseRTRL(seeded(Mixing(2, 3), 0), 2)
    learner.step(normal(0, 2, 2))
    with pytest.raises(CellError, match="samples do not interact"):
        learner.sync()


def test_a_plain_backward_counts_and_other_parameters_get_their_gradient() -> None:
    made, scale = cell(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    learner = DenseRTRL(made, 2)
    (scale * learner.step(normal(0, 2, 2)).sum()).backward()
    learner.sync()
    by_itself = gradients(made)
    assert scale.grad is not None
    again = delivered(DenseRTRL(made, 2), normal(0, 1, 2, 2), lambda t, y: 2.0 * y.sum())
    assert not differ(by_itself, again)


def test_public_names_say_what_they_are_and_by_which_law() -> None:
    for name in set(learners.__all__) - {"Learner", "Audits", "audits_in_this_process"}:
        text = getattr(learners, name).__doc__
        assert all(f"{part}:" in text for part in ("Equation", "Law", "Args", "Raises", "Cost", "Source")), name
