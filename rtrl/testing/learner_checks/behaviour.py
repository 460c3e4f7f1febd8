"""Checks of a learner's behaviour beside its gradients: interface, saving, side effects, memory, refusals."""

import copy
import gc
import io
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rtrl._engine import checks
from rtrl._utils import pytrees
from rtrl._utils.formatting import first_line
from rtrl.cells.protocol import call_cell
from rtrl.testing import streams
from rtrl.testing.compare import worst_difference
from rtrl.testing.laws import Unbiased, shortened
from rtrl.testing.learner_checks.driver import LearnerFailed, StreamDriver, drive, in_dtype
from rtrl.testing.learner_checks.registry import NotJudged, Subject, check
from rtrl.testing.learner_checks.verdict import compare
from rtrl.testing.report import Found
from rtrl.testing.spec import ErrorInput, LearnerSpec
from rtrl.testing.streams import Stream, moved_parameters

_SINGLE = 1e-3  # relative, float32 against float64: shows that it is the same gradient, not how well it is rounded
_MEMORY_STEPS = 56
_ONE_CELL = (
    "make_learner(cell, batch_size) must use the cell that it is given; if the learner is made for one kind of cell "
    "only, give it streams of that cell: LearnerSpec(..., streams=rtrl.testing.streams_for(make_cell))"
)


@check("interface")
def _interface(subject: Subject) -> Iterator[Found]:
    """step() returns the y of the cell, and every trainable parameter gets a gradient."""
    stream = subject.streams()[0]
    if subject.spec.gradients is not None:
        drive(subject.spec, stream)
        found = subject.spec.gradients(copy.deepcopy(stream.cell), stream.xs.clone(), stream.loss)
        names = {name for name, p in stream.cell.named_parameters() if p.requires_grad}
        if names - found.keys():
            yield Found(f"the gradients of {', '.join(sorted(names - found.keys()))} are missing")
        return
    with _of_one_cell(subject):
        driver = StreamDriver(subject.spec, stream)
    missing = [name for name in ("step", "backward", "sync") if not callable(getattr(driver.learner, name, None))]
    if missing:
        yield Found(f"a learner must have step(x), backward(loss) and sync(); {', '.join(missing)} is missing")
        return
    for name, value in driver.sync_and_read().items():
        if bool((value != 0).any()):
            yield Found(f"sync() before the first step adds a gradient of {name!r}")
            return
    with _of_one_cell(subject):
        yield from _output_failures(subject, stream)
    if not subject.spec.streams:
        named = subject.standard(streams.unusual_stream(subject.seed, steps=2))
        named = named if subject.spec.losses == "own" else replace(named, loss=lambda t, y: None)
        yield from _output_failures(subject, named)


@contextmanager
def _of_one_cell(subject: Subject) -> Iterator[None]:
    """Add to what a learner raises before its first step is over what to do if it is made for one cell."""
    try:
        yield
    except LearnerFailed as failed:
        if failed.step or subject.spec.streams:
            raise
        raise LearnerFailed(f"{failed}; {_ONE_CELL}", failed.step) from failed.__cause__


def _output_failures(subject: Subject, stream: Stream) -> Iterator[Found]:
    """Where the y of a step is not that of the cell, in its form or its values, or changes later; and whether any
    gradient arrives."""
    driver = StreamDriver(subject.spec, stream)
    returned = [(y, pytrees.map_tensors(lambda leaf: leaf.detach().clone(), y)) for _, y in driver.steps()]
    driver.sync_and_read()
    hint = "" if subject.spec.streams else f"; {_ONE_CELL}"
    cell, xs = in_dtype(copy.deepcopy(stream.cell), subject.spec), in_dtype(stream.xs, subject.spec)
    h = cell.init_state(stream.batch_size)
    for t, (later, y) in enumerate(returned):
        if not all(torch.equal(a.detach(), b) for a, b in zip(pytrees.tensors(later), pytrees.tensors(y), strict=True)):
            yield Found("the y of a step has other values after later steps; step(x) must return tensors of its own", t)
            return
        with torch.no_grad():
            expected, h, _ = call_cell(cell, xs[t], h, None)
        kinds = [str(pytree.tree_structure(tree)) for tree in (y, expected)]
        if kinds[0] != kinds[1]:
            yield Found(f"step(x) does not return the y of the cell{hint}", t, None, "the form of y", *kinds)
            return
        pairs = zip(pytrees.tensors(y), pytrees.tensors(expected), strict=True)
        for number, (found_leaf, leaf) in enumerate(pairs):
            same_form = found_leaf.shape == leaf.shape and found_leaf.dtype == leaf.dtype
            if not same_form or not checks.nearly_equal(found_leaf, leaf):
                values = [f"{v.flatten()[:3].tolist()} … {tuple(v.shape)} {v.dtype}" for v in (found_leaf, leaf)]
                message = f"step(x) does not return the y of the cell{hint}"
                yield Found(message, t, None, f"tensor {number} of y", *values)
                return
    if driver.n_losses and all(p.grad is None for p in driver.cell.parameters()):
        yield Found(f"after losses and sync(), no parameter of the cell given to make_learner has a .grad{hint}")


@check("save and load")
def _saved(subject: Subject) -> Iterator[Found]:
    """A learner that loads a ``state_dict()`` continues bit for bit as the saved one does: from memory and from a file,
    after other steps, and once more from the same state. Syncs, a reset and a change of parameters follow the load.
    Saving does not change the saved one."""
    subject.needs_learner("state_dict", "load_state_dict")
    subject.needs_steps()
    for plain in subject.streams():
        middle = plain.steps // 2
        stream = _eventful(subject, plain, middle)
        torch.manual_seed(subject.seed)
        driver = StreamDriver(subject.spec, stream)
        deque(islice(driver.steps(), middle), maxlen=0)
        with driver.during("state_dict(), or writing it to a file,"):
            saved = driver.learner.state_dict()
            torch.save(saved, file := io.BytesIO())
        held = {name: None if p.grad is None else p.grad.clone() for name, p in driver.cell.named_parameters()}
        through = _continued(driver, middle, subject.seed)
        file.seek(0)
        other = StreamDriver(subject.spec, stream)
        deque(islice(other.steps(), 2), maxlen=0)
        for how, used, state in (
            ("in memory", other, saved),
            ("in memory, a second time", other, saved),
            ("from a file", StreamDriver(subject.spec, stream), torch.load(file, weights_only=False)),
        ):
            used.load(state, held)
            resumed = _continued(used, middle, subject.seed)
            for name, value in through.items():
                if not torch.equal(value, resumed[name]):
                    bad = (value != resumed[name]).nonzero()[0].tolist()
                    values = [f"{float(r[name][tuple(bad)]):.17g}" for r in (resumed, through)]
                    message = f"saved after {middle} steps and loaded ({how}), it does not continue bit for bit"
                    yield Found(f"{stream.name}: {message}", None, None, f"parameter {name}{bad}", *values)
                    return
        if not isinstance(subject.spec.law, Unbiased):
            wrong = compare(through, subject.spec.law.reference(stream, driver.learner), subject.spec.tolerance)
            if wrong is not None:
                yield wrong.as_found(f"{stream.name}: after state_dict() in mid-stream, the gradient is wrong")
                return


def _eventful(subject: Subject, stream: Stream, middle: int) -> Stream:
    """The stream with a reset right after step ``middle`` begins, two syncs, a change of parameters, another reset."""
    moved = moved_parameters(stream, 1, subject.seed)
    flags = None
    if subject.has("reset"):
        flags = torch.zeros(stream.steps, stream.batch_size, dtype=torch.bool, device=stream.xs.device)
        flags[middle, 0] = flags[middle + 3 :: 3, -1] = True
    return replace(
        stream,
        syncs=frozenset({middle + 1, middle + 2}) & frozenset(range(stream.steps - 1)),
        resets=flags,
        offsets=[moved[t > middle + 2] for t in range(stream.steps)],
    )


def _continued(driver: StreamDriver, first: int, seed: int) -> dict[str, Tensor]:
    """The gradients after the rest of the stream; random draws are the same at each call."""
    torch.manual_seed(seed + 1)
    return driver.finish(first)


@check("float32")
def _single(subject: Subject) -> Iterator[Found]:
    """With a cell in float32, y and gradients are in float32."""
    if subject.spec.dtype != torch.float64:
        raise NotJudged("because all checks run in float32 (dtype=torch.float32)")
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
        yield Found(
            "the gradient in float32 differs from that in float64", None, None, f"parameter {worst.place}", *values
        )


@check("cell unchanged")
def _leaves_cell_unchanged(subject: Subject) -> Iterator[Found]:
    """Nothing of the cell changes but ``.grad``; nor does the input, nor a global setting of the process."""
    slow = [] if subject.spec.streams else [shortened(subject.spec.law, streams.slow_stream(subject.seed, 14))]
    for stream in [*subject.streams(), *slow]:
        driver = None if subject.spec.make_learner is None else StreamDriver(subject.spec, stream)
        original = in_dtype(copy.deepcopy(stream.cell), subject.spec)
        cell = copy.deepcopy(original) if driver is None else driver.cell
        before = _snapshot(original)
        original_xs = in_dtype(stream.xs, subject.spec)
        xs = original_xs.clone()
        settings = torch.get_default_dtype(), torch.is_grad_enabled(), torch.random.get_rng_state()
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
        if not torch.equal(xs, original_xs):
            yield Found(f"{stream.name}: the learner changes x in place")
        kept = _values(original)
        for name, value in _values(cell).items():
            if name not in kept or not torch.equal(value, kept[name]):
                yield Found(f"{stream.name}: the learner changes {name!r} of the cell")
        if _snapshot(cell) != before:
            yield Found(f"{stream.name}: the learner leaves hooks, flags or attributes of the cell changed")
        if (torch.get_default_dtype(), torch.is_grad_enabled()) != settings[:2]:
            yield Found(f"{stream.name}: the learner leaves another default dtype or grad mode")
        drawn = not torch.equal(torch.random.get_rng_state(), settings[2])
        if drawn and not isinstance(subject.spec.law, Unbiased):
            yield Found(
                f"{stream.name}: the learner draws from the global generator, so that it changes what others draw"
            )


def _values(cell: nn.Module) -> dict[str, Tensor]:
    return {**dict(cell.named_parameters()), **dict(cell.named_buffers())}


def _snapshot(cell: nn.Module) -> list[Any]:
    """What a learner must not change, besides values."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        (name, module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in cell.named_modules()
    ] + [
        (name, p.requires_grad, p.dtype, p.device, len(p._backward_hooks or ()), len(_post_accumulate_hooks(p) or ()))
        for name, p in cell.named_parameters()
    ]


def _post_accumulate_hooks(p: nn.Parameter) -> Any:
    """The hooks after accumulation; PyTorch has no public name for them."""
    return getattr(p, "_post_accumulate_grad_hooks", None)


@check("constant memory")
def _constant_memory(subject: Subject) -> Iterator[Found]:
    """The bytes that the learner holds do not grow with the number of steps."""
    if not subject.spec.constant_memory:
        raise NotJudged("because the spec does not promise it (constant_memory=True)")
    subject.needs_learner()
    stream = subject.streams()[0]
    if subject.spec.sparse and not subject.spec.streams:
        stream = streams.scheduled_stream(subject.seed)
    with _only_new_objects():
        held = [(sync, *_held_bytes(subject.spec, stream, sync)) for sync in (True, False)]
    for sync, tensors, objects in held:
        how = f"{stream.name}: {'with syncs' if sync else 'without a sync'}"
        half = tensors[len(tensors) // 2 - 1]
        if sync and tensors[-1] > half:
            message = f"{how}, it holds more after twice as many steps"
            yield Found(message, None, None, "bytes of all tensors", str(tensors[-1]), str(half))
        filling = 16 * _MEMORY_STEPS // 2  # bytes that a store of fixed size may still take
        for what, taken, allowed in (("tensors", tensors, 0), ("objects besides tensors", objects, filling)):
            growth = [taken[(i + 1) * len(taken) // 4 - 1] - taken[i * len(taken) // 4 - 1] for i in (1, 2, 3)]
            if min(growth) > allowed:  # in each of the three quarters after the first
                where = f"bytes in some {_MEMORY_STEPS // 2} steps"
                yield Found(
                    f"{how}, {what} take more and more memory", None, None, where, f"+{growth[-1]}", "no growth"
                )
                break


@contextmanager
def _only_new_objects() -> Iterator[None]:
    """Keep the garbage collector away from all objects that exist already, so that it finds new ones quickly. Where
    some are frozen before, all are afterwards: nothing says which were."""
    was_frozen = gc.get_freeze_count() > 0
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not was_frozen:
            gc.unfreeze()


def _held_bytes(spec: LearnerSpec, stream: Stream, sync: bool) -> tuple[list[int], list[int]]:
    """The bytes of all tensors, and of all other objects that the learner refers to, measured eight times along a
    stream that is repeated."""
    driver = StreamDriver(spec, stream)
    tensors, objects = [], []
    repeats = -(-_MEMORY_STEPS // (4 * stream.steps))  # whole streams, so that the input before each look is the same
    for _ in range(8):
        for _ in range(repeats):
            deque(driver.steps(), maxlen=0)
            if sync:
                driver.sync()
                driver.cell.zero_grad()
        tensors.append(_live_tensor_bytes())
        objects.append(_reachable_bytes(driver.learner))
    return tensors, objects


def _reachable_bytes(learner: Any) -> int:
    """The bytes of the objects that a learner refers to, without its cell, classes, functions and modules."""
    seen: dict[int, Any] = {}
    waiting = [learner]
    while waiting:
        found = waiting.pop()
        if id(found) not in seen and not isinstance(found, nn.Module | type | ModuleType | FunctionType | Tensor):
            seen[id(found)] = found
            waiting.extend(gc.get_referents(found))
    return sum(sys.getsizeof(found) for found in seen.values())


def _live_tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for value in gc.get_objects():
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


@check("error inputs")
def _errors(subject: Subject) -> Iterator[Found]:
    """Bad input in mid-stream is refused as declared, and the gradient stays right."""
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
                yield from _refusal_failures(driver.learner, bad, t)
        if isinstance(subject.spec.law, Unbiased):
            continue
        wrong = subject.mismatch(stream, driver)
        if wrong is not None:
            yield wrong.as_found(f"{bad.name}: after it was refused, the gradient is wrong", middle)


def _refusal_failures(learner: Any, bad: ErrorInput, t: int) -> Iterator[Found]:
    try:
        bad.call(learner)
    except Exception as error:
        if not isinstance(error, bad.raises) or bad.match not in str(error):
            expected = f"{bad.raises.__name__}{f' with {bad.match!r}' if bad.match else ''}"
            yield Found(f"{bad.name}: another error than declared", t, None, "", first_line(error), expected)
    else:
        yield Found(f"{bad.name}: it is not refused", t, None, "", "no error", bad.raises.__name__)
