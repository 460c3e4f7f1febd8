"""Cells that break their contract are refused before anything has changed.

A broken cell is good until its ``broken`` is set. What it breaks must be refused at the step itself or when the block
closes, as the table says, and once it is whole again the learner goes on as if nothing had been.
"""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.adversarial_inputs import D_IN, F64, NAN, B, Breakable, Plain, Step, check, make, refused, rows, stream
from torch import Tensor, nn

import rtrl
from rtrl import Sparsity
from rtrl.errors import CellError, NonFiniteError, SparsityError

# ---------------------------------------------------------------------- what a step returns


def declares(**changed: Any) -> Step:
    return lambda cell, x, h: (*cell.good(x, h)[:2], cell.good(x, h)[2]._replace(**changed))


def returns(change: Callable[..., Any]) -> Step:
    return lambda cell, x, h: change(*cell.good(x, h))


ALL = torch.arange(3).expand(B, 3)
RETURNED = {
    "one item": (returns(lambda y, h, s: h), CellError, r"must return \(y, h_next\) or .*got Tensor"),
    "a list": (returns(lambda y, h, s: [y, h]), CellError, "got list"),
    "four items": (returns(lambda y, h, s: (y, h, s, 0)), CellError, "got tuple"),
    "no state": (returns(lambda y, h, s: (y, None)), CellError, "h_next must be a tensor, got NoneType"),
    "no Sparsity": (returns(lambda y, h, s: (y, h, tuple(s))), CellError, "must be rtrl.Sparsity, got tuple"),
    "state shape": (returns(lambda y, h, s: (y, h[:, :2])), CellError, r"step 4: .*\(2, 3, 2\) .* into \(2, 2, 2\)"),
    "state batch": (returns(lambda y, h, s: (y, h[:1])), CellError, r"step 4: .*into \(1, 3, 2\)"),
    "state dtype": (returns(lambda y, h, s: (y, h.float())), CellError, "step 4: .*float64 cpu into .*float32 cpu"),
    "state device": (
        returns(lambda y, h, s: (y, h.to("meta"))),
        CellError,
        "step 4: .* cpu into .* meta; a state must keep",
    ),
    "y reduced": (
        returns(lambda y, h, s: (y.sum(), h)),
        CellError,
        r"step 4: each tensor of y must have the batch of 2.*shape \(\)",
    ),
    "y leaf reduced": (
        returns(lambda y, h, s: ({"y": y, "k": y.mean(0)[:1]}, h)),
        CellError,
        r"step 4: .*shape \(1,\)",
    ),
    "nan in y": (returns(lambda y, h, s: (y * NAN, h)), NonFiniteError, "in y at step 4"),
    "infinity in the state": (returns(lambda y, h, s: (y, h / 0.0)), NonFiniteError, "the next state at step 4"),
    "a decaying row": (
        returns(lambda y, h, s: (y, torch.cat([h[:, :2], 0.9 * h[:, 2:]], 1), s)),
        SparsityError,
        "step 4: row 2 .*sample 0",
    ),
    "out of range": (declares(writes=rows(ALL, 3)), SparsityError, r"Sparsity.writes must lie in 0 … 2, got 3"),
    "negative": (declares(reads=rows(ALL, 0, -1)), SparsityError, r"Sparsity.reads must lie in 0 … 2, got -1"),
    "repeated": (
        declares(reads=rows(ALL, 0, 0)),
        SparsityError,
        r"Sparsity.reads repeats an index within sample 0: \[0, 0\]",
    ),
    "int32": (declares(reads=ALL.int()), SparsityError, "Sparsity.reads must be a LongTensor.*int32"),
    "a mask": (declares(writes=ALL > 0), SparsityError, "Sparsity.writes must be a LongTensor.*bool"),
    "no tensor": (declares(reads=[0, 1]), SparsityError, "Sparsity.reads must be a LongTensor.*got list"),
    "not per sample": (
        declares(writes=torch.arange(3)),
        SparsityError,
        r"Sparsity.writes must have shape \(2, k\), got \(3,\)",
    ),
    "of one sample": (
        declares(writes=ALL[:1]),
        SparsityError,
        r"Sparsity.writes must have shape \(2, k\), got \(1, 3\)",
    ),
    "on another device": (declares(reads=ALL.to("meta")), SparsityError, "Sparsity.reads is on meta, the state on cpu"),
    "unknown parameter": (declares(active={"nobody": ALL}), SparsityError, "names 'nobody', which is not a parameter"),
    "active none": (declares(active=None), SparsityError, "Sparsity.active must map parameter names .*got NoneType"),
    "active a list": (declares(active=[("experts", ALL)]), SparsityError, "Sparsity.active must map .*got list"),
    "slice out of range": (
        declares(active={"experts": ALL + 1}),
        SparsityError,
        r"active\['experts'\] must lie in 0 … 2, got 1 … 3",
    ),
    "slice of a float": (
        declares(active={"experts": ALL.double()}),
        SparsityError,
        r"active\['experts'\] must be a LongTensor",
    ),
    "slice repeated": (
        declares(active={"experts": ALL * 0}),
        SparsityError,
        r"active\['experts'\] repeats an index within sample 0",
    ),
}


@pytest.mark.parametrize(("bad", "error", "match"), [pytest.param(*case, id=id) for id, case in RETURNED.items()])
def test_a_step_that_returns_something_wrong_is_refused(bad, error, match):
    check(bad, error, match)


def test_every_index_tensor_is_checked():
    pool = [torch.zeros(B, 1, dtype=torch.int64) for _ in range(200)]
    apart, i, j = min((id(a) ^ id(b), i, j) for i, a in enumerate(pool) for j, b in enumerate(pool[:i]))
    cell = Breakable(lambda cell, x, h: (*cell.good(x, h)[:2], Sparsity(active={"first": pool[i], "second": pool[j]})))
    cell.first, cell.second = (nn.Parameter(torch.zeros(size, 1, dtype=F64)) for size in (4, 4 ^ apart))
    cell.broken = True
    pool[j].fill_(10**6)
    with pytest.raises(SparsityError, match=r"active\['second'\] must lie in"):
        rtrl.BlockRTRL(cell, B).step(stream()[0])


# ---------------------------------------------------------------------- impure cells, found at the first step


def _counts(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    cell.count.add_(1.0)
    return cell.good(x, h)


def _keeps_count(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    cell.count = cell.count + 1.0
    y, h, sparsity = cell.good(x, h)
    return y * cell.count, h, sparsity


def _shrinks(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    with torch.no_grad():
        cell.recur.weight.mul_(0.9)
    return cell.good(x, h)


def _drops(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h, sparsity = cell.good(x, h)
    return cell.dropout(y), h, sparsity


def _normalises(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h, sparsity = cell.good(x, h)
    return cell.norm(y), h, sparsity


def _draws(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h, sparsity = cell.good(x, h)
    return y * random.random(), h, sparsity


OWN = "changes a parameter or buffer of its own in place"
IMPURE = [
    pytest.param(_drops, "draws random numbers.*bernoulli.*call cell.eval", id="dropout"),
    pytest.param(lambda cell, x, h: cell.good(x + torch.randn_like(x), h), "draws random numbers.*randn", id="noise"),
    pytest.param(_counts, OWN, id="buffer"),
    pytest.param(_normalises, OWN, id="batch norm"),
    pytest.param(lambda cell, x, h: cell.good(x.mul_(2.0), h), "changes x in place", id="x"),
    pytest.param(lambda cell, x, h: cell.good(x, h.mul_(0.5)), "changes the state h in place", id="state"),
    pytest.param(_shrinks, OWN, id="parameter"),
    pytest.param(_keeps_count, "replaces a parameter or buffer of its own", id="buffer assigned"),
]


@pytest.mark.parametrize(("bad", "match"), IMPURE)
def test_an_impure_cell_is_refused_at_the_first_step(bad, match):
    check(bad, CellError, match, at=0)


# ---------------------------------------------------------------------- found when the block closes


def _reads_more(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h_next, sparsity = cell.good(x, h)
    return y, h_next, sparsity._replace(reads=rows(x, 0))


def _y_reads_more(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h_next, sparsity = cell.good(x, h)
    return y + h[:, 2], h_next, sparsity


def _uses_more(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h_next, sparsity = cell.good(x, h)
    return y, h_next, sparsity._replace(active={"experts": (sparsity.active["experts"] + 1) % 3})


def _whole(change: Callable[[Breakable, Tensor, Tensor], Tensor]) -> Step:
    """A dense step: h' = tanh(h + change(cell, x, h)), which writes every row."""

    def step(cell: Breakable, x: Tensor, h: Tensor) -> Any:
        h = torch.tanh(h + change(cell, x, h))
        return cell.head(h[:, :2].flatten(1)), h

    return step


def _y(change: Callable[[Breakable, Tensor, Tensor], Tensor]) -> Step:
    """A good step whose y is changed: y' = change(cell, x, y)."""

    def step(cell: Breakable, x: Tensor, h: Tensor) -> Any:
        y, h, sparsity = cell.good(x, h)
        return change(cell, x, y), h, sparsity

    return step


def _writes_more(cell: Breakable, x: Tensor, h: Tensor) -> Any:
    y, h, sparsity = cell.good(x, h)
    return y, torch.cat([h[:, :2], h[:, 2:] + cell.zero * x[:, None, :2]], dim=1), sparsity


DIFFERENT = "re-running these steps as one batch gave a different state"
CLOSING = [  # name, step, error, message, block sizes
    (
        "reads of the next state",
        _reads_more,
        SparsityError,
        "step 4: the written rows of sample 0 depend on row 1",
        (1, 3),
    ),
    (
        "reads of y",
        _y_reads_more,
        SparsityError,
        "4.*: y depends on rows of the state outside the declared reads",
        (1, 3),
    ),
    (
        "slices",
        _uses_more,
        SparsityError,
        "steps 4 … .: a slice of parameter 'experts' was used that Sparsity.active does not declare",
        (1, 3),
    ),
    (
        "sqrt(0) of h",
        _whole(lambda c, x, h: (h - h).sqrt()),
        NonFiniteError,
        "Jacobian.*step 4",
        (1, 3),
    ),
    (
        "sqrt(0) of W x",
        _whole(lambda c, x, h: c.other(x[:, None, :2]).sqrt()),
        NonFiniteError,
        "immediate Jacobian of parameter 'other.weight', step 4, sample 0",
        (1, 3),
    ),
    (
        "sqrt(0) of θ",
        _whole(lambda c, x, h: c.zero.sqrt() * h),
        NonFiniteError,
        "steps? 4( … 5)?: NaN or infinity in the gradient of parameter 'zero'",
        (1, 3),
    ),
    (
        "sqrt(0) of θ in y",
        _y(lambda c, x, y: y + c.zero.sqrt()),
        NonFiniteError,
        "steps? 4( … 5)?: NaN or infinity in the gradient of parameter 'zero'",
        (1, 3),
    ),
    ("mixes", _whole(lambda c, x, h: -h.mean(0)), CellError, f"{DIFFERENT}|mixes samples", (1, 3)),
    (
        "mixes in one direction",
        _whole(lambda c, x, h: h.cumsum(0)),
        CellError,
        f"{DIFFERENT}|mixes samples",
        (1, 3),
    ),
    ("mixes y", _y(lambda c, x, y: y.softmax(0)), CellError, "mixes samples", (3,)),
    ("mixes y by x", _y(lambda c, x, y: y * x.mean()), CellError, "y", (3,)),
    ("branches", _whole(lambda c, x, h: h if x.shape[0] == B else -h), CellError, DIFFERENT, (3,)),
    ("branches in y", _y(lambda c, x, y: y if x.shape[0] == B else -y), CellError, "y", (3,)),
    ("dropout", _drops, CellError, "random|y", (1, 3)),
    ("random numbers of Python's own", _draws, CellError, "y", (1, 3)),
    ("writes", _writes_more, SparsityError, "step 4: row 2", (1, 3)),
]


def _closing_cases() -> list[Any]:
    return [
        pytest.param(bad, error, match, block, id=f"{name}, block {block}")
        for name, bad, error, match, blocks in CLOSING
        for block in blocks
    ]


@pytest.mark.parametrize(("bad", "error", "match", "block"), _closing_cases())
def test_a_broken_step_is_found_when_its_block_closes(bad, error, match, block):
    check(bad, error, match, block=block, closing=True)


@pytest.mark.parametrize("block", [1, 3])
def test_a_zero_parameter_that_moves_an_undeclared_row_is_found_at_the_first_block(block):
    check(_writes_more, SparsityError, "step 0: row 2 of the state of sample 0", at=0, block=block, closing=True)


@pytest.mark.parametrize("block", [1, 3])
def test_a_sample_that_depends_on_the_one_before_it_is_found_at_the_first_block(block):
    check(_whole(lambda c, x, h: h.cumsum(0)), CellError, "mixes samples", at=0, block=block, closing=True)


def test_a_first_sample_that_depends_on_a_later_one_in_derivative_alone_is_found():
    """Its value is the same alone and in a batch; only a probe of the first sample without the second shows it."""

    class Leaning(Plain):
        def forward(self, x, h):
            y, h_next = super().forward(x, h)
            later = h[1:] - h[1:].detach()
            return y, h_next + torch.cat([later, torch.zeros_like(h[:1])])

    learner = rtrl.BlockRTRL(Leaning(), B, block=1)
    learner.step(stream()[0])
    with refused(learner, CellError, "depends on the state of another"):
        learner.sync()


@pytest.mark.parametrize("difference", [1e-5, NAN], ids=["a hundred-thousandth", "NaN"])
def test_a_state_that_is_another_in_a_larger_batch_is_refused(difference):
    class Drifting(Plain):
        def forward(self, x, h):
            y, h = super().forward(x, h)
            return y, h + (difference if len(x) > B else 0.0)

    learner = rtrl.BlockRTRL(Drifting(), B, block=2)
    for x in stream()[:2]:
        learner.step(x)
    with refused(learner, CellError, "mixes samples|a different state"):
        learner.sync()


def test_a_step_that_branches_is_found_beside_a_large_entry():
    def step(cell: Breakable, x: Tensor, h: Tensor) -> Any:
        small = torch.tanh(h[:, 1:] if x.shape[0] == B else -h[:, 1:])
        return cell.head(small.flatten(1)), torch.cat([h[:, :1] * 0.0 + 1e9, small], dim=1)

    check(step, CellError, DIFFERENT, closing=True)


def test_a_state_overwritten_in_a_later_step_is_refused():
    check(lambda cell, x, h: cell.good(x, h.mul_(0.5)), CellError, "in place")


def test_a_gradient_that_overflows_is_refused_before_anything_changes():
    learner = make(lambda cell, x, h: (cell.enter(x * 1e200), torch.tanh(h)))
    learner.cell.broken = True
    y = learner.step(stream()[0])
    learner.backward(((y - y.detach()) * 1e200).sum())
    with refused(learner, NonFiniteError, "gradient of parameter"):
        learner.sync()


def test_an_influence_that_overflows_is_refused():
    learner = make(
        lambda cell, x, h: (h, h * 1e60 + (x @ (cell.enter.weight - cell.enter.weight.detach()).T).unsqueeze(1)),
        block=1,
    )
    learner.reset(state=torch.zeros(B, 3, 2, dtype=F64))
    learner.cell.broken = True
    with pytest.raises(NonFiniteError, match=r"influence of parameter 'enter\.weight' explodes"):
        _ = [learner.step(x) for x in stream()]


class Router(nn.Module):
    """Writes the row of the largest score; near ties fall differently in a larger batch, unless ``replay`` is
    obeyed."""

    def __init__(self, obeys: bool) -> None:
        super().__init__()
        self.obeys, self.enter = obeys, nn.Linear(D_IN, 2, dtype=F64)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 3, 2, dtype=F64)

    def forward(self, x: Tensor, h: Tensor, replay: Sparsity | None = None) -> Any:
        tie = torch.tensor([1.0, 1.0, 0.0]) + (
            torch.tensor([1e-6, 0.0, 0.0]) if x.shape[0] > B else torch.tensor([0.0, 1e-6, 0.0])
        )
        writes = replay.writes if self.obeys and replay is not None else tie.topk(1).indices.expand(x.shape[0], 1)
        new = torch.tanh(self.enter(x) + h.mean(1)).unsqueeze(1)
        h = h.scatter(1, writes.unsqueeze(2).expand(-1, -1, 2), new)
        return h.sum(1), h, Sparsity(None, writes)


def test_a_router_that_decides_near_ties_differently_in_a_batch_is_refused():
    learner = rtrl.BlockRTRL(Router(obeys=False), B, block=2)
    for x in stream()[:2]:
        learner.backward(learner.step(x).sum())
    with refused(learner, CellError, "steps 0 … 1: run a second time, the cell makes other choices .*replay=None"):
        learner.sync()


def test_a_router_that_ignores_the_replay_of_a_step_is_refused():
    learner = rtrl.BlockRTRL(Router(obeys=False), B, block=2)
    with refused(learner, CellError, "replay"):
        learner.step(stream()[0], replay=Sparsity(None, rows(stream()[0], 2)))
