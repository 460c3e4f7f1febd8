"""An x that requires grad: refused by name, or given the gradient of the losses inside the block."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, F64, normal
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import rtrl
from rtrl.errors import ConfigError, LossError, NonFiniteError

Make = Callable[..., Any]
ALL = [*BASELINES, pytest.param(lambda *a: rtrl.BlockRTRL(*a, block=4, window=3), id="block")]
BLOCK = 3


def learner_of(cell: nn.Module, batch_size: int = 2, **options: Any) -> rtrl.BlockRTRL:
    return rtrl.BlockRTRL(cell, batch_size, block=BLOCK, input_grad="block", **options)


@pytest.mark.parametrize("make", ALL)
def test_an_x_that_requires_grad_is_refused_with_the_remedy_and_changes_nothing(make: Make) -> None:
    learner = make(seeded(PlainRNN(2, 3), 0), 2)
    encoder = nn.Linear(2, 2, dtype=F64)
    xs = normal(0, 4, 2, 2)
    y = learner.step(xs[0])
    before = str(learner.state_dict())
    for x in (encoder(xs[1]), xs[1].clone().requires_grad_(), y[:, :2]):
        with pytest.raises(ConfigError, match=r"x requires grad.*x\.detach\(\).*part of the cell.*input_grad='block'"):
            learner.step(x)
    assert str(learner.state_dict()) == before
    learner.step(encoder(xs[1]).detach())
    with torch.no_grad():
        learner.step(encoder(xs[2]))
        learner.step(xs[3].clone().requires_grad_())  # no gradient is expected here
    leaf = xs[3].clone().requires_grad_()
    with torch.inference_mode():
        learner.step(encoder(xs[3]))
        learner.step(leaf)
    with pytest.raises(ConfigError, match="input_grad must be one of None, 'block'"):
        rtrl.BlockRTRL(learner.cell, 2, input_grad="all")  # type: ignore[arg-type]


class Pairs(nn.Module):
    """Takes a dict of two tensors and an index, and reads x in y as well."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = seeded(PlainRNN(2, 3), 1)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 3), 0.1, dtype=F64)

    def forward(self, x: dict[str, Tensor], h: Tensor) -> tuple[Any, Tensor]:
        y, h_next = self.cell(x["a"] * x["b"] + x["i"][:, None], h)
        return {"y": y, "gated": x["a"].sin() * h[:, :2]}, h_next


def truncated(cell: nn.Module, xs: list[Any], steps_with_loss: set[int], resets: dict[int, Tensor]) -> Tensor:
    """The losses of all blocks by plain autograd: the state is a constant at the start of each block."""
    h, total = cell.init_state(2), torch.zeros((), dtype=F64)  # type: ignore[operator]
    for t, x in enumerate(xs):
        if t in resets:
            h = torch.where(resets[t][:, None], cell.init_state(2), h)  # type: ignore[operator]
        if t % BLOCK == 0:
            h = h.detach()
        y, h = cell(x, h)
        if t in steps_with_loss:
            total = total + (y["y"] - 0.1 * t).square().sum() + y["gated"].sum()
    return total


def test_the_gradient_at_x_is_that_of_plain_autograd_inside_each_block() -> None:
    cell, encoder, other = Pairs(), nn.Linear(2, 2, dtype=F64), nn.Linear(2, 2, dtype=F64)
    leaf, resets = normal(3, 2, 2).requires_grad_(), {4: torch.tensor([False, True])}
    with_loss = {0, 2, 5, 6, 7, 9}

    def inputs() -> list[Any]:
        """Computed at once by one graph, and in part by one of their own; one leaf is the x of several steps."""
        codes = encoder(normal(4, 10, 2, 2)).tanh()
        return [
            {"a": codes[t], "b": leaf if t % 4 == 1 else other(codes[t].detach()), "i": torch.tensor([t % 2, 1])}
            for t in range(10)
        ]

    wanted = [*encoder.parameters(), *other.parameters(), leaf]
    exact = torch.autograd.grad(truncated(cell, inputs(), with_loss, resets), wanted)
    plain = rtrl.BlockRTRL(cell, 2, block=BLOCK)
    found = []
    for learner in (plain, learner_of(cell)):
        cell.zero_grad()
        for t, x in enumerate(inputs()):
            if t in resets:
                learner.reset(resets[t])
            if learner is plain:
                x = {name: value.detach() for name, value in x.items()}
            y = learner.step(x)
            if t in with_loss:
                learner.backward((y["y"] - 0.1 * t).square().sum() + y["gated"].sum())
        learner.sync()
        found.append(gradients(cell))
    names = [str(i) for i in range(len(wanted))]
    assert_gradients_equal(
        {n: torch.zeros(()) if w.grad is None else w.grad for n, w in zip(names, wanted, strict=True)},
        dict(zip(names, exact, strict=True)),
    )
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])  # the cell's own are untouched


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("unseen", [False, True], ids=["", "unseen"])
def test_a_block_that_cannot_close_gives_x_nothing(prior: bool, unseen: bool) -> None:
    """A changed parameter is seen at once, or, changed behind PyTorch's back, when x has got its gradient already."""
    cell, encoder = seeded(PlainRNN(2, 3), 0), nn.Linear(2, 2, dtype=F64)
    learner, leaf = learner_of(cell), torch.ones(2, 2, dtype=F64, requires_grad=True)
    if prior:
        leaf.grad, encoder.weight.grad = torch.ones_like(leaf), torch.full((2, 2), 2.0, dtype=F64)
    for x in (leaf, encoder(leaf.detach())):
        learner.backward(learner.step(x).sum())
    before = [p.grad if p.grad is None else p.grad.clone() for p in (leaf, encoder.weight)]
    changed = next(cell.parameters())
    if unseen:
        changed.data.add_(1)
    else:
        changed.data = changed.data + 1
    with pytest.raises(rtrl.errors.CellError if unseen else rtrl.errors.ParameterChangedError):
        learner.sync()
    for old, now in zip(before, (leaf.grad, encoder.weight.grad), strict=True):
        assert (old is None) == (now is None) and (old is None or now is None or torch.equal(old, now))
    changed.data = changed.data - 1
    learner.reset(discard=True)
    learner.step(leaf)


def test_a_failure_behind_x_is_named_and_leaves_every_gradient_as_it_was() -> None:
    cell, leaf = seeded(PlainRNN(2, 3), 0), torch.ones(2, 2, dtype=F64, requires_grad=True)
    learner, weight = learner_of(cell), torch.ones(2, 2, dtype=F64, requires_grad=True)
    for x in (leaf * 2, leaf * weight):
        learner.backward(learner.step(x).sum())
    with torch.no_grad():
        weight += 1
    saved = learner.state
    with pytest.raises(LossError, match="steps 0 … 1 could not be pulled back through what computed x"):
        learner.sync()
    assert leaf.grad is None and weight.grad is None and torch.equal(learner.state, saved)
    assert all(p.grad is None for p in cell.parameters())
    learner.reset(discard=True)
    learner.backward(learner.step(leaf * 2).sum())
    learner.sync()
    assert leaf.grad is not None


def test_an_x_computed_from_a_y_is_refused() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner = learner_of(cell)
    ys = [learner.step(torch.ones(2, 2, dtype=F64)) for _ in range(2)]
    learner.sync()
    ys.append(learner.step(torch.ones(2, 2, dtype=F64)))
    for y in ys[1:]:  # of a closed block, and of the open one
        with pytest.raises(ConfigError, match="step 3: x depends on the y of an earlier step"):
            learner.step(y[:, :2] * 2)
    learner.step(ys[1][:, :2].detach().requires_grad_())


def test_a_graph_can_neither_be_saved_nor_copied() -> None:
    learner, x = learner_of(seeded(PlainRNN(2, 3), 0)), torch.ones(2, 2, dtype=F64, requires_grad=True)
    learner.step(x)
    with pytest.raises(ConfigError, match=r"step 0 of the open block waits for its gradient .* call sync\(\) first"):
        learner.state_dict()
    learner.sync()
    learner.load_state_dict(learner.state_dict())
    assert x.grad is None  # no loss


def test_an_infinite_gradient_at_x_is_refused() -> None:
    class Root(PlainRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(x.sqrt(), h)

    x = torch.zeros(2, 2, dtype=F64, requires_grad=True)
    learner = learner_of(seeded(Root(2, 3), 0))
    learner.backward(learner.step(x).sum())
    with pytest.raises(NonFiniteError, match="gradient of the losses at x at step 0"):
        learner.sync()
    assert x.grad is None
    learner.reset(discard=True)


class Choosing(nn.Module):
    """Uses one of two experts, the one that a replay names or the sign of x chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(normal(3, 2, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 2), 0.1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None) -> Any:
        index = (x[:, :1] > 0).long() if replay is None else replay.active["w"]
        h = torch.tanh(x * torch.nn.functional.embedding(index, self.w).squeeze(1) + h)
        return h, h, rtrl.Sparsity(active={"w": index})


def test_the_gradient_at_x_is_that_of_the_choices_that_were_forced() -> None:
    cell, xs = Choosing(), normal(1, 2, 2, 2).requires_grad_()
    forced = [rtrl.Sparsity(active={"w": (x[:, :1] <= 0).long()}) for x in xs]  # against the cell's own
    learner, h, total = learner_of(cell), cell.init_state(2), torch.zeros((), dtype=F64)
    for x, replay in zip(xs, forced, strict=True):
        learner.backward(learner.step(x, replay=replay).square().sum())
        y, h, _ = cell(x, h, replay=replay)
        total = total + y.square().sum()
    learner.sync()
    (expected,) = torch.autograd.grad(total, xs)
    assert_gradients_equal({"x": xs.grad}, {"x": expected})  # type: ignore[dict-item]


def test_a_block_that_cannot_close_gives_nothing_to_what_computed_x() -> None:
    class Steep(PlainRNN):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            y, h_next = super().forward(x, h)
            return y, h_next + (h - h.detach()).square().sqrt()  # of infinite slope

    learner, encoder = learner_of(seeded(Steep(2, 3), 1)), nn.Linear(2, 2, dtype=F64)
    x = encoder(normal(0, 2, 2))
    x.retain_grad()
    learner.backward(learner.step(x).square().sum())
    with pytest.raises(NonFiniteError, match="dynamics Jacobian"):
        learner.sync()
    assert x.grad is None and encoder.weight.grad is None
