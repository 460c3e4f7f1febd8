"""``gradients``: several losses of the newest step apart, against BPTT of each alone; ``peek``: y of the next step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.exact_learners import EXACT
from helpers.strategies import Case, dense, fewer, forced_moe, normal, resets, scheduled
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, ScheduledCell, seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import ConfigError, LossError, NonFiniteError, ParameterChangedError
from rtrl.learners import RFLO, TBPTT, UORO, Learner

Make = Callable[..., Learner]


def of_samples(y: Any) -> Tensor:
    """A value of each sample, (B,)."""
    leaves = [leaf.reshape(len(leaf), -1) for leaf in torch.utils._pytree.tree_leaves(y) if leaf.is_floating_point()]
    mixed = torch.cat(leaves, dim=1)
    return (mixed * torch.arange(1.0, mixed.shape[1] + 1, dtype=mixed.dtype)).sum(dim=1).sin()


LOSSES: dict[str, Callable[[Any], Tensor]] = {
    "value": lambda y: of_samples(y).sum(),
    "policy": lambda y: of_samples(y).square().prod().exp(),  # it couples the samples
}


def check(learner: Learner, case: Case, y: Any, t: int, flags: Tensor | None = None) -> None:
    """Hold the gradients of two losses of step t to BPTT with that loss alone."""
    found = learner.gradients({name: loss(y) for name, loss in LOSSES.items()})
    for name, loss in LOSSES.items():
        alone = lambda i, y, loss=loss: loss(y) if i == t else None
        passed = None if flags is None else flags[: t + 1]
        expected = oracles.bptt(case.cell, case.xs[: t + 1], alone, resets=passed)
        assert_gradients_equal(found[name], expected, may_be_zero=True)


def check_by_sample(learner: Learner, case: Case, y: Any, t: int) -> None:
    """Hold the gradients of a loss by sample to BPTT of each sample's part."""
    (found,) = learner.gradients({"": of_samples(y).sum()}, per_sample=True).values()
    for b in range(case.xs.shape[1]):
        alone = lambda i, y, b=b: of_samples(y)[b] if i == t else None
        expected = oracles.bptt(case.cell, case.xs[: t + 1], alone)
        assert_gradients_equal({name: value[b] for name, value in found.items()}, expected, may_be_zero=True)


@fewer(0.3)
@given(scheduled(max_steps=9) | forced_moe(max_steps=9) | dense(max_steps=7), st.data())
def test_each_loss_by_itself_equals_bptt_of_it_alone(case: Case, data: st.DataObject) -> None:
    """Inside and at the end of blocks, with dormant slices that the window has brought up to date or not."""
    steps, size = case.xs.shape[:2]
    flags = data.draw(resets(case))
    at = data.draw(st.integers(0, steps - 1))
    learner = rtrl.BlockRTRL(case.cell, size, **case.options)
    for t, x in enumerate(case.xs):
        if bool(flags[t].any()):
            learner.reset(flags[t])
        y = learner.step(x)
        if t in (at, steps - 1):
            check(learner, case, y, t, flags)


@pytest.mark.parametrize("name", EXACT)
def test_every_exact_learner_takes_losses_apart(name: str) -> None:
    case = Case(seeded(PlainRNN(2, 3), 0), normal(1, 4, 2, 2), [], {}, "")
    learner = EXACT[name](case.cell, 2)
    for t, x in enumerate(case.xs):
        y = learner.step(x)
        if t % 2:
            check(learner, case, y, t)
            check_by_sample(learner, case, y, t)


@fewer(0.25)
@given(scheduled(max_steps=8) | forced_moe(max_steps=8))
def test_by_sample_with_sparsity_and_dormant_slices(case: Case) -> None:
    learner = rtrl.BlockRTRL(case.cell, case.xs.shape[1], **case.options)
    for x in case.xs:
        y = learner.step(x)
    check_by_sample(learner, case, y, len(case.xs) - 1)


@pytest.mark.parametrize("block", [1, 2])
def test_slices_and_rows_that_rest_for_long(block: int) -> None:
    """Expert 1 is active at steps 0 and 9 alone, expert 2 at the first two; every third row of the state is written."""
    cell, steps = seeded(ScheduledCell(2, 3, 2, 3), 3), 11
    t = torch.arange(steps)[:, None]
    reads, writes = torch.ones(steps, 3), (t % 3 == torch.arange(3)) | (t == 0)
    experts = torch.stack([t % 2 == 0, t % 9 == 0, t < 2], dim=2)[:, 0]
    bits = torch.cat([reads, writes, experts], dim=1).double()[:, None].expand(-1, 2, -1)
    case = Case(cell, torch.cat([normal(5, steps, 2, 2), bits], dim=2), [], {}, "")
    learner = rtrl.BlockRTRL(cell, 2, block=block, window=8)
    for t, x in enumerate(case.xs):
        y = learner.step(x)
        learner.backward(y.sum())
        if t in (3, 7):
            learner.sync()
        elif t in (2, 6, 8, 10):
            before = contents(learner)
            check(learner, case, y, t)
            assert same(contents(learner), before)


@pytest.mark.parametrize("block", [1, 4])
def test_resets_inside_a_block(block: int) -> None:
    """Sample 1 restarts before step 2; asked at step 5, and after a reset that follows it."""
    case = Case(seeded(PlainRNN(2, 3), 0), normal(1, 6, 2, 2), [], {}, "")
    flags = torch.zeros(6, 2, dtype=torch.bool)
    flags[2, 1] = True
    learner = rtrl.BlockRTRL(case.cell, 2, block=block)
    for t, x in enumerate(case.xs):
        if bool(flags[t].any()):
            learner.reset(flags[t])
        y = learner.step(x)
        if t in (3, 5):
            check(learner, case, y, t, flags)
    learner.reset(torch.tensor([True, False]))
    check(learner, case, y, 5, flags)


def test_y_may_be_a_tree_with_a_number_of_each_sample() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = PlainRNN(2, 3)

        def init_state(self, batch_size: int) -> Tensor:
            return self.core.init_state(batch_size)

        def forward(self, x: Tensor, h: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            y, h = self.core(x, h)
            return {"v": y[:, 0], "action": y.argmax(dim=1), "parts": y[:, :, None]}, h

    case = Case(seeded(Heads(), 0), normal(1, 3, 2, 2), [], {}, "")
    learner = rtrl.BlockRTRL(case.cell, 2)
    for x in case.xs:
        y = learner.step(x)
    check(learner, case, y, 2)
    check_by_sample(learner, case, y, 2)


def contents(learner: Learner) -> list[Any]:
    return torch.utils._pytree.tree_leaves(learner.state_dict())


def same(first: list[Any], second: list[Any]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("name", ["block-1", "block-3", "bptt", "dense"])
def test_neither_changes_anything(name: str) -> None:
    """Not what the learner carries, nor ``.grad``; asked twice, both answer the same."""
    cell = rtrl.RecurrentMoE(3, 2, d_model=4, n_slots=3, n_experts=4, topk=1).double()
    learner = EXACT[name](cell, 2)
    for t, x in enumerate(normal(0, 8, 2, 3)):
        y = learner.step(x)
        learner.backward(y.square().sum())
        if t == 3:
            learner.sync()
    before = [*contents(learner), *(p.grad.clone() for p in cell.parameters())]
    losses = {"v": y.sum(), "pi": y.exp().sum()}
    first = learner.gradients(losses)
    ahead = learner.peek(normal(9, 2, 3))
    assert same([*contents(learner), *(p.grad for p in cell.parameters())], before)
    assert same([*learner.gradients(losses)["pi"].values()], [*first["pi"].values()])
    assert torch.equal(learner.peek(normal(9, 2, 3)), ahead) and not ahead.requires_grad
    assert torch.equal(learner.step(normal(9, 2, 3)), ahead)


def test_a_loss_may_be_added_after_it_was_asked_about() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 1)
    for x in normal(0, 3, 1, 2):
        loss = learner.step(x).square().sum()
        (alone,) = learner.gradients({"": loss}).values()
    learner.backward(loss)
    learner.sync()
    assert_gradients_equal({name: p.grad for name, p in cell.named_parameters()}, alone)


def test_a_parameter_that_a_loss_depends_on_other_than_through_y_counts() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 2)
    y = learner.step(normal(0, 2, 2))
    name, weight = next(iter(cell.named_parameters()))
    plain, decayed = learner.gradients({"plain": y.sum(), "decayed": y.sum() + weight.square().sum() / 2}).values()
    torch.testing.assert_close(decayed[name], plain[name] + weight.detach())
    with pytest.raises(LossError, match=r"'decayed' depends on parameter .* no sample"):
        learner.gradients({"decayed": y.sum() + weight.sum()}, per_sample=True)


@pytest.mark.parametrize(
    "make", [lambda cell: RFLO(cell, 2, 0.3), lambda cell: TBPTT(cell, 2, 2), lambda cell: UORO(cell, 2)]
)
def test_learners_that_are_not_exact_give_what_they_would_deliver(make: Make) -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner = make(cell)
    for x in normal(0, 5, 2, 2):
        loss = learner.step(x).square().sum()
    (alone,) = learner.gradients({"": loss}).values()
    parts = learner.gradients({"": loss}, per_sample=True)[""]
    learner.backward(loss)
    learner.sync()
    assert_gradients_equal({name: p.grad for name, p in cell.named_parameters()}, alone)
    assert_gradients_equal({name: value.sum(dim=0) for name, value in parts.items()}, alone)


def test_what_is_no_loss_of_the_newest_step_is_refused() -> None:
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 1, block=3)
    first = learner.step(normal(0, 1, 2))
    second = learner.step(normal(1, 1, 2))
    for losses in ({}, second.sum(), {1: second.sum()}):
        with pytest.raises(ConfigError, match="a dict of scalars by name"):
            learner.gradients(losses)
    with pytest.raises(LossError, match=r"'v'.*scalar"):
        learner.gradients({"v": second})
    with pytest.raises(LossError, match=r"'v'.*does not depend on the y of step 1"):
        learner.gradients({"v": first.sum()})
    with pytest.raises(LossError, match=r"'v' depends on the y of an earlier step"):
        learner.gradients({"v": first.sum() + second.sum()})
    with pytest.raises(NonFiniteError, match="the loss"):
        learner.gradients({"v": second.sum() / 0})
    loss = second.square().sum()
    learner.backward(loss)
    with pytest.raises(LossError, match=r"'v' could not be pulled back.*call gradients\(\) first"):
        learner.gradients({"v": loss})
    with torch.no_grad():
        cell.inward.bias.add_(1.0)
    for call in (lambda: learner.gradients({"v": second.sum()}), lambda: learner.peek(normal(2, 1, 2))):
        with pytest.raises(ParameterChangedError, match="changed inside the open block"):
            call()
    learner.reset(discard=True)
    with pytest.raises(LossError, match="no step that can take a loss"):
        learner.gradients({"v": second.sum()})


def test_peek_checks_what_step_checks() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 0), 2)
    before = contents(learner)
    for x in (normal(0, 3, 2), normal(0, 2, 2).float(), normal(0, 2, 2) / 0, normal(0, 2, 2).requires_grad_()):
        with pytest.raises(rtrl.errors.RTRLError) as stepped:
            learner.step(x)
        with pytest.raises(type(stepped.value)) as peeked:
            learner.peek(x)
        assert str(peeked.value) == str(stepped.value)
    assert same(contents(learner), before)
