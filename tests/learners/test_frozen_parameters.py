"""Parameters that are frozen or unfrozen in mid-stream, at the end of a block."""

import pytest
import torch
from helpers.baseline_cells import F64, normal
from helpers.exact_learners import EXACT, Make
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ParameterChangedError
from rtrl.learners import BPTT, UORO, DenseRTRL

FIRST = torch.tensor([True, False])


class Table(nn.Module):
    """Rows of a table are used one at a time; every parameter but the last is reached through the state, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mix = nn.Parameter(normal(0, 4, 3)), nn.Parameter(normal(1, 3, 3))
        self.bias, self.h0 = nn.Parameter(normal(2, 3)), nn.Parameter(normal(3, 3))

    def init_state(self, batch_size: int) -> Tensor:
        return self.h0.expand(batch_size, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        index = x.long()
        h_next = torch.tanh(h @ self.mix + nn.functional.embedding(index, self.table) + self.bias)
        return h_next * h, h_next, rtrl.Sparsity(active={"table": index[:, None]})


XS = torch.tensor([[0, 2], [2, 1], [1, 0], [0, 0], [3, 3]] * 4, dtype=F64)
# before step t: the parameters frozen from then on, and those unfrozen
TOGGLES = {4: ("table mix", ""), 8: ("h0", "table"), 9: ("", "mix"), 13: ("table", ""), 14: ("", "table h0")}
RESETS = {6: FIRST, 15: ~FIRST}


def loss(t: int, y: Tensor) -> Tensor:
    return (y - 0.1 * t).square().sum()


def reference() -> dict[str, Tensor]:
    """Backpropagation in which a frozen parameter is a constant, and so is all that it did before it was frozen."""
    total: dict[str, Tensor] = {}
    cell = Table()
    theta = dict(cell.named_parameters())
    for name in theta:  # one at a time; the losses after a freezing are cut off from what was before
        alive, h = True, cell.init_state(2)
        gradient = torch.zeros_like(theta[name])
        losses = torch.zeros((), dtype=F64)
        for t, x in enumerate(XS):
            off, on = TOGGLES.get(t, ("", ""))
            if name in off.split() and losses.requires_grad:
                gradient += torch.autograd.grad(losses, theta[name], retain_graph=True, materialize_grads=True)[0]
            if name in off.split():
                alive, losses, h = False, torch.zeros((), dtype=F64), h.detach()
            if name in on.split():
                alive, h = True, h.detach()
            theta[name].requires_grad_(alive)
            h = torch.where(RESETS[t][:, None], cell.init_state(2), h) if t in RESETS else h
            y, h, _ = cell(x, h)
            losses = losses + loss(t, y)
        gradient += torch.autograd.grad(losses, theta[name], materialize_grads=True)[0]
        theta[name].requires_grad_()
        total[name] = gradient
    return total


def toggle(cell: nn.Module, off: str, on: str) -> None:
    for name, parameter in cell.named_parameters():
        if name in off.split() + on.split():
            parameter.requires_grad_(name in on.split())


@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_influence_of_an_unfrozen_parameter_begins_at_zero_and_that_of_a_frozen_one_is_dropped(
    make: Make, saved: bool
) -> None:
    cell, found = Table(), dict.fromkeys(["table", "mix", "bias", "h0"], torch.zeros(()))
    learner = make(cell, 2)
    for t, x in enumerate(XS):
        if t in TOGGLES:
            learner.sync()
            for name, value in gradients(cell).items():
                found[name] = found[name] + value
            cell.zero_grad()
            toggle(cell, *TOGGLES[t])
            if saved:
                state, learner = learner.state_dict(), make(cell, 2)
                learner.load_state_dict(state)
        if t in RESETS:
            learner.reset(RESETS[t])
        learner.backward(loss(t, learner.step(x)))
    learner.sync()
    for name, value in gradients(cell).items():
        found[name] = found[name] + value
    assert_gradients_equal(found, reference())


def test_the_influence_after_parameters_were_toggled() -> None:
    """Against the textbook's, and at once: without a step in between."""
    cells = Table(), Table()
    block, dense = rtrl.BlockRTRL(cells[0], 2, block=3, window=2), DenseRTRL(cells[1], 2)
    for t, x in enumerate(XS):
        if t in TOGGLES:
            for cell, learner in zip(cells, (block, dense), strict=True):
                learner.sync()
                toggle(cell, *TOGGLES[t])
                learner.sync()
                if t == 8:
                    assert not bool(learner.influence("table").any())
                    learner.reset(FIRST, state=torch.zeros(2, 3, dtype=F64))
        for learner in (block, dense):
            learner.step(x)
        if t % 4 == 3:
            names = [name for name, p in cells[0].named_parameters() if p.requires_grad]
            found, expected = ({name: one.influence(name) for name in names} for one in (block, dense))
            assert_influences_equal(found, expected, may_be_zero=True)


def test_the_estimate_of_uoro_keeps_the_other_columns() -> None:
    cell = Table()
    learner = UORO(cell, 2, generator=torch.Generator().manual_seed(0))
    for x in XS[:3]:
        learner.step(x)
    learner.sync()
    before = learner.influence("mix")
    toggle(cell, "table h0", "")
    assert torch.equal(learner.influence("mix"), before)
    toggle(cell, "", "table")
    assert not bool(learner.influence("table").any())


def test_what_a_frozen_parameter_has_earned_and_not_been_given_is_dropped() -> None:
    cell = Table()
    learner = rtrl.BlockRTRL(cell, 2, block=3)
    for t, x in enumerate(XS[:4]):
        learner.backward(loss(t, learner.step(x)))
    learner.influence("bias")  # closes the block and delivers nothing
    toggle(cell, "mix h0", "")
    learner.sync()
    assert cell.mix.grad is None and cell.h0.grad is None and cell.bias.grad is not None


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_a_parameter_toggled_inside_an_open_block_is_refused_and_may_be_put_back(make: Make) -> None:
    cell = Table()
    learner = make(cell, 2)
    learner.backward(loss(0, learner.step(XS[0])))
    toggle(cell, "mix", "")
    for do in (learner.sync, lambda: learner.step(XS[1]), learner.reset):
        with pytest.raises(ParameterChangedError, match=r"frozen or unfrozen inside the open block of steps 0 … 0"):
            do()
    toggle(cell, "", "mix")
    learner.step(XS[1])
    learner.sync()
    toggle(cell, "mix", "")
    with pytest.raises(rtrl.errors.ShapeError):
        learner.step(XS[1][:1])
    toggle(cell, "", "mix")  # the step that failed has dropped nothing
    if hasattr(learner, "influence"):
        assert bool(learner.influence("mix").any())


def test_steps_of_which_no_parameter_is_trainable_any_more() -> None:
    cell = Table()
    toggle(cell, "table bias h0", "")
    learner = BPTT(cell, 2)
    learner.backward(loss(0, learner.step(XS[0])))
    learner.sync()
    toggle(cell, "mix", "bias")
    learner.backward(loss(1, learner.step(XS[1])))
    learner.sync()
    dense = DenseRTRL(cell, 2, state=learner._kept_steps[1].h)
    expected = cell.bias.grad
    cell.zero_grad()
    dense.backward(loss(1, dense.step(XS[1])))
    dense.sync()
    assert expected is not None and cell.bias.grad is not None
    assert_gradients_equal({"bias": expected}, {"bias": cell.bias.grad})


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_a_first_state_that_is_frozen_before_the_first_step_is_a_constant(make: Make) -> None:
    cell = Table()
    learner = make(cell, 2)
    toggle(cell, "h0", "")
    for t, x in enumerate(XS[:5]):
        learner.backward(loss(t, learner.step(x)))
    learner.sync()
    assert cell.h0.grad is None
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, XS[:5], loss))
