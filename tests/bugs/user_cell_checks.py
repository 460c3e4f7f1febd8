"""Checks of cells that users bring, and of the hooks that they put on parameters."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from helpers.plain_autograd import assert_exact, squares, unrolled
from helpers.running import gradients
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal
from helpers.unitwise_cells import INTERACTING, INTERACTING_LATER, UNITWISE, blocks_unit_by_unit
from helpers.user_cells import EXACT
from torch import Tensor, nn

import rtrl
from rtrl.learners import BPTT, Learner

KINDS = (
    "in a list",
    "an inner gradient",
    "an inner vmap over parts",
    "an inner tangent",
    "a parametrized bias",
    "a scripted function",
)


class _Called(nn.Module):
    """The module inside a cell of ``from_torch``, called itself."""

    def __init__(self, cell: Any) -> None:
        super().__init__()
        self.cell, self.init_state = cell.cell, cell.init_state

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.cell(x, h)
        return h, h


def modules_with_hooks() -> None:
    """They are called: what a hook computed from older parameters is not used."""
    torch.manual_seed(0)
    cell = EXACT["a cell, then pruned"]()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(0.9)
    _learn(rtrl.BlockRTRL(cell, 2, block=3, audit="off"))
    expected, _ = unrolled(_Called(cell), list(normal(1, 5, 2, 3)), squares, 2)
    assert_gradients_equal(gradients(cell), expected)


def user_cells() -> None:
    """Every way in which a parameter is reached has its own cell."""
    for kind in KINDS:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_exact(EXACT[kind](), list(normal(1, 5, 2, 3)), 2, block=3, audit="off")


def plain_cells_of_users() -> None:
    """Cells whose units interact in linear maps alone are linearised unit by unit."""
    for name in ("GRU", "LSTM, parts side by side", "leaky units", "parameters of units"):
        torch.manual_seed(0)
        with blocks_unit_by_unit() as tried:
            assert_exact(UNITWISE[name](), list(normal(1, 5, 2, 3)), 2, block=3, audit="off")
        assert tried == [True] * 2


def units_that_interact() -> None:
    """Cells whose units interact elsewhere, too, are left to the general way."""
    for make in INTERACTING.values():
        torch.manual_seed(0)
        with blocks_unit_by_unit() as tried:
            assert_exact(make(), list(normal(1, 5, 2, 3)), 2, block=3, audit="off")
        assert not tried


def units_that_begin_to_interact() -> None:
    """Units that were found to interact in linear maps alone, and then do otherwise, for one sample at one step."""
    xs = normal(1, 6, 2, 3).clamp(-1, 1)
    xs[4, 1, 0] = 2.1
    for make in INTERACTING_LATER.values():
        torch.manual_seed(0)
        with blocks_unit_by_unit() as tried:
            assert_exact(make(), list(xs), 2, block=3, audit="off")
        assert tried[0]


def parameters_of_each_step() -> None:
    """A step that is run again has the parameters that it was taken with, wherever the cell holds them."""
    torch.manual_seed(0)
    cell, xs = EXACT["in a list"](), normal(1, 5, 2, 3)
    late, exact = BPTT(cell, 2), rtrl.BlockRTRL(cell, 2, audit="off")
    total: dict[str, Tensor] = {}
    for x in xs:
        exact.backward(squares(exact.step(x)))
        exact.sync()
        total = {name: total.get(name, 0.0) + grad for name, grad in gradients(cell).items()}
        cell.zero_grad()
        late.backward(squares(late.step(x)))
        with torch.no_grad():
            for p in cell.parameters():
                p.mul_(0.9)
    late.sync()
    assert_gradients_equal(gradients(cell), total)


def hooks_on_parameters() -> None:
    """They see the whole gradient, once."""
    for make in (lambda cell: rtrl.BlockRTRL(cell, 2, block=3, audit="off"), lambda cell: BPTT(cell, 2)):
        torch.manual_seed(0)
        cell = EXACT["stacked"]()
        _learn(make(cell))
        expected = cell.p.grad.clone()
        cell.zero_grad()
        seen: list[Tensor] = []
        cell.p.register_hook(lambda grad, seen=seen: seen.append(grad.clone()))
        cell.p.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
        _learn(make(cell))
        assert_gradients_equal(dict(enumerate(seen)), dict(enumerate([expected] * 2)))


def _learn(learner: Learner) -> None:
    for x in normal(1, 5, 2, 3):
        learner.backward(squares(learner.step(x)))
    learner.sync()


USER_CELL_CHECKS: dict[str, Callable[[], None]] = {
    check.__name__: check
    for check in (
        user_cells,
        plain_cells_of_users,
        units_that_interact,
        units_that_begin_to_interact,
        modules_with_hooks,
        parameters_of_each_step,
        hooks_on_parameters,
    )
}
