"""What is wrong in the input is said, by the same words from every oracle."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cells import F64, make_case
from torch import Tensor, nn

import oracles

ORACLES = [oracles.bptt, oracles.dense_rtrl, oracles.finite_difference]
CASE = make_case("tanh", steps=3, batch=2, size=2)


class Fixed(nn.Module):
    """A cell that returns what it is told to."""

    def __init__(self, out: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.w, self.out = nn.Parameter(torch.ones(1, dtype=F64)), out

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.out(x, h * self.w)


BAD: list[tuple[str, dict[str, Any]]] = [
    ("xs must", {"xs": torch.zeros(3, dtype=F64)}),
    ("xs must", {"xs": torch.zeros(0, 2, 2, dtype=F64)}),
    ("xs must", {"xs": torch.zeros(3, 0, 2, dtype=F64)}),
    ("xs must", {"xs": [1.0]}),
    ("state", {"h0": torch.zeros(3, 2, dtype=F64)}),
    ("state", {"h0": torch.zeros(2, dtype=F64)}),
    ("state", {"h0": torch.zeros(2, 2, dtype=torch.long)}),
    ("resets", {"resets": torch.zeros(3, 2)}),
    ("resets", {"resets": torch.zeros(2, 3, dtype=torch.bool)}),
    ("offsets", {"offsets": [{}]}),
    ("offsets", {"offsets": [{}, {"nothing": torch.zeros(1)}, {}]}),
    ("offsets", {"offsets": [{}, {}, {"bias": torch.zeros(1, 2)}]}),
    ("offsets", {"offsets": [{}, {}, {"frozen": torch.zeros(())}]}),
    ("loss_fn", {"loss_fn": lambda t, y: y}),
    ("loss_fn", {"loss_fn": lambda t, y: 1.0}),
    ("no parameter", {"cell": nn.Identity()}),
    ("must return", {"cell": Fixed(lambda x, h: h)}),
    ("must return", {"cell": Fixed(lambda x, h: (h, h, None, None))}),
    ("next state", {"cell": Fixed(lambda x, h: (h, h[:1]))}),
    ("next state", {"cell": Fixed(lambda x, h: (h, None))}),
]


@pytest.mark.parametrize("oracle", ORACLES)
@pytest.mark.parametrize(("match", "changes"), BAD)
def test_bad_input(oracle: Any, match: str, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"cell": CASE.cell, "xs": CASE.xs, "loss_fn": CASE.loss_fn}
    with pytest.raises(ValueError, match=match):
        oracle(**{**good, **changes})


def test_samples_that_meet_in_the_state_have_no_influence_each() -> None:
    cell = Fixed(lambda x, h: (h, torch.tanh(h + h.mean(0))))
    with pytest.raises(ValueError, match="of sample 0 depends on another sample"):
        oracles.dense_rtrl(cell, CASE.xs, lambda t, y: y.sum())


@pytest.mark.parametrize("oracle", ORACLES)
def test_a_loss_without_a_gradient_earns_nothing(oracle: Any) -> None:
    gradients = oracle(CASE.cell, CASE.xs, lambda t, y: torch.tensor(1.0, dtype=F64))
    assert set(gradients) == {"recurrent", "input", "bias", "readout", "idle"}
    assert not any(g.any() for g in gradients.values())


def test_a_state_that_does_not_depend_on_anything() -> None:
    cell = Fixed(lambda x, h: (h + h.detach() + 1, torch.ones(2, 2, dtype=F64)))
    gradients, influences = oracles.dense_rtrl(cell, CASE.xs, lambda t, y: y.sum(), return_influence=True)
    assert gradients["w"].item() == 8.0  # steps 1 and 2 each see w times four ones
    assert not any(s["w"].any() for s in influences)


BAD_DIFFERENCE: list[tuple[str, dict[str, Any]]] = [
    ("float64", {"xs": CASE.xs.float()}),
    ("float64", {"h0": torch.zeros(2, 2)}),
    ("float64", {"cell": make_case("tanh", size=2).cell.float()}),
    ("method", {"method": "forward"}),
    ("step must be a positive", {"step": 0.0}),
    ("direction", {"direction": {"frozen": torch.ones((), dtype=F64)}}),
    ("direction", {"direction": {"bias": torch.ones(3, dtype=F64)}}),
    ("direction", {"direction": {}}),
    ("direction", {"direction": {"bias": torch.zeros(2, dtype=F64)}}),
    ("direction", {"direction": {"bias": torch.tensor([1.0, torch.inf], dtype=F64)}}),
]


@pytest.mark.parametrize(("match", "changes"), BAD_DIFFERENCE)
def test_bad_difference(match: str, changes: dict[str, Any]) -> None:
    good: dict[str, Any] = {"cell": CASE.cell, "xs": CASE.xs, "loss_fn": CASE.loss_fn}
    good["direction"] = {"bias": torch.ones(2, dtype=F64)}
    with pytest.raises(ValueError, match=match):
        oracles.directional_difference(**{**good, **changes})


def test_finite_difference_knows_its_methods() -> None:
    with pytest.raises(ValueError, match="method"):
        oracles.finite_difference(CASE.cell, CASE.xs, CASE.loss_fn, method="forward")  # type: ignore[call-overload]
