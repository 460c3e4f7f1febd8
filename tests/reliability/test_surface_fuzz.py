"""The public surface under any use: whatever is called with whatever, a learner is exact or says no, and stays whole.

A drawn sequence of calls is made on a learner, legal ones and others. A call that raises an ``RTRLError`` must have
changed nothing; no other error is allowed; at the end the gradient is that of BPTT over the steps that were taken.
"""

import copy
import pickle
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import RTRLError

F64 = torch.float64


def _gru() -> nn.Module:
    return seeded(rtrl.from_torch(nn.GRUCell(2, 3, dtype=F64)), 0)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: seeded(PlainRNN(2, 3), 0),
    "gru": _gru,
    "rows": lambda: seeded(rtrl.cells.MinGRU(2, 3).double(), 0),
}

# x as users pass it, from a seed: each has the numbers of ``plain``
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda x: x,
    "transposed": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x], dim=2)[:, :, 0],
    "part": lambda x: torch.cat([x, x])[: len(x)],
    "negated": lambda x: torch._neg_view(-x),
}
WRONG: dict[str, Any] = {
    "dtype": lambda x: x.float(),
    "batch": lambda x: x[:1],
    "size": lambda x: x[:, :1],
    "no tensor": lambda x: x.tolist(),
    "none": lambda x: None,
    "scalar": lambda x: x.sum(),
    "nan": lambda x: x * torch.nan,
    "infinite": lambda x: x + torch.inf,
    "requires grad": lambda x: x.clone().requires_grad_(),
    "complex": lambda x: x + 1j,
    "empty": lambda x: x[:, :0],
}
WRONG_LOSSES: dict[str, Any] = {
    "vector": lambda y: y.sum(dim=1),
    "number": lambda y: 1.0,
    "detached": lambda y: y.detach().sum(),
    "nan": lambda y: y.sum() * torch.nan,
    "of nothing": lambda y: torch.zeros((), dtype=F64, requires_grad=True) * 2,
    "integer": lambda y: torch.zeros((), dtype=torch.int64),
}
CONTEXTS: dict[str, Callable[[], Any]] = {
    "none": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}
CALL = st.one_of(
    st.tuples(st.just("step"), st.sampled_from(list(FORMS)), st.sampled_from(list(CONTEXTS)), st.booleans()),
    st.tuples(st.just("unroll"), st.integers(0, 4), st.sampled_from(list(CONTEXTS)), st.booleans()),
    st.tuples(st.just("wrong step"), st.sampled_from(list(WRONG))),
    st.tuples(st.just("wrong unroll"), st.sampled_from(list(WRONG))),
    st.tuples(st.just("wrong loss"), st.sampled_from(list(WRONG_LOSSES))),
    st.tuples(st.just("reset"), st.sampled_from(["all", "some", "none", "shape", "dtype", "device", "state", "nan"])),
    st.tuples(st.just("sync"), st.sampled_from(list(CONTEXTS))),
    st.tuples(st.just("look"), st.sampled_from(["peek", "influence", "no such", "split", "bytes", "structure"])),
    st.tuples(st.just("move"), st.sampled_from(["deepcopy", "pickle", "load", "load rubbish", "to", "to int"])),
    st.tuples(st.just("thread")),
    st.tuples(st.just("old y")),
)


class _Run:
    """A learner, and what it was made to do."""

    def __init__(self, cell: str, block: int) -> None:
        self.cell = CELLS[cell]()
        self.learner: Any = rtrl.BlockRTRL(self.cell, 2, block=block, window=2)
        self.taken: list[tuple[Tensor, float, Tensor]] = []
        self.restarts = torch.zeros(2, dtype=torch.bool)
        self.number, self.y = 0, None
        self.total: dict[str, Tensor] = {}

    def x(self, *shape: int) -> Tensor:
        self.number += 1
        return torch.randn(*shape, 2, 2, generator=torch.Generator().manual_seed(self.number), dtype=F64)

    def note(self, x: Tensor, weight: float) -> None:
        self.taken.append((x, weight, self.restarts))
        self.restarts = torch.zeros(2, dtype=torch.bool)

    def do(self, call: tuple[Any, ...]) -> None:
        before = self.learner.steps_taken
        try:
            getattr(self, "_" + call[0].replace(" ", "_"))(*call[1:])
        except RTRLError:
            assert self.learner.steps_taken == before
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()

    def _step(self, form: str, context: str, with_loss: bool) -> None:
        plain = self.x()
        x = FORMS[form](plain)
        with CONTEXTS[context]():
            y = self.learner.step(x)
        kept, self.y = plain.clone(), y
        with torch.no_grad():
            plain.fill_(7.0)  # what the user does with x afterwards is the user's business
            x.fill_(7.0)
        self.note(kept, float(with_loss))
        if with_loss:
            self.learner.backward(y.square().sum() + y.sum())

    def _unroll(self, steps: int, context: str, with_loss: bool) -> None:
        xs = self.x(steps)
        with CONTEXTS[context]():
            self.y = None
            ys = self.learner.unroll(xs)
        for x in xs.clone():
            self.note(x, float(with_loss))
        xs.fill_(7.0)
        if with_loss:
            (ys.square().sum() + ys.sum()).backward()

    def _refused(self, call: Callable[[], Any]) -> None:
        with pytest.raises(RTRLError):
            call()

    def _wrong_step(self, kind: str) -> None:
        x = WRONG[kind](self.x())
        self._refused(lambda: self.learner.step(x))
        self._refused(lambda: self.learner.peek(x))

    def _wrong_unroll(self, kind: str) -> None:
        x = self.x()
        xs = WRONG[kind](x) if kind in ("no tensor", "none", "scalar") else WRONG[kind](x).unsqueeze(0)
        self._refused(lambda: self.learner.unroll(xs))

    def _wrong_loss(self, kind: str) -> None:
        if self.y is not None:
            self._refused(lambda: self.learner.backward(WRONG_LOSSES[kind](self.y)))

    def _reset(self, kind: str) -> None:
        some = torch.tensor([True, False])
        if kind in ("shape", "dtype", "device", "state", "nan"):
            state = torch.full((2, 3), torch.nan, dtype=F64) if kind == "nan" else torch.zeros(2, 4, dtype=F64)
            wrong = {"shape": some[:1], "dtype": some.long(), "device": some.to("meta")}
            self._refused(lambda: self.learner.reset(wrong[kind]) if kind in wrong else self.learner.reset(state=state))
            return
        samples = {"all": None, "some": some, "none": some & False}[kind]
        self.learner.reset(samples)
        self.restarts = self.restarts | (True if samples is None else samples)

    def _sync(self, context: str) -> None:
        with CONTEXTS[context]():
            self.learner.sync()

    def _look(self, what: str) -> None:
        name = next(iter(dict(self.cell.named_parameters())))
        {
            "peek": lambda: self.learner.peek(self.x()),
            "influence": lambda: self.learner.influence(name),
            "no such": lambda: self._refused(lambda: self.learner.influence("no such")),
            "split": lambda: self.y is not None and self.learner.gradients({"a": self.y.sum()}),
            "bytes": self.learner.retained_bytes,
            "structure": self.learner.find_structure,
        }[what]()

    def _move(self, how: str) -> None:
        if how == "load rubbish":
            for rubbish in (None, {}, {"format": 1}, {**self.learner.state_dict(), "steps_taken": -1}):
                self._refused(lambda rubbish=rubbish: self.learner.load_state_dict(rubbish))  # type: ignore[misc]
            return
        if how == "to int":
            self._refused(lambda: self.learner.to(torch.int64))
            return
        self.y = None
        if how == "load":
            self.learner.load_state_dict(self.learner.state_dict())
        elif how == "to":
            self.learner.to("cpu", F64)
        else:
            old = {name: p.grad for name, p in self.cell.named_parameters()}
            self.learner = (
                copy.deepcopy(self.learner) if how == "deepcopy" else pickle.loads(pickle.dumps(self.learner))
            )
            self.cell = self.learner.cell
            for name, p in self.cell.named_parameters():
                grad = old[name]
                p.grad = None if grad is None else grad.clone()

    def _thread(self) -> None:
        x, found = self.x(), []
        thread = threading.Thread(target=lambda: found.append(self.learner.step(x)))
        thread.start()
        thread.join()
        self.y = found[0]
        self.note(x, 0.0)

    def _old_y(self) -> None:
        old = self.y
        if old is None:
            return
        self.learner.sync()
        self._refused(lambda: self.learner.backward(old.sum()))
        self._refused(lambda: old.sum().backward())
        self.y = None

    def check(self) -> None:
        self.learner.sync()
        if not self.taken:
            return
        xs, resets = torch.stack([x for x, _, _ in self.taken]), torch.stack([r for _, _, r in self.taken])
        resets[0] = False
        expected = oracles.bptt(
            self.cell,
            xs,
            lambda t, y: (y.square().sum() + y.sum()) * self.taken[t][1] if self.taken[t][1] else None,
            resets=resets,
        )
        assert_gradients_equal(gradients(self.cell), expected, may_be_zero=True)


@settings(max_examples=settings().max_examples, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(list(CELLS)), st.sampled_from([1, 3]), st.lists(CALL, min_size=3, max_size=14))
def test_any_calls_in_any_order_are_exact_or_refused(cell: str, block: int, calls: list[tuple[Any, ...]]) -> None:
    run = _Run(cell, block)
    for call in calls:
        run.do(call)
    run.check()
