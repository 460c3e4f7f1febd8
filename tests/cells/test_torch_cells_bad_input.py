"""``from_torch`` refuses what it cannot take, and says what to do instead."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rtrl
from rtrl import Sparsity
from rtrl.cells import from_torch
from rtrl.errors import CellError, ConfigError, ShapeError, SparsityError

B = 2


class Pair(nn.Module):
    """State (h, {"c": c}) with ``change`` applied to what it returns."""

    def __init__(self, change: Any = lambda out: out) -> None:
        super().__init__()
        self.recur, self.change = nn.Linear(3, 3), change

    def init_state(self, batch_size: int) -> Any:
        return torch.zeros(batch_size, 3), {"c": torch.zeros(batch_size, 2, 2)}

    def forward(self, x: Tensor, state: Any) -> Any:
        h = torch.tanh(self.recur(state[0]) + x)
        return self.change((h, (h, {"c": state[1]["c"] + 1})))


class Stateless(nn.Module):
    def forward(self, x: Tensor, state: Any) -> Any:
        return x, state


REFUSED = {
    "bidirectional": (lambda: nn.GRU(3, 4, bidirectional=True), "bidirectional=True: .* needs the future"),
    "dropout": (lambda: nn.LSTM(3, 4, 2, dropout=0.5), r"dropout=0\.5: .* set it to 0, or .* masks in x"),
    "no layers": (list, "at least one layer"),
    "no layers in a ModuleList": (nn.ModuleList, "at least one layer"),
    "another module among the layers": (lambda: [nn.GRUCell(3, 4), nn.Linear(4, 4)], "layer 1 is Linear; .*Stack"),
    "no module among the layers": (lambda: [nn.GRUCell(3, 4), None], "layer 1 is NoneType"),
    "layered modules as layers": (lambda: [nn.GRU(3, 4), nn.GRU(4, 4)], "layer 0 is GRU; .*Stack"),
    "one layer twice": (lambda: [nn.RNNCell(3, 3)] * 2, "layer 1 is the same module .* share weights"),
    "widths that differ": (
        lambda: [nn.GRUCell(3, 4), nn.LSTMCell(4, 5), nn.RNNCell(4, 4)],
        "h of layer 1 has width 5, but layer 2 takes x of width 4",
    ),
    "no module": (lambda: 3, "from_torch takes .*, got int"),
    "a name": (lambda: "GRUCell", "from_torch takes .*, got str"),
    "a class": (lambda: nn.GRUCell, "from_torch takes .*, got type"),
    "no first state": (Stateless, r"init_state\(batch_size\) or state=\.\.\., got Stateless"),
}


@pytest.mark.parametrize(("make", "match"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_cell_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_torch(make())


@pytest.mark.parametrize("make", [lambda: nn.GRUCell(3, 4), lambda: [nn.GRUCell(3, 4)], lambda: nn.LSTM(3, 4)])
def test_a_first_state_is_for_modules_of_your_own(make: Any) -> None:
    with pytest.raises(ConfigError, match="state= is for other modules"):
        from_torch(make(), state=torch.zeros(1, 4))


STATES = {
    "integers": ((torch.zeros(1, 3), torch.zeros(1, 2, dtype=torch.int64)), r"state\[1\] is torch\.int64 \(1, 2\)"),
    "not of one sample": ({"h": torch.zeros(2, 3)}, r"state\['h'\] is torch\.float32 \(2, 3\)"),
    "without a batch": ((torch.tensor(0.0),), r"state\[0\] is torch\.float32 \(\)"),
    "no tensor": ({"h": torch.zeros(1, 3), "t": 0}, r"state\['t'\] is int"),
    "none": ((torch.zeros(1, 3), None), r"state\[1\] is NoneType"),
    "a string": ("zeros", "state is str"),
    "empty": ((), "at least one entry"),
    "without entries": ((torch.zeros(1, 0),), "at least one entry"),
    "from a function": (lambda batch_size: [torch.zeros(5, 3)], r"state\[0\] is torch\.float32 \(5, 3\)"),
}


@pytest.mark.parametrize(("state", "match"), STATES.values(), ids=STATES)
def test_a_first_state_of_another_form_is_refused_by_name(state: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        from_torch(Stateless(), state=state)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None])
@pytest.mark.parametrize("make", [Pair, lambda: nn.GRU(3, 4)])
def test_impossible_batches_are_refused(make: Any, size: Any) -> None:
    with pytest.raises(ConfigError, match="batch_size must be a positive integer"):
        from_torch(make()).init_state(size)


def test_a_first_state_that_does_not_follow_the_batch_is_refused() -> None:
    cell = from_torch(Stateless(), state=lambda batch_size: (torch.zeros(1, 3), torch.zeros(batch_size, 2)))
    with pytest.raises(CellError, match=r"state\[0\] must be a tensor of shape \(4, 3\) .* \(1, 3\)"):
        cell.init_state(4)


def _swap(out: Any, leaf: Any, place: int) -> Any:
    h, rest = out[1]
    return out[0], (leaf, rest) if place == 0 else (h, {"c": leaf})


BROKEN = {
    "no pair": (lambda out: out[0], CellError, r"Pair must return \(y, next_state\) or .*, got Tensor"),
    "four items": (lambda out: (*out, None, None), CellError, "got a tuple of 4"),
    "the state alone": (lambda out: out[1], CellError, r"the state lacks state\[0\]"),
    "a leaf missing": (lambda out: (out[0], (out[1][0], {})), CellError, r"the state lacks state\[1\]\['c'\]"),
    "a leaf too many": (lambda out: (out[0], (*out[1], out[0])), CellError, r"unexpected state\[2\]"),
    "another key": (lambda out: (out[0], (out[1][0], {"d": out[1][1]["c"]})), CellError, r"lacks state\[1\]\['c'\]"),
    "another shape": (
        lambda out: _swap(out, out[1][1]["c"].flatten(1), 1),
        CellError,
        r"state\[1\]\['c'\] must be a tensor of shape \(2, 2, 2\) at every step, got torch\.float32 \(2, 4\)",
    ),
    "another batch": (
        lambda out: _swap(out, out[1][0][:1], 0),
        CellError,
        r"state\[0\] must be .* \(2, 3\) .*\(1, 3\)",
    ),
    "another dtype": (
        lambda out: _swap(out, out[1][1]["c"].double(), 1),
        CellError,
        r"state\[1\]\['c'\] must be torch\.float32 on cpu, got torch\.float64",
    ),
    "another dtype in the first leaf": (
        lambda out: _swap(out, out[1][0].double(), 0),
        CellError,
        r"state\[0\] must be torch\.float32 on cpu, got torch\.float64",
    ),
    "another device": (
        lambda out: _swap(out, out[1][0].to("meta"), 0),
        CellError,
        r"state\[0\] must be torch\.float32 on cpu, got .* on meta",
    ),
    "no tensor": (lambda out: _swap(out, 1.0, 0), CellError, r"state\[0\] must be a tensor .*, got float"),
    "no sparsity": (lambda out: (*out, {}), SparsityError, r"must be rtrl\.Sparsity"),
    "no mapping": (lambda out: (*out, Sparsity(active=[])), SparsityError, "a mapping as active"),
    "reads": (lambda out: (*out, Sparsity(reads=ROW)), SparsityError, "declares reads or writes, .* active alone"),
    "writes": (lambda out: (*out, Sparsity(writes=ROW)), SparsityError, "declares reads or writes, .* active alone"),
}
ROW = torch.zeros(B, 1, dtype=torch.int64)


@pytest.mark.parametrize(("change", "error", "match"), BROKEN.values(), ids=BROKEN)
def test_a_step_that_breaks_its_word_is_refused_by_name(change: Any, error: Any, match: str) -> None:
    cell = from_torch(Pair(change))
    with pytest.raises(error, match=match):
        cell(torch.ones(B, 3), cell.init_state(B))
    learner = rtrl.BlockRTRL(cell, B, block=3)
    with pytest.raises(error, match=match):
        learner.step(torch.ones(B, 3))
    assert learner.steps_taken == 0


@pytest.mark.parametrize("cell", [from_torch(Pair()), from_torch([nn.LSTMCell(3, 3), nn.RNNCell(3, 1)])])
def test_states_that_cannot_be_packed_or_unpacked_are_refused(cell: Any) -> None:
    h = cell.init_state(B)
    for wrong in (h[:, 1:], h[0], h.unsqueeze(1)):
        with pytest.raises(ShapeError, match=r"a packed state must have shape \(B, 7\)"):
            cell.unpack(wrong)
        with pytest.raises(ShapeError, match=r"a packed state must have shape \(B, 7\)"):
            cell(torch.ones(B, 3), wrong)
    tree = cell.unpack(h)
    with pytest.raises(ShapeError, match=r"the state lacks state\[1\]"):
        cell.pack(tree[:1])
    with pytest.raises(ShapeError, match="the state lacks"):
        cell.pack(None)
    with pytest.raises(ShapeError, match=r"state\[1\].* must be a tensor of shape \(2, .* got NoneType"):
        cell.pack((tree[0], {"c": None} if isinstance(tree[1], dict) else None))
