"""Faults put into a call at its k-th tensor operation, Python call or line, and what must hold of a learner then.

``Story`` is a short stream with losses, resets and deliveries. A fault strikes somewhere in it. Then the learner goes
on as its user would: what was not done is done again, what was done is not, and a learner that refuses starts again.
"""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import oracles
import rtrl
from helpers.complex_cells import ComplexCell, SparseComplex, complex_loss
from helpers.running import gradients
from helpers.toy_cells import PlainRNN, seeded
from rtrl.errors import RTRLError
from rtrl.learners import BPTT, TBPTT, UORO, DenseRTRL, SnAp
from rtrl.testing.driver import trainable

TOLERANCE = 1e-10


class Injected(Exception):
    """A fault of no kind that anyone expects."""


class Operations(TorchDispatchMode):
    """Raises a fault at the k-th tensor operation; counts them all."""

    def __init__(self, at: int, fault: Callable[[], BaseException]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.at, self.fault, self.count = at, fault, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count == self.at:
            raise self.fault()
        return func(*args, **(kwargs or {}))

    @contextmanager
    def active(self) -> Iterator[None]:
        with self:
            yield


class PythonEvents:
    """Raises a fault where a signal would be handled: at the k-th entry of a function or return from a C function
    ("calls"), or, stricter, at the k-th line ("lines"); counts them all.

    Args:
        at: k, from 1 on.
        fault: makes the exception.
        events: "calls" or "lines".
    """

    def __init__(self, at: int, fault: Callable[[], BaseException], events: str) -> None:
        self.at, self.fault, self.count, self.events = at, fault, 0, events

    @contextmanager
    def active(self) -> Iterator[None]:
        install = sys.setprofile if self.events == "calls" else sys.settrace
        outer = sys._getframe()

        def see(frame: Any, event: str, arg: Any) -> Any:
            name = frame.f_code.co_filename
            if frame is outer or "/helpers/" in name or ("contextlib" in name and frame.f_back is outer):
                return None
            if event in (("call", "c_return") if self.events == "calls" else ("line",)):
                self.count += 1
                if self.count == self.at:
                    install(None)
                    raise self.fault()
            return see

        install(see)
        try:
            yield
        finally:
            install(None)


Injector = Operations | PythonEvents


@dataclass(frozen=True)
class Process:
    """What a call must leave as it was: of the process, and of the cell."""

    grad: bool
    modes: tuple[int, int]
    rng: Tensor
    values: dict[str, Tensor]
    hooks: list[Any]
    attributes: list[set[str]]
    training: list[bool]

    @classmethod
    def of(cls, cell: nn.Module) -> "Process":
        return cls(
            torch.is_grad_enabled() and not torch.is_inference_mode_enabled(),
            (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
            torch.get_rng_state(),
            {name: p.detach().clone() for name, p in [*cell.named_parameters(), *cell.named_buffers()]},
            [p._backward_hooks for p in cell.parameters()],
            [set(vars(part)) for part in cell.modules()],
            [part.training for part in cell.modules()],
        )

    def put_back(self) -> None:
        """Switch back what a fault left switched, for the runs that follow."""
        torch._C._set_grad_enabled(self.grad)
        while torch._C._len_torch_function_stack() > self.modes[0]:
            torch._C._pop_torch_function_stack()

    def problem(self, cell: nn.Module) -> str | None:
        now = Process.of(cell)
        for what in ("grad", "modes", "attributes", "training"):
            if getattr(now, what) != getattr(self, what):
                return f"{what}: {getattr(self, what)} became {getattr(now, what)}"
        if not torch.equal(now.rng, self.rng):
            return "random numbers"
        if any(not torch.equal(now.values[name], value) for name, value in self.values.items()):
            return "parameters"
        if any(a is not b for a, b in zip(now.hooks, self.hooks, strict=True)):
            return "hooks"
        return None


@dataclass
class Kind:
    """A learner to put faults into.

    Attributes:
        cell: makes the cell.
        learner: makes the learner of the cell.
        batch: the number of samples.
        loss: of y.
        exact: whether its gradients are those of BPTT.
        draws: whether it draws random numbers, so that it does something else once it has started again.
        d_in: size of x.
    """

    cell: Callable[[], nn.Module]
    learner: Callable[[nn.Module, int], Any]
    batch: int = 2
    loss: Callable[[int, Any], Tensor] = lambda t, y: (y - 0.1 * t).square().sum() + y.sum()
    exact: bool = True
    draws: bool = False
    d_in: int = 2


STEP, SYNC, PEEK, RESET_ALL, SPLIT, INFLUENCE = "step", "sync", "peek", "reset", "split", "influence"
STORY = (STEP, STEP, "reset 0", STEP, STEP, SYNC, STEP, INFLUENCE, STEP, SPLIT, PEEK, SYNC, RESET_ALL, STEP, SYNC)


@dataclass(frozen=True)
class Taken:
    """A step that was taken, at which place of the script, whether its loss was added, and who restarted before it."""

    place: int
    x: Tensor
    has_loss: bool
    restarts: Tensor


@dataclass
class Story:
    """A stream in which one fault strikes.

    Attributes:
        kind: of the learner.
        injector: what raises the fault.
        script: what is done.
    """

    kind: Kind
    injector: Injector
    script: tuple[str, ...] = STORY
    struck: str | None = None
    refused: bool = False
    _taken: list["Taken"] = field(default_factory=list)

    def run(self) -> str | None:
        """Return what is wrong; None if nothing is."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._run()

    def _run(self) -> str | None:
        self.cell = self.kind.cell()
        self.learner = self.kind.learner(self.cell, self.kind.batch)
        self.y: Any = None
        self.restarts = torch.zeros(self.kind.batch, dtype=torch.bool)
        generator = torch.Generator().manual_seed(5)
        for i, action in enumerate(self.script):
            self.x = torch.randn(self.kind.batch, self.kind.d_in, generator=generator, dtype=torch.float64)
            for _ in range(4):
                again, problem = self._act(action, i)
                if problem:
                    return f"{action} {i}, struck {self.struck}: {problem}"
                if not again:
                    break
        return self._verdict()

    def _act(self, action: str, i: int) -> tuple[bool, str | None]:
        """Do one thing; return whether it is to be done again, and what is wrong."""
        if action == STEP:
            return self._step(i)
        do = {
            SYNC: lambda: self.learner.sync(),
            PEEK: lambda: self.learner.peek(self.x),
            "reset 0": lambda: self.learner.reset(torch.arange(self.kind.batch) == 0),
            RESET_ALL: lambda: self.learner.reset(),
            INFLUENCE: lambda: self.learner.influence(next(iter(trainable(self.cell)))),
            SPLIT: lambda: self.learner.gradients({"a": self.kind.loss(i, self.y)}),
        }[action]
        again, problem = self._call(do, action)
        if not again and problem is None and action.startswith("reset"):
            self.restarts |= (torch.arange(self.kind.batch) == 0) if action == "reset 0" else True
        return again, problem

    def _step(self, i: int) -> tuple[bool, str | None]:
        before = self.learner.steps_taken

        def step() -> None:
            self.y = self.learner.step(self.x)

        again, problem = self._call(step, STEP)
        if problem:
            return False, problem
        if again and not self.refused_now and self.learner.steps_taken == before + 1:  # taken, but y is lost
            self._note(i, has_loss=False)
            return False, None
        if again:
            return True, None
        self._note(i, has_loss=True)
        ys = self.y if isinstance(self.y, tuple) else (self.y,)
        for _ in range(3):
            had = [y.grad for y in ys]
            again, problem = self._call(partial(self.learner.backward, self.kind.loss(i, self.y)), "backward")
            if problem:
                return False, problem
            if again and self.refused_now:
                return True, None  # all was given up: the step is taken again
            if not again or any(y.grad is not g for y, g in zip(ys, had, strict=True)):
                return False, None
        return False, "a loss cannot be added"

    def _note(self, place: int, has_loss: bool) -> None:
        self._taken.append(Taken(place, self.x, has_loss, self.restarts))
        self.restarts = torch.zeros(self.kind.batch, dtype=torch.bool)

    def _call(self, call: Callable[[], Any], name: str) -> tuple[bool, str | None]:
        """Call the learner; return whether it is to be called again, and what is wrong."""
        self.refused_now = False
        process = Process.of(self.cell)
        try:
            if self.struck is None:
                with self.injector.active():
                    call()
            else:
                call()
        except BaseException as error:
            if isinstance(error, RTRLError) and self.struck is not None and "reset(discard=True)" in str(error):
                self._start_again()
                return True, None
            if not _is_injected(error):
                if isinstance(error, (AssertionError, SystemExit)):
                    raise
                return False, f"{type(error).__name__}: {error}"
            self.struck = name
            problem = process.problem(self.cell)
            process.put_back()
            return True, None if problem is None else f"the process was changed: {problem}"
        return False, None

    def _start_again(self) -> None:
        self.refused = self.refused_now = True
        self.learner.reset(discard=True)
        for p in self.cell.parameters():
            p.grad = None
        self._taken, self.restarts = [], torch.zeros(self.kind.batch, dtype=torch.bool)

    def _verdict(self) -> str | None:
        found, taken = gradients(self.cell), self._taken
        if not taken:
            return "a gradient is left" if any(bool(value.any()) for value in found.values()) else None
        xs, resets = torch.stack([each.x for each in taken]), torch.stack([each.restarts for each in taken])
        resets[0] = False
        if self.refused and self.kind.draws:
            return None

        def loss(t: int, y: Any) -> Tensor | None:
            return self.kind.loss(taken[t].place, y) if taken[t].has_loss else None

        if self.kind.exact:
            expected = oracles.bptt(self.cell, xs, loss, resets=resets)
        else:
            expected = self._by_another(xs, resets, loss)
        for name, value in expected.items():
            error = float((found[name] - value).abs().max()) / max(float(value.abs().max()), 1e-30)
            if not error <= TOLERANCE:
                return f"struck {self.struck}: the gradient of {name} is off by {error:.1e}"
        return None

    def _by_another(self, xs: Tensor, resets: Tensor, loss: Callable[[int, Any], Tensor | None]) -> dict[str, Tensor]:
        """What a learner that no fault strikes makes of the same steps."""
        cell = self.kind.cell()
        learner = self.kind.learner(cell, self.kind.batch)
        for t, (x, restarts) in enumerate(zip(xs, resets, strict=True)):
            if bool(restarts.any()):
                learner.reset(restarts)
            value = loss(t, learner.step(x))
            if value is not None:
                learner.backward(value)
        learner.sync()
        return gradients(cell)


def _is_injected(error: BaseException | None) -> bool:
    """Whether an error is the fault, or was raised because of it."""
    while error is not None:
        if isinstance(error, (Injected, KeyboardInterrupt, MemoryError)) or "injected" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# ---------------------------------------------------------------------- kinds of learners


def _gru() -> nn.Module:
    return seeded(rtrl.cells.from_torch(nn.GRUCell(2, 3, dtype=torch.float64)), 0)


def _complex_loss(t: int, y: Any) -> Tensor:
    loss = complex_loss(0, y)
    assert loss is not None
    return loss * (1 + 0.1 * t)


class _Learned(PlainRNN):
    """With a learned first state."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.h0 = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def init_state(self, batch_size: int) -> Tensor:
        return self.h0.expand(batch_size, 3)


def _plain() -> nn.Module:
    return seeded(PlainRNN(2, 3), 0)


def _block(**options: Any) -> Callable[..., Any]:
    return partial(rtrl.BlockRTRL, **{"block": 2, "audit": "off", **options})


KINDS = {
    "dense": Kind(_plain, _block(structure="off")),
    "analytic": Kind(_gru, _block()),
    "rows": Kind(lambda: seeded(rtrl.cells.MinGRU(2, 3).double(), 0), _block()),
    "slices": Kind(SparseComplex, _block(window=2), loss=_complex_loss),
    "complex": Kind(ComplexCell, _block(), loss=_complex_loss),
    "one step": Kind(_gru, _block(block=1)),
    "one step of rows": Kind(lambda: seeded(rtrl.cells.MinGRU(2, 3).double(), 0), _block(block=1), batch=1),
    "learned first state": Kind(lambda: seeded(_Learned(), 0), _block()),
    "audited": Kind(_plain, _block(audit=1)),
    "bptt": Kind(_plain, BPTT),
    "tbptt": Kind(_plain, partial(TBPTT, horizon=3), exact=False),
    "chunks": Kind(_plain, partial(TBPTT, horizon=3, sliding=False), exact=False),
    "dense rtrl": Kind(_plain, DenseRTRL),
    "snap": Kind(_plain, partial(SnAp, order=1), exact=False),
    "uoro": Kind(_plain, lambda *a: UORO(*a, generator=torch.Generator().manual_seed(0)), exact=False, draws=True),
}


def script_of(name: str) -> tuple[str, ...]:
    """The story of a kind; BPTT and TBPTT have no influence."""
    return tuple(each for each in STORY if each != INFLUENCE or name not in ("bptt", "tbptt", "chunks"))


def injector(where: str, at: int) -> Injector:
    """What raises a fault at the k-th "operations", "calls" or "lines"; -1 counts them."""
    if where == "operations":
        return Operations(at, lambda: MemoryError("injected"))
    return PythonEvents(at, lambda: KeyboardInterrupt("injected"), where)


def strike(name: str, where: str, places: Callable[[int], Iterable[int]]) -> tuple[int, int, list[str]]:
    """Put a fault at some of the places of a kind's story, one at a time.

    Args:
        name: of the kind.
        where: see ``injector``.
        places: number of places → which of them, from 1 on.

    Returns:
        How many faults there were, after how many the learner refused, and what was wrong.
    """
    kind, script = KINDS[name], script_of(name)
    if name not in _WARM:
        _WARM.append(name)
        Story(kind, injector("operations", -1), script).run()  # what is imported or made once is there then
    count = Story(kind, injector(where, -1), script)
    problems = [(-1, count.run())]
    stories = [Story(kind, injector(where, at), script) for at in places(count.injector.count)]
    problems += [(story.injector.at, story.run()) for story in stories]
    wrong = [f"{name}, {where}, place {at}: {problem}" for at, problem in problems if problem]
    return len(stories), sum(story.refused for story in stories), wrong


_WARM: list[str] = []
