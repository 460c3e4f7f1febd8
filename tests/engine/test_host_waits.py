"""What a host reads of a device while a learner runs: one flag a block, and no index of its own goes there.

The device of these tests is PyTorch's "meta", whose tensors have no numbers: whatever reads one fails. With ``--device
cuda`` the same is asked of torch's own sync debug mode. That the checks are still made, and what they say, is tested on
the CPU, with a host that believes that it cannot read there.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.running import gradients
from helpers.strategies import normal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rtrl
from rtrl._engine import deferred, row_linearizer, unitwise
from rtrl._engine import step as forward_step
from rtrl._influence.structure import Structure
from rtrl.errors import NonFiniteError
from rtrl.learners import DenseRTRL

CELLS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: rtrl.from_torch(nn.GRUCell(2, 3), nn.Linear(3, 2)),
    "plain": lambda: seeded(PlainRNN(2, 3), 1).float(),
    "mingru": lambda: rtrl.cells.MinGRU(2, 3),
}


class Reads:
    """Stands for ``deferred.read``; counts the calls, and says that all is well."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, flag: Tensor) -> bool:
        self.count += 1
        return True


class NoTraffic(TorchDispatchMode):
    """Fails where a tensor of the host with entries meets one of the device, but for a copy that nobody waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [t for t in tensors if t.is_cpu and (t.ndim or func is torch.ops.aten._to_copy.default)]
        there = any(t.is_meta for t in tensors) or torch.device(kwargs.get("device") or "cpu").type == "meta"
        assert not (here and there) or kwargs.get("non_blocking"), f"{func} takes {here}"
        return func(*args, **kwargs)


def there(structure: Structure | None, monkeypatch: pytest.MonkeyPatch) -> Structure | None:
    """A structure on the device, where what is asked once as it is made is not so."""
    if structure is None:
        return None
    with monkeypatch.context() as patched:
        patched.setattr(torch, "equal", lambda *_: False)
        moved = structure.to(torch.device("meta"))
    monkeypatch.setattr(Structure, "to", lambda self, device: self)
    return moved


@pytest.mark.parametrize("batch_size", [2])
@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("name", CELLS)
def test_the_host_reads_one_flag_a_block(
    name: str, block: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read once for each kind of block was read before, on a learner of the CPU."""
    monkeypatch.setattr(unitwise, "_LEAST_NUMBERS", 0)
    model = rtrl.BlockRTRL(CELLS[name](), batch_size, block=block)
    for x in torch.zeros(2 * block + 1, batch_size, 2):
        model.backward(model.step(x).square().sum())
    assert name == "gru" or model.structure is not None or any(model._linearizer._verified.values()), "a form is found"
    monkeypatch.setattr(row_linearizer, "find_structure", lambda *_: there(model.structure, monkeypatch))
    reads = Reads()
    monkeypatch.setattr(deferred, "read", reads)
    monkeypatch.setattr(forward_step, "check_purity", lambda *_: None)
    with deferred.deferring(deferred.Deferred()):
        learner = rtrl.BlockRTRL(model.cell.to("meta"), batch_size, block=block)
    learner._linearizer._verified = model._linearizer._verified
    xs = torch.zeros(batch_size, 2, device="meta")
    for _ in range(block + 1):
        learner.backward(learner.step(xs).square().sum())
    reads.count = 0
    with NoTraffic():
        for _ in range(3 * block):
            learner.backward(learner.step(xs).square().sum())
            if not learner.at_block_end:  # there, the host must know who restarts
                learner.reset(torch.zeros(batch_size, dtype=torch.bool, device="meta"))
    assert reads.count == (3 if model.structure is None else 6)
    reads.count = 0
    if block > 1:
        with NoTraffic():
            learner.backward(learner.unroll(xs.expand(block - 1, batch_size, 2)).square().sum())
    assert not reads.count


def test_traffic_is_found() -> None:
    there = torch.zeros(3, device="meta")
    with NoTraffic():
        with pytest.raises(AssertionError, match="takes"):
            there[torch.tensor([1])]
        with pytest.raises(AssertionError, match="takes"):
            torch.zeros(3).to("meta")
        assert torch.zeros(3).to("meta", non_blocking=True).is_meta
    with pytest.raises(RuntimeError, match="meta"):
        there.sum().item()


@pytest.mark.parametrize("name", CELLS)
def test_torch_finds_no_host_that_waits(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the one flag a block, by ``torch.cuda.set_sync_debug_mode``."""
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    read = deferred.read

    def unwatched(flag: Tensor) -> bool:
        torch.cuda.set_sync_debug_mode("default")
        try:
            return read(flag)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    learner = rtrl.BlockRTRL(CELLS[name]().to(device), 2, block=4)
    xs = torch.zeros(24, 2, 2, device=device)
    monkeypatch.setattr(deferred, "read", unwatched)
    try:
        for t, x in enumerate(xs):
            torch.cuda.set_sync_debug_mode("error" if t > 8 else "default")
            learner.backward(learner.step(x).square().sum())
    finally:
        torch.cuda.set_sync_debug_mode("default")


# ---------------------------------------------------------------------- the checks are made all the same


@pytest.fixture
def blind_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that cannot read a tensor without waiting, though it lies on the CPU."""
    monkeypatch.setattr(deferred, "on_host", lambda value: False)


def run(learner: rtrl.learners.Learner, xs: Tensor, scale: float = 1.0) -> None:
    for x in xs:
        learner.backward(learner.step(x).square().sum() * scale)


@pytest.mark.parametrize("name", CELLS)
def test_gradients_are_those_of_a_host_that_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for blind in (False, True):
        if blind:
            monkeypatch.setattr(deferred, "on_host", lambda value: False)
        learner = rtrl.BlockRTRL(seeded(CELLS[name]().double(), 0), 2, block=3, audit="first")
        run(learner, normal(0, 8, 2, 2))
        learner.sync()
        assert learner.audits.count
        found.append(gradients(learner.cell))
    assert all(torch.equal(found[0][key], value) for key, value in found[1].items())


@pytest.mark.usefixtures("blind_host")
@pytest.mark.parametrize(
    "make", [lambda cell: rtrl.BlockRTRL(cell, 2, block=3), lambda cell: DenseRTRL(cell, 2)], ids=["block", "dense"]
)
def test_what_is_not_finite_is_named_when_the_block_closes(make: Callable[[nn.Module], Any]) -> None:
    learner = make(seeded(PlainRNN(2, 3), 0))
    xs = normal(0, 3, 2, 2)
    run(learner, xs)
    learner.sync()
    before = gradients(learner.cell)
    learner.step(xs[0] / 0)
    with pytest.raises(NonFiniteError, match="in x at step 3, first at index"):
        learner.sync()
    learner.reset(discard=True)
    assert all(torch.equal(before[name], value) for name, value in gradients(learner.cell).items())
    learner.backward(learner.step(xs[0]).sum() / 0)
    with pytest.raises(NonFiniteError, match=r"loss.* at step 4"):
        learner.sync()
    learner.reset(discard=True)
    run(learner, xs)
    learner.sync()


@pytest.mark.usefixtures("blind_host")
def test_a_sum_that_overflows_is_no_error() -> None:
    """The flag says that something may be wrong; looked at one by one, nothing is."""
    cell = seeded(PlainRNN(2, 3), 0)
    learner = rtrl.BlockRTRL(cell, 1, block=2, audit="first")
    y = learner.step(torch.full((1, 2), 1e308, dtype=torch.float64) * 0.9)
    learner.backward(y.sum())
    learner.sync()
    assert learner.audits.count == 1 and bool(gradients(cell)["head.bias"].any())


@pytest.mark.usefixtures("blind_host")
def test_what_looks_ahead_or_apart_is_checked_at_once() -> None:
    learner = rtrl.BlockRTRL(seeded(PlainRNN(2, 3), 0), 2, block=3)
    y = learner.step(normal(0, 2, 2))
    with pytest.raises(NonFiniteError, match="one step ahead of step 0"):
        learner.peek(normal(0, 2, 2) / 0)
    with pytest.raises(NonFiniteError, match="the loss 'v' at step 0"):
        learner.gradients({"v": y.sum() / 0})
