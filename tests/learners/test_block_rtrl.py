"""Small promises of the learner's methods: what they return before anything has happened, and what they say."""

import re
from typing import Any

import pytest
import torch
from helpers.running import gradients, run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import ForcedMoE, OddCell, PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import CellError, ConfigError, NonFiniteError, ShapeError

F64 = torch.float64


def plain(**options: Any) -> rtrl.BlockRTRL:
    return rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 1), 2, **options)


class Unused(torch.autograd.Function):
    """The identity, with a derivative that is said not to be there."""

    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> None:
        return None


def test_the_influence_before_the_first_step_is_zero_and_has_its_shape() -> None:
    learner = rtrl.BlockRTRL(seeded(OddCell(2, 4), 1), 3)
    for name, p in learner.cell.named_parameters():
        influence = learner.influence(name)
        assert influence.shape == (3, 2 * 4, p.numel())
        assert influence.dtype == F64
        assert not bool(influence.count_nonzero())


def test_the_names_that_there_are_are_listed() -> None:
    names = "recurrent, inward.weight, inward.bias, head.weight, head.bias"
    with pytest.raises(ConfigError, match=f"^no trainable parameter is called 'x'; there are {names}$"):
        plain().influence("x")


def test_a_loss_without_a_derivative_contributes_nothing() -> None:
    learner = plain(block=3)
    ys = [learner.step(x) for x in normal(1, 1, 2, 2)]
    learner.backward(Unused.apply(ys[0]).sum())
    assert ys[0].grad is None
    learner.sync()
    assert all(p.grad is None or not bool(p.grad.count_nonzero()) for p in learner.cell.parameters())


def test_a_loss_that_also_reaches_a_parameter_directly_gives_both_gradients() -> None:
    learner, x = plain(), normal(1, 2, 2)
    weight = learner.cell.head.weight
    learner.backward(learner.step(x).sum() + weight.square().sum())
    learner.sync()
    found = gradients(learner.cell)
    weight.grad = None
    other = plain()
    other.backward(other.step(x).sum())
    other.sync()
    expected = gradients(other.cell)
    expected["head.weight"] = expected["head.weight"] + 2 * weight.detach()
    assert_gradients_equal(found, expected)


def test_an_infinite_loss_gradient_is_located_at_y_or_at_a_parameter() -> None:
    learner = plain()
    y = learner.step(normal(1, 2, 2))
    with pytest.raises(NonFiniteError, match=r"the gradient of the loss at y\b.* step 0"):
        learner.backward((y - y.detach()).sum().sqrt())
    weight = learner.cell.head.weight
    with pytest.raises(NonFiniteError, match=r"the gradient of the loss at a parameter\b.* step 0"):
        learner.backward(y.sum() + (weight - weight.detach()).sum().sqrt())


@pytest.mark.parametrize("name", ["batch_size", "block", "window"])
def test_the_size_that_is_not_positive_is_named(name: str) -> None:
    sizes: dict[str, Any] = {"batch_size": 1, "block": 1, "window": 1, name: 0}
    with pytest.raises(ConfigError, match=f"^{name} must be a positive integer, got 0$"):
        rtrl.BlockRTRL(PlainRNN(2, 3), **sizes)
    assert getattr(rtrl.BlockRTRL(PlainRNN(2, 3), **{**sizes, name: 1}), name) == 1


def test_what_is_not_a_module_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^cell must be a torch.nn.Module, got function$"):
        rtrl.BlockRTRL(lambda x, h: (x, h), 2)  # type: ignore[arg-type]


def test_the_defaults_are_textbook_rtrl_with_a_window_of_64() -> None:
    learner = plain()
    assert (learner.block, learner.window, learner.lazy) == (1, 64, True)
    assert (learner.steps_taken, learner.at_block_end) == (0, False)
    learner.step(normal(1, 2, 2))
    assert (learner.steps_taken, learner.at_block_end) == (1, True)
    assert plain(lazy=0).lazy is False


def test_the_state_is_a_copy_and_y_a_leaf() -> None:
    learner = plain(block=2)
    learner.state.add_(1.0)
    assert not bool(learner.state.count_nonzero())
    y = learner.step(normal(1, 2, 2))
    assert y.is_leaf and y.requires_grad
    before = learner.state
    learner.state.add_(1.0)
    assert torch.equal(learner.state, before)


def test_what_is_done_to_y_does_not_reach_the_state() -> None:
    learner = rtrl.BlockRTRL(rtrl.cells.from_torch(nn.GRUCell(2, 3)).double(), 2, block=3)  # y is the state
    y = learner.step(normal(1, 2, 2))
    before = learner.state
    with torch.no_grad():
        y.zero_()
    assert torch.equal(learner.state, before) and bool(before.any())


def test_a_reset_takes_the_given_state_for_the_named_samples_only() -> None:
    learner = plain(block=2)
    learner.step(normal(1, 2, 2))
    before = learner.state
    learner.reset(torch.tensor([False, True]), state=torch.full((2, 3), 0.25, dtype=F64))
    assert torch.equal(learner.state[0], before[0])
    assert learner.state[1].tolist() == [0.25] * 3
    learner.reset()
    assert not bool(learner.state.count_nonzero())


def test_two_deliveries_accumulate_in_the_gradient_that_is_there() -> None:
    learner, xs = plain(), normal(1, 2, 2, 2)
    weight = learner.cell.head.weight
    weight.grad = torch.ones_like(weight)
    kept = weight.grad
    learner.backward(learner.step(xs[0]).sum())
    learner.sync()
    first = weight.grad.clone()
    learner.backward(learner.step(xs[1]).sum())
    learner.sync()
    assert weight.grad is kept
    assert not torch.equal(first, torch.ones_like(weight))
    assert not torch.equal(first, weight.grad)
    learner.sync()
    after = weight.grad.clone()
    learner.sync()
    assert torch.equal(weight.grad, after)


class Untouched(nn.Module):
    """Has a parameter that no step uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Parameter(torch.ones(1, 1, dtype=F64)), nn.Parameter(torch.ones(2, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(h + x @ self.used)
        return new, new


def test_a_parameter_that_no_step_uses_has_no_influence() -> None:
    learner = rtrl.BlockRTRL(Untouched(), 2, block=2)
    for x in normal(1, 4, 2, 1):
        learner.backward(learner.step(x).sum())
    learner.sync()
    assert learner.influence("idle").shape == (2, 1, 2)
    assert not bool(learner.influence("idle").count_nonzero())
    assert learner.cell.idle.grad is None or not bool(learner.cell.idle.grad.count_nonzero())
    assert bool(learner.influence("used").count_nonzero())


def test_an_x_without_a_tensor_is_refused_at_any_step() -> None:
    with pytest.raises(ShapeError, match=f"^{re.escape('x holds no tensor')}$"):
        plain().step([1, 2])


def test_a_second_delivery_of_nothing_leaves_no_gradient_behind() -> None:
    learner = plain(block=2)
    for x in normal(1, 3, 2, 2):
        learner.backward(learner.step(x).sum())
    learner.sync()
    for p in learner.cell.parameters():
        p.grad = None
    learner.sync()
    learner.influence("recurrent")
    learner.sync()
    assert all(p.grad is None for p in learner.cell.parameters())


class Gain(PlainRNN):
    """Scales its output by a parameter that the state does not depend on."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, h_next = super().forward(x, h)
        return y * self.gain, h_next


def test_a_parameter_of_the_output_alone_is_exact() -> None:
    cell, xs = seeded(Gain(), 2), normal(1, 5, 2, 2)
    loss = lambda t, y: y.square().sum()
    expected, influences = oracles.dense_rtrl(cell, xs, loss, return_influence=True)
    found = run(cell, xs, loss, block=2)
    assert_gradients_equal(found.gradients, expected)
    assert_influences_equal(found.influences, influences[-1])


class Heads(nn.Module):
    """Three outputs, of which the first is made of x alone."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.early = (
            PlainRNN(2, 3),
            nn.Linear(2, 5),
        )  # the first map of all is of another width than the state

    def init_state(self, batch_size: int) -> Tensor:
        return self.cell.init_state(batch_size)

    def forward(self, x: Tensor, h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        early = self.early(x).sum(dim=1, keepdim=True)
        y, h_next = self.cell(x, h)
        return {"a": 2 * x, "b": y * early, "c": h_next.square()}, h_next


LOSSES: dict[str, Any] = {
    "the last": lambda t, y: y["c"].sum() if t % 2 else None,
    "the first and the last": lambda t, y: y["a"].square().sum() + y["c"].sum(),
    "now one, now the other": lambda t, y: (y["c"] if t % 2 else y["b"]).square().sum(),
    "all": lambda t, y: sum(value.square().sum() for value in y.values()),
}


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_some_of_several_outputs_are_exact(name: str, block: int) -> None:
    cell, xs = seeded(Heads(), 2), normal(1, 5, 2, 2)
    found = run(cell, xs, LOSSES[name], block=block, influences=False)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, LOSSES[name]))


def test_several_losses_of_a_step_add_up() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 2), normal(1, 4, 2, 2)
    expected = oracles.bptt(cell, xs, lambda t, y: y.square().sum() + y.sum() + y.exp().sum())
    learner = rtrl.BlockRTRL(cell, 2, block=2)
    for x in xs:
        y = learner.step(x)
        y.square().sum().backward()
        learner.backward(y.sum())
        learner.backward(y.exp().sum())
    learner.sync()
    assert_gradients_equal(gradients(cell), expected)


def test_a_loss_of_an_output_made_of_x_alone_contributes_nothing() -> None:
    found = run(seeded(Heads(), 2), normal(1, 5, 2, 2), lambda t, y: y["a"].square().sum(), block=2)
    assert not any(bool(value.count_nonzero()) for value in found.gradients.values())


class Apart(PlainRNN):
    """Its next state is made of x alone, and a parameter of its own scales y, element by element."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.gain = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = super().forward(x, h)
        return y * self.gain, torch.tanh(x)


@pytest.mark.parametrize("block", [1, 2])
def test_a_state_that_no_parameter_reaches_has_no_influence(block: int) -> None:
    cell, xs = seeded(Apart(), 2), normal(1, 5, 2, 3)
    loss = lambda t, y: y.square().sum()
    found = run(cell, xs, loss, block=block)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss))
    assert not any(bool(value.count_nonzero()) for value in found.influences.values())


class Shaky(nn.Module):
    """Draws random numbers where it is given its choices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, dtype=F64)

    def forward(
        self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None
    ) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        new = torch.tanh(x + h @ self.weight)
        if replay is not None:
            new = new + torch.randn_like(new)
        return new, new, rtrl.Sparsity() if replay is None else replay


def test_a_cell_that_is_impure_under_a_replay_is_refused_at_the_first_step() -> None:
    learner = rtrl.BlockRTRL(Shaky(), 2)
    with pytest.raises(CellError, match="draws random numbers"):
        learner.step(normal(1, 2, 2), replay=rtrl.Sparsity())
    assert learner.steps_taken == 0


def mostly_dormant(**options: Any) -> tuple[rtrl.BlockRTRL, Tensor]:
    """A mixture of six slots, of which a step reads two and writes one, and of six experts, of which it uses one."""
    moe = rtrl.RecurrentMoE(2, 2, d_model=2, n_slots=6, n_experts=6, topk=1, expert_hidden=2, ffn_hidden=2)
    cell = seeded(ForcedMoE(moe, (2, 1, 1)), 3)
    chosen = torch.tensor([[[t % 6, (t + 1) % 6, t % 6, t % 6]] for t in range(6)]).double()
    return rtrl.BlockRTRL(cell, 1, **options), torch.cat([normal(1, 6, 1, 2), chosen], dim=-1)


@pytest.mark.parametrize("lazy", [True, False])
def test_slices_are_dormant_only_where_the_learner_is_lazy(lazy: bool) -> None:
    learner, xs = mostly_dormant(lazy=lazy)
    for x in xs:
        learner.step(x)
    learner.sync()
    assert learner.last_updates("cell.expert_up").tolist() == [[1, 2, 3, 4, 5, 6] if lazy else [6] * 6]


def test_the_tree_reserves_what_the_first_step_shows_to_be_enough() -> None:
    """A node of m steps: m rows at most, 3 m columns at most, and never more than the six slots there are."""
    learner, xs = mostly_dormant(window=2)
    learner.step(xs[0])
    leaf, root = 8 * (2 * 6 + 6 + 1 + 3), 8 * (4 * 12 + 12 + 2 + 6)
    assert learner.retained_bytes()["tree"] == 2 * leaf + root
    assert mostly_dormant(window=2, lazy=False)[0].retained_bytes()["tree"] == 0
    learner, xs = mostly_dormant(window=2, lazy=False)
    learner.step(xs[0])
    assert learner.retained_bytes()["tree"] == leaf  # no window to keep: one block


class Bare(nn.Module):
    """A cell that knows of no first state."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, dtype=F64))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        new = torch.tanh(x + h @ self.weight)
        return new, new


def test_a_cell_without_a_first_state_of_its_own_may_be_given_one() -> None:
    first, xs, cell = torch.full((2, 2), 0.5, dtype=F64), normal(1, 3, 2, 2), Bare()
    loss = lambda t, y: y.square().sum()
    found = run(cell, xs, loss, h0=first, block=2)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss, first))
    with pytest.raises(ConfigError):
        rtrl.BlockRTRL(cell, 2)
