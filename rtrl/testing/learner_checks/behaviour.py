"""Checks of how a learner behaves, whatever its gradients: its interface, what it keeps, what it refuses."""

import copy
import gc
import io
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._utils import pytrees
from rtrl._utils.formatting import first_line
from rtrl.cells.protocol import call_cell
from rtrl.testing import streams
from rtrl.testing.compare import worst_difference
from rtrl.testing.laws import Unbiased, shortened
from rtrl.testing.learner_checks.driver import StreamDriver, drive
from rtrl.testing.learner_checks.registry import NotJudged, Subject, check
from rtrl.testing.learner_checks.verdict import compare
from rtrl.testing.report import Found
from rtrl.testing.spec import LearnerSpec
from rtrl.testing.streams import Stream

_SINGLE = 1e-3  # float32 against float64, relative: that it is the same gradient, not how well it is rounded
_MEMORY_STEPS = 56


@check("interface")
def _interface(subject: Subject) -> Iterator[Found]:
    """y is the cell's own, and takes losses; every parameter that is trained and earns something gets a gradient."""
    stream = subject.streams()[0]
    if subject.spec.gradients is not None:
        drive(subject.spec, stream)
        found = subject.spec.gradients(copy.deepcopy(stream.cell), stream.xs.clone(), stream.loss)
        names = {name for name, p in stream.cell.named_parameters() if p.requires_grad}
        if names - found.keys():
            yield Found(f"the gradients of {', '.join(sorted(names - found.keys()))} are missing")
        return
    driver = StreamDriver(subject.spec, stream)
    missing = [name for name in ("step", "backward", "sync") if not callable(getattr(driver.learner, name, None))]
    if missing:
        yield Found(f"a learner must have step(x), backward(loss) and sync(); {', '.join(missing)} is missing")
        return
    for name, value in driver.sync_and_read().items():
        if bool((value != 0).any()):
            yield Found(f"sync() before the first step delivers a gradient of {name!r}")
            return
    outcome = drive(subject.spec, stream)
    h = stream.cell.init_state(stream.batch_size)  # type: ignore[operator]
    for t, y in enumerate(outcome.outputs):
        with torch.no_grad():
            wanted, h, _ = call_cell(stream.cell, stream.xs[t], h, None)
        pairs = list(zip(pytrees.tensors(y), pytrees.tensors(wanted), strict=False))
        if len(pytrees.tensors(y)) != len(pytrees.tensors(wanted)):
            yield Found("step(x) does not return the y of the cell", t)
            return
        for number, (found_leaf, leaf) in enumerate(pairs):
            same_form = found_leaf.shape == leaf.shape and found_leaf.dtype == leaf.dtype
            if not same_form or not checks.nearly_equal(found_leaf, leaf):
                values = [f"{v.flatten()[:3].tolist()} … {tuple(v.shape)} {v.dtype}" for v in (found_leaf, leaf)]
                yield Found("step(x) does not return the y of the cell", t, None, f"tensor {number} of y", *values)
                return


@check("saved and loaded")
def _saved(subject: Subject) -> Iterator[Found]:
    """A learner that loads ``state_dict()`` goes on bit for bit as the one that was saved, which goes on as if it had
    not been; also one that has been elsewhere, and from a file."""
    subject.needs_learner("state_dict", "load_state_dict")
    subject.needs_steps()
    for stream in subject.streams():
        middle = stream.steps // 2
        torch.manual_seed(subject.seed)
        driver = StreamDriver(subject.spec, stream)
        deque(islice(driver.steps(), middle), maxlen=0)
        with driver.during("state_dict(), or writing it to a file,"):
            saved = driver.learner.state_dict()
            torch.save(saved, file := io.BytesIO())
        held = {name: None if p.grad is None else p.grad.clone() for name, p in driver.cell.named_parameters()}
        through = _continued(driver, middle, subject.seed)
        file.seek(0)
        for how, state in (("kept", saved), ("from a file", torch.load(file, weights_only=False))):
            resumed = _continued(_loaded(subject.spec, stream, state, held), middle, subject.seed)
            for name, value in through.items():
                if not torch.equal(value, resumed[name]):
                    bad = (value != resumed[name]).nonzero()[0].tolist()
                    values = [f"{float(r[name][tuple(bad)]):.17g}" for r in (resumed, through)]
                    message = (
                        f"{stream.name}: saved after {middle} steps and loaded ({how}), it does not go on bit for bit"
                    )
                    yield Found(message, None, None, f"parameter {name}{bad}", *values)
                    return
        if not isinstance(subject.spec.law, Unbiased):
            wrong = compare(through, subject.spec.law.reference(stream, driver.learner))
            if wrong is not None:
                message = f"{stream.name}: after state_dict() in mid-stream, the learner itself goes on wrongly"
                yield Found(message, None, None, wrong.where, wrong.found, wrong.expected)
                return


def _continued(driver: StreamDriver, first: int, seed: int) -> dict[str, Tensor]:
    """The gradients after the rest of the stream; random draws are the same at each call."""
    torch.manual_seed(seed + 1)
    return driver.finish(first)


def _loaded(spec: LearnerSpec, stream: Stream, saved: Any, gradients: dict[str, Tensor | None]) -> StreamDriver:
    """A driver whose learner has taken other steps before it loads."""
    driver = StreamDriver(spec, stream)
    deque(islice(driver.steps(), 2), maxlen=0)
    for name, p in driver.cell.named_parameters():
        p.grad = None if gradients[name] is None else gradients[name].clone()  # type: ignore[union-attr]
    with driver.during("load_state_dict(...)"):
        driver.learner.load_state_dict(saved)
    return driver


@check("float32")
def _single(subject: Subject) -> Iterator[Found]:
    """A cell in float32 gets y and gradients in float32."""
    stream = subject.streams()[0]
    single = copy.copy(stream)
    object.__setattr__(single, "cell", copy.deepcopy(stream.cell).float())
    object.__setattr__(single, "xs", stream.xs.float())
    outcome = drive(subject.spec, single)
    for t, y in enumerate(outcome.outputs):
        for leaf in pytrees.tensors(y):
            if leaf.is_floating_point() and leaf.dtype != torch.float32:
                yield Found("the y of a float32 cell has another dtype", t, None, "y", str(leaf.dtype), "torch.float32")
                return
    if isinstance(subject.spec.law, Unbiased):
        return
    reference = subject.spec.law.reference(stream, outcome.learner)
    worst = worst_difference(outcome.gradients, reference, group="tensor", nonzero="none")
    if worst.error > _SINGLE:
        values = [f"{value:.9g}" for value in (worst.actual, worst.expected)]
        yield Found("in float32 it is another gradient", None, None, f"parameter {worst.place}", *values)


@check("the cell is left alone")
def _left_alone(subject: Subject) -> Iterator[Found]:
    """No parameter, buffer, flag, mode, hook or attribute of the cell is changed but ``.grad``; nor the input, nor what
    all of the process share."""
    own = [] if subject.spec.streams else [shortened(subject.spec.law, streams.slow_stream(subject.seed, 14))]
    for stream in [*subject.streams(), *own]:
        driver = None if subject.spec.make_learner is None else StreamDriver(subject.spec, stream)
        cell = copy.deepcopy(stream.cell) if driver is None else driver.cell
        before = _picture(stream.cell)
        xs = stream.xs.clone()
        shared = torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state()
        if driver is None:
            assert subject.spec.gradients is not None
            subject.spec.gradients(cell, xs, stream.loss)
        else:
            for t in range(stream.steps):
                y = driver.learner.step(xs[t])  # on x itself, so that it shows if the learner changes it
                loss = stream.loss(t, y)
                if loss is not None:
                    driver.learner.backward(loss)
            driver.sync_and_read()
        if not torch.equal(xs, stream.xs):
            yield Found(f"{stream.name}: x is changed in place")
        kept = _values(stream.cell)
        for name, value in _values(cell).items():
            if name not in kept or not torch.equal(value, kept[name]):
                yield Found(f"{stream.name}: the learner changes {name!r} of the cell")
        if _picture(cell) != before:
            yield Found(f"{stream.name}: the learner leaves hooks, flags or attributes of the cell changed")
        if (torch.get_default_dtype(), torch.is_grad_enabled()) != shared[:2]:
            yield Found(f"{stream.name}: the learner leaves another default dtype or grad mode")
        drawn = not torch.equal(torch.random.get_rng_state(), shared[2])
        if drawn and not isinstance(subject.spec.law, Unbiased):
            yield Found(
                f"{stream.name}: the learner draws from the global generator, so that it changes what others draw"
            )


def _values(cell: nn.Module) -> dict[str, Tensor]:
    return {**dict(cell.named_parameters()), **dict(cell.named_buffers())}


def _picture(cell: nn.Module) -> list[Any]:
    """What a learner may not change, besides values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in cell.named_modules()
    ] + [
        (name, p.requires_grad, p.dtype, p.device, len(p._backward_hooks or ()), len(_after(p) or ()))
        for name, p in cell.named_parameters()
    ]


def _after(p: nn.Parameter) -> Any:
    """Its hooks after accumulation, which PyTorch has no public name for."""
    return getattr(p, "_post_accumulate_grad_hooks", None)


@check("memory does not grow")
def _memory(subject: Subject) -> Iterator[Found]:
    """The bytes of all tensors alive, after a warm-up and after as many steps again."""
    if not subject.spec.constant_memory:
        raise NotJudged("because the spec does not promise it (constant_memory=True)")
    subject.needs_learner()
    stream = subject.streams()[0]
    if subject.spec.sparse and not subject.spec.streams:
        stream = streams.scheduled_stream(subject.seed)
    for often in (True, False):
        tensors, objects = _held(subject.spec, stream, often)
        how = f"{stream.name}: {'with deliveries' if often else 'without a delivery'}"
        if often and tensors[-1] > tensors[len(tensors) // 2 - 1]:
            values = str(tensors[-1]), str(tensors[len(tensors) // 2 - 1])
            message = f"{how}, it holds more after twice as many steps"
            yield Found(message, None, None, "bytes of all tensors", *values)
        besides = 16 * _MEMORY_STEPS // 2  # bytes; a store of fixed size may still be filling
        for what, held, least in (("tensors", tensors, 0), ("what it holds besides tensors", objects, besides)):
            growth = [held[(i + 1) * len(held) // 4 - 1] - held[i * len(held) // 4 - 1] for i in (1, 2, 3)]
            if min(growth) > least:  # in each of the three quarters after the first
                message = f"{how}, {what} takes more and more memory"
                yield Found(
                    message, None, None, f"bytes in some {_MEMORY_STEPS // 2} steps", f"+{growth[-1]}", "no growth"
                )
                break


def _held(spec: LearnerSpec, stream: Stream, often: bool) -> tuple[list[int], list[int]]:
    """The bytes of all tensors, and of all else that can be reached from the learner, at eight looks along a stream
    that begins again and again."""
    driver = StreamDriver(spec, stream)
    tensors, objects = [], []
    turns = -(-_MEMORY_STEPS // (4 * stream.steps))  # whole turns, so that all looks find the same input
    for _ in range(8):
        for _ in range(turns):
            deque(driver.steps(), maxlen=0)
            if often:
                driver.sync()
                driver.cell.zero_grad()
        tensors.append(_alive())
        objects.append(_reached(driver.learner))
    return tensors, objects


def _reached(learner: Any) -> int:
    """Bytes of the objects that a learner leads to, its cell, classes, functions and modules left out."""
    seen: dict[int, Any] = {}
    waiting = [learner]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen and not isinstance(found, nn.Module | type | ModuleType | FunctionType | Tensor):
            seen[id(found)] = found
            waiting.extend(gc.get_referents(found))
    return sum(sys.getsizeof(found) for found in seen.values())


def _alive() -> int:
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


@check("error inputs")
def _errors(subject: Subject) -> Iterator[Found]:
    """Bad input in mid-stream is refused as declared, and nothing is lost by it."""
    if not subject.spec.errors:
        raise NotJudged("because the spec declares none")
    subject.needs_learner()
    subject.needs_steps()
    stream = subject.streams()[0]
    for bad in subject.spec.errors:
        driver = StreamDriver(subject.spec, stream)
        middle = stream.steps // 2
        for t, _ in driver.steps():
            if t == middle:
                yield from _refused(driver.learner, bad.name, bad.call, bad.raises, bad.match, t)
        if isinstance(subject.spec.law, Unbiased):
            continue
        wrong = compare(driver.sync_and_read(), subject.spec.law.reference(stream, driver.learner))
        if wrong is not None:
            message = f"{bad.name}: after it was refused, the gradient is wrong"
            yield Found(message, middle, None, wrong.where, wrong.found, wrong.expected)


def _refused(
    learner: Any, name: str, call: Callable[[Any], object], raises: type[Exception], match: str, t: int
) -> Iterator[Found]:
    try:
        call(learner)
    except Exception as error:
        if not isinstance(error, raises) or match not in str(error):
            wanted = f"{raises.__name__}{f' with {match!r}' if match else ''}"
            yield Found(f"{name}: another error than declared", t, None, "", first_line(error), wanted)
    else:
        yield Found(f"{name}: it is not refused", t, None, "", "no error", raises.__name__)
