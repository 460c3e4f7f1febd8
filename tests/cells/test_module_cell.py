"""``from_torch`` of modules whose state is a tree of tensors."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers.running import gradients, run
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl import Sparsity
from rtrl.cells import from_torch
from rtrl.testing import cell_checks, check_cell

T, B, D_IN = 9, 2, 3
F64 = torch.float64


class Irregular(nn.Module):
    """State ((B, 3), (B, 2, 2)): a fast vector and a slow matrix, which feed each other."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.look = nn.Linear(D_IN, 3), nn.Linear(4, 3, bias=False)
        self.write = nn.Linear(3, 4)
        self.leak = nn.Parameter(torch.zeros(2, 1))

    def init_state(self, batch_size: int) -> Any:
        return torch.zeros(batch_size, 3), 0.5 * torch.eye(2).repeat(batch_size, 1, 1)

    def forward(self, x: Tensor, state: Any) -> Any:
        fast, slow = state
        fast = torch.tanh(self.enter(x) + self.look(slow.flatten(1)) - 0.5 * fast)
        keep = torch.sigmoid(self.leak)
        after = keep * slow + (1 - keep) * torch.tanh(self.write(fast)).reshape(-1, 2, 2)
        return {"fast": fast, "trace": after.diagonal(dim1=1, dim2=2).sum(1)}, (fast, after)


class Named(nn.Module):
    """State {"h": (B, 3), "memory": [(B,), Pair((B, 2), (B, 1, 3))]}; the next one is written in another order."""

    class Pair(NamedTuple):
        two: Tensor
        row: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.recur = nn.Linear(D_IN, 3), nn.Linear(3, 3)
        self.two = nn.Linear(5, 2)
        self.rate = nn.Parameter(torch.zeros(3))

    def first(self, batch_size: int) -> Any:
        pair = self.Pair(torch.ones(batch_size, 2), torch.full((batch_size, 1, 3), 0.3))
        return {"h": torch.zeros(batch_size, 3), "memory": [torch.full((batch_size,), -0.2), pair]}

    def forward(self, x: Tensor, state: Any) -> Any:
        h, (mean, pair) = state["h"], state["memory"]
        h = torch.tanh(self.enter(x) + self.recur(h) * mean.unsqueeze(1) + pair.row[:, 0] * self.rate)
        two = torch.tanh(self.two(torch.cat([h, pair.two], dim=1)))
        pair = self.Pair(two, 0.5 * pair.row + h.unsqueeze(1))
        return (h * pair.row[:, 0]), OrderedDict(memory=[0.9 * mean + h.mean(1), pair], h=h)


class Fused(nn.Module):
    """PyTorch's own cells inside, as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.GRUCell(D_IN, 3), nn.LSTMCell(3, 2)

    def init_state(self, batch_size: int) -> Any:
        return [torch.zeros(batch_size, 3), (torch.zeros(batch_size, 2), torch.zeros(batch_size, 2))]

    def forward(self, x: Tensor, state: Any) -> Any:
        below = self.below(x, state[0])
        above = self.above(below, state[1])
        return above[0], [below, above]


class Routed(nn.Module):
    """One expert of four a sample, chosen by the state; the state is the pair (h, usage)."""

    def __init__(self) -> None:
        super().__init__()
        self.route, self.enter = nn.Linear(3, 4), nn.Linear(D_IN, 3)
        self.expert = nn.Parameter(torch.empty(4, 3, 3))

    def init_state(self, batch_size: int) -> Any:
        return torch.full((batch_size, 3), 0.1), torch.zeros(batch_size, 4)

    def forward(self, x: Tensor, state: Any, replay: Sparsity | None = None) -> Any:
        h, usage = state
        scores = self.route(h) + x.sum(1, keepdim=True) * torch.arange(4) - usage
        used = scores.detach().topk(2, dim=1).indices if replay is None else replay.active["expert"]
        gate = scores.gather(1, used).softmax(1)
        moved = rtrl.cells.grouped_linear(h[:, None, None], self.expert, None, used).squeeze(2)
        h = torch.tanh(self.enter(x) + (gate.unsqueeze(2) * moved).sum(1))
        return h, (h, 0.5 * usage.scatter_add(1, used, gate)), Sparsity(active={"expert": used})


def named() -> nn.Module:
    module = Named()
    return from_torch(module, nn.Linear(3, 2), state=module.first)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "tuple": lambda: from_torch(Irregular()),
    "tuple, given": lambda: from_torch(Irregular(), state=(torch.full((1, 3), 0.4), torch.ones(1, 2, 2))),
    "nested, from a function": named,
    "nested, given": lambda: from_torch(Named(), state=Named().first(1)),
    "fused": lambda: from_torch(Fused(), nn.Linear(2, 2)),
    "routed": lambda: from_torch(Routed()),
}
each = pytest.mark.parametrize("name", CELLS)


def made(name: str) -> tuple[nn.Module, Tensor]:
    xs = torch.randn(T, B, D_IN, dtype=F64, generator=torch.Generator().manual_seed(5))
    return seeded(CELLS[name](), 2, scale=1.0), xs


def loss(t: int, y: Any) -> Tensor | None:
    if t % 3 == 1:
        return None
    return (1 + t) * sum(leaf.sin().sum() for leaf in (y.values() if isinstance(y, dict) else [y]))


def alone(cell: nn.Module, xs: Tensor) -> Tensor:
    """The summed loss of the module itself, unrolled without the adapter."""
    first = cell.unpack(cell.init_state(B))
    state, total = first, torch.zeros((), dtype=F64)
    for t, x in enumerate(xs):
        y, state = cell.cell(x, state)[:2]
        value = loss(t, cell.readout(y))
        total = total if value is None else total + value
    return total


@each
def test_it_learns_what_the_module_alone_would(name: str) -> None:
    cell, xs = made(name)
    found = run(cell, xs, loss, block=4)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss))
    wanted, influences = oracles.dense_rtrl(cell, xs, loss, return_influence=True)
    assert_gradients_equal(found.gradients, wanted)
    assert_influences_equal(found.influences, influences[-1])
    alone(cell, xs).backward()
    assert_gradients_equal(found.gradients, gradients(cell))


@each
def test_every_step_is_that_of_the_module(name: str) -> None:
    cell, xs = made(name)
    h = cell.init_state(B)
    state = cell.unpack(h)
    for x in xs:
        y, h = cell(x, h)[:2]
        wanted, state = cell.cell(x, state)[:2]
        torch.testing.assert_close(y, _map(cell.readout, wanted), rtol=0, atol=0)
        assert h.ndim == 2 and torch.equal(h, cell.pack(state))
        torch.testing.assert_close(cell.unpack(h), _ordered(state), rtol=0, atol=0)


def _map(readout: nn.Module, y: Any) -> Any:
    return y if isinstance(readout, nn.Identity) else readout(y)


def _ordered(state: Any) -> Any:
    return {"h": state["h"], "memory": state["memory"]} if isinstance(state, dict) else state


@each
def test_it_keeps_the_contract(name: str) -> None:
    cell, xs = made(name)
    report = check_cell(cell, list(xs[:3]))
    assert report.checks == cell_checks() and not report.skipped


@each
def test_the_module_is_used_in_place_and_left_as_it_was(name: str) -> None:
    cell, xs = made(name)
    module = cell.cell
    attributes, before = set(vars(module)), copy.deepcopy(module.state_dict())
    run(cell, xs[:3], loss, block=2)
    assert set(vars(module)) == attributes
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [n for n in cell.state_dict() if n.startswith("cell.")] == [f"cell.{n}" for n in module.state_dict()]
    assert all(dict(cell.named_parameters())[f"cell.{n}"] is p for n, p in module.named_parameters())


@pytest.mark.parametrize("name", [name for name in CELLS if name != "nested, from a function"])
def test_a_copy_and_a_pickled_cell_go_on_alike(name: str) -> None:
    cell, xs = made(name)
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        assert torch.equal(other.init_state(3), cell.init_state(3))
        assert torch.equal(other(xs[0], other.init_state(B))[1], cell(xs[0], cell.init_state(B))[1])


@each
def test_dtype_and_device_are_those_of_the_parameters(name: str, device: torch.device) -> None:
    if name == "routed" and device.type != "cpu":
        pytest.skip("its arange is on the CPU")
    cell, _ = made(name)
    for dtype in (torch.float32, F64):
        cell = cell.to(device, dtype)
        h = cell.init_state(B)
        h_next = cell(torch.ones(B, D_IN, dtype=dtype, device=device), h)[1]
        assert h.dtype == h_next.dtype == dtype
        assert h.device.type == h_next.device.type == device.type


def test_the_state_given_wins_over_the_modules_own_and_is_a_copy() -> None:
    own = (torch.full((1, 3), 0.4), torch.arange(4.0).reshape(1, 2, 2))
    cell = from_torch(Irregular(), state=own)
    with torch.no_grad():
        own[0].fill_(9.0)
    expected = torch.tensor([0.4, 0.4, 0.4, 0, 1, 2, 3]).repeat(2, 1)
    assert torch.equal(cell.init_state(2), expected)
    assert not cell.init_state(2).requires_grad


def test_leaves_lie_side_by_side_in_the_order_of_the_tree() -> None:
    cell = named()
    h = torch.arange(2.0 * 9).reshape(2, 9)
    state = cell.unpack(h)
    assert [(k, type(v)) for k, v in state.items()] == [("h", Tensor), ("memory", list)]
    assert isinstance(state["memory"][1], Named.Pair)
    mean, (two, row) = state["memory"]
    assert [tuple(t.shape) for t in (state["h"], mean, two, row)] == [(2, 3), (2,), (2, 2), (2, 1, 3)]
    assert torch.equal(torch.cat([state["h"], mean[:, None], two, row[:, 0]], dim=1), h)
    assert torch.equal(cell.pack(state), h)


def test_a_state_of_one_tensor_is_a_tree_too() -> None:
    class Lone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recur = nn.Linear(4, 4)

        def forward(self, x: Tensor, state: Tensor) -> Any:
            after = torch.tanh(self.recur(state.flatten(1)).reshape(state.shape) + x[:, :2, None])
            return after.sum(2), after

    cell = seeded(from_torch(Lone(), state=torch.zeros(1, 2, 2)), 0)
    xs = torch.randn(T, B, D_IN, dtype=F64)
    assert cell.unpack(cell.init_state(B)).shape == (B, 2, 2)
    assert_gradients_equal(run(cell, xs, loss, block=4).gradients, oracles.bptt(cell, xs, loss))


def test_what_is_active_goes_both_ways_under_the_names_of_each() -> None:
    cell, xs = made("routed")
    y, _, used = cell(xs[0], cell.init_state(B))
    assert used.reads is None and used.writes is None and list(used.active) == ["cell.expert"]
    other = (used.active["cell.expert"] + 1) % 4
    replay = Sparsity(active={"cell.expert": other})
    moved, _, again = cell(xs[0], cell.init_state(B), replay=replay)
    assert torch.equal(again.active["cell.expert"], other)
    assert not torch.equal(moved, y)
    learner = rtrl.BlockRTRL(cell, B, block=2)
    assert torch.equal(learner.step(xs[0], replay=replay), moved)


def test_a_module_that_takes_no_replay_is_not_said_to() -> None:
    learner = rtrl.BlockRTRL(made("tuple")[0], B)
    with pytest.raises(rtrl.errors.ConfigError, match="takes no replay"):
        learner.step(torch.ones(B, D_IN, dtype=F64), replay=Sparsity())


def test_resets_start_from_the_trees_first_state() -> None:
    cell, xs = made("tuple, given")
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4, 1] = resets[6, 0] = True
    found = run(cell, xs, loss, block=4, resets=resets)
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss, resets=resets))
