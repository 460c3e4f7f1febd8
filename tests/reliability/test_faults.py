"""Memory that runs out, gradients that cannot be delivered, losses that are removed, threads and forks."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.baseline_cells import normal, squares
from helpers.injected_faults import Injected
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
import rtrl
from rtrl.errors import ConfigError, LossError, PerformanceWarning, RTRLError
from rtrl.learners import BPTT, DenseRTRL

FIRST = torch.tensor([True, False])
MAKES = {
    "dense": lambda: seeded(PlainRNN(2, 3), 0),
    "rows": lambda: seeded(rtrl.cells.MinGRU(2, 3).double(), 0),
    "analytic": lambda: seeded(rtrl.from_torch(nn.GRUCell(2, 3, dtype=torch.float64)), 0),
    "mixture": lambda: rtrl.RecurrentMoE(
        2, 2, 2, 3, 4, 1, n_heads=1, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ),
}


def along(learner: Any, xs: Tensor, start: int = 0) -> None:
    for t, x in enumerate(xs):
        learner.backward(squares(start + t, learner.step(x)))


# ---------------------------------------------------------------------- memory


class _Short(TorchDispatchMode):
    """Memory for tensors of a few samples only: others raise an error, as PyTorch does."""

    def __init__(self, most: int, error: BaseException) -> None:
        super().__init__()
        self.most, self.error, self.count = most, error, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.ndim and "tanh" in str(func) and len(first) > self.most:
            self.count += 1
            raise self.error
        return func(*args, **(kwargs or {}))


ERRORS = [
    MemoryError("none left"),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("together", [False, True], ids=["steps", "sequence"])
def test_a_block_that_is_too_large_for_memory_is_processed_in_pieces(error: BaseException, together: bool) -> None:
    cell, xs, resets = MAKES["dense"](), normal(1, 11, 2, 2), torch.zeros(11, 2, dtype=torch.bool)
    learner = rtrl.BlockRTRL(cell, 2, block=7, structure="off")
    resets[6] = FIRST
    along(learner, xs[:5])
    learner.backward(sum(squares(5 + k, y) for k, y in enumerate(learner.unroll(xs[5:6])))) if together else along(
        learner, xs[5:6], 5
    )
    learner.reset(FIRST)
    along(learner, xs[6:7], 6)
    with pytest.warns(PerformanceWarning, match="steps 0 … 6: not enough memory") as caught, _Short(4, error) as short:
        along(learner, xs[7:8], 7)
    assert len(caught) == 1 and short.count >= 2  # 7 steps, 4 steps, and then pieces of 2
    along(learner, xs[8:], 8)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares, resets=resets))


def test_memory_that_is_too_short_for_one_step_leaves_the_learner_as_it_was() -> None:
    cell, xs = MAKES["dense"](), normal(1, 8, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=3, structure="off")
    along(learner, xs[:3])
    with pytest.raises(MemoryError), pytest.warns(PerformanceWarning), _Short(1, MemoryError()):
        learner.sync()
    along(learner, xs[3:5], 3)
    with pytest.raises(torch.OutOfMemoryError), _Short(1, ERRORS[1]):
        learner.step(xs[5])  # it is no ShapeError
    along(learner, xs[5:], 5)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares))


# ---------------------------------------------------------------------- delivery and losses


@pytest.mark.parametrize("spoil", ["expanded", "inference", "shape"])
def test_a_grad_that_cannot_be_added_to_is_named_before_any_is(spoil: str) -> None:
    cell, xs = MAKES["dense"](), normal(1, 4, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=2)
    for p in cell.parameters():
        p.grad = torch.zeros_like(p)
    along(learner, xs)
    name, last = list(cell.named_parameters())[-1]
    if spoil == "shape":
        last.grad.data = torch.zeros(*last.shape, 1, dtype=last.dtype)  # type: ignore[union-attr]
    elif spoil == "expanded":
        last.grad = torch.zeros((), dtype=last.dtype).expand(last.shape)
    else:
        with torch.inference_mode():
            last.grad = torch.zeros_like(last)
    with pytest.raises(ConfigError, match=rf"the \.grad of parameter '{name}' cannot be added to.*Set it to None"):
        learner.sync()
    assert not any(bool(p.grad.any()) for p in cell.parameters() if p is not last)  # type: ignore[union-attr]
    last.grad = None
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares))


def test_a_grad_keeps_its_memory_when_it_is_added_to() -> None:
    cell = MAKES["dense"]()
    learner = rtrl.BlockRTRL(cell, 2)
    held = [torch.zeros_like(p) for p in cell.parameters()]
    for p, grad in zip(cell.parameters(), held, strict=True):
        p.grad = grad
    along(learner, normal(1, 3, 2, 2))
    learner.sync()
    assert all(p.grad is grad and bool(grad.any()) for p, grad in zip(cell.parameters(), held, strict=True))


@pytest.mark.parametrize("make", [lambda c: rtrl.BlockRTRL(c, 2, block=2), lambda c: BPTT(c, 2)], ids=["block", "bptt"])
def test_a_loss_whose_grad_was_removed_from_y_is_missed(make: Any) -> None:
    cell, xs = MAKES["dense"](), normal(1, 3, 2, 2)
    learner = make(cell)
    y = learner.step(xs[0])
    learner.backward(squares(0, y))
    kept, y.grad = y.grad, None
    with pytest.raises(LossError, match=r"a loss was added at step 0, and then the \.grad of its y was removed"):
        learner.sync()
    y.grad = kept
    along(learner, xs[1:], 1)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares))


class _Failing(nn.Module):
    """Raises an error of the user's in the forward or backward pass, when told to."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell, self.fails = cell, False

    def init_state(self, batch_size: int) -> Tensor:
        return self.cell.init_state(batch_size)  # type: ignore[operator, no-any-return]

    def forward(self, x: Tensor, h: Tensor) -> Any:
        if self.fails:
            raise Injected
        return self.cell(x, h)


@pytest.mark.parametrize("name", ["dense", "rows", "analytic"])
def test_an_error_in_the_cell_the_loss_or_a_hook_leaves_the_learner_exact(name: str) -> None:
    cell, xs = _Failing(MAKES[name]()), normal(1, 9, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=2)

    def fail(*args: Any) -> Any:
        raise Injected

    along(learner, xs[:4])
    cell.fails = True
    for call in (lambda: learner.step(xs[4]), lambda: learner.peek(xs[4]), learner.sync):
        with pytest.raises(Injected):
            call()
    cell.fails = False
    along(learner, xs[4:6], 4)
    y = learner.step(xs[6])
    loss, hook = squares(6, y), y.register_hook(fail)
    with pytest.raises(Injected):
        learner.backward(loss)
    hook.remove()
    learner.backward(squares(6, y))
    hook = next(cell.parameters()).register_post_accumulate_grad_hook(fail)
    with pytest.raises(Injected):
        learner.sync()
    hook.remove()
    assert all(p.grad is None for p in cell.parameters())
    along(learner, xs[7:], 7)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares))


# ---------------------------------------------------------------------- threads and forks


@contextmanager
def _waiting_cell() -> Iterator[tuple[_Failing, threading.Event, threading.Event]]:
    """A cell that waits in its forward pass until it is told to go on."""
    entered, go_on = threading.Event(), threading.Event()
    cell = _Failing(MAKES["dense"]())

    def wait(*args: Any) -> None:
        entered.set()
        go_on.wait(20)

    handle = cell.register_forward_pre_hook(wait)
    try:
        yield cell, entered, go_on
    finally:
        go_on.set()
        handle.remove()


@pytest.mark.parametrize("make", [lambda c: rtrl.BlockRTRL(c, 2, block=2), lambda c: DenseRTRL(c, 2)])
def test_a_learner_in_use_by_another_thread_refuses(make: Any) -> None:
    xs = normal(1, 6, 2, 2)
    with _waiting_cell() as (cell, entered, go_on):
        learner = make(cell)
        thread = threading.Thread(target=lambda: learner.step(xs[0]))
        thread.start()
        assert entered.wait(20)
        calls = {
            "step": lambda: learner.step(xs[0]),
            "sync": learner.sync,
            "reset": learner.reset,
            "discard": lambda: learner.reset(discard=True),
            "save": learner.state_dict,
            "peek": lambda: learner.peek(xs[0]),
        }
        for call in calls.values():
            with pytest.raises(RTRLError, match=r"in use by another thread\. A learner serves one thread at a time"):
                call()
        go_on.set()
        thread.join(20)
    assert learner.steps_taken == 1
    along(learner, xs[1:], 1)  # one after the other, threads may use it
    learner.sync()
    expected = oracles.bptt(cell, xs, lambda t, y: squares(t, y) if t else None)
    assert_gradients_equal(gradients(cell), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_a_forked_process_goes_on_with_a_learner_of_its_own() -> None:
    cell, xs = MAKES["dense"](), normal(1, 6, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=4)
    along(learner, xs[:3])
    child = os.fork()
    if child == 0:  # it exits with 0 if its gradient is exact
        try:
            along(learner, xs[3:], 3)
            learner.sync()
            assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares))
            os._exit(0)
        finally:
            os._exit(1)
    along(learner, xs[3:], 3)
    learner.sync()
    assert_gradients_equal(gradients(cell), oracles.bptt(cell, xs, squares))
    assert os.waitpid(child, 0)[1] == 0
