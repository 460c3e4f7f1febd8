"""The checks of a cell: small functions, registered by name in the order in which they run."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from rtrl._engine import checks, contract
from rtrl._engine.analytic import check_analytic_step
from rtrl._utils import index_sets, pytrees
from rtrl._utils.formatting import first_line
from rtrl.cells.analytic import HasAnalyticStep
from rtrl.cells.protocol import same_choices
from rtrl.cells.sequences import HasUnroll
from rtrl.errors import CellError
from rtrl.testing.cell_checks.batching import replay_failures, sample_failures, torch_func_failures
from rtrl.testing.cell_checks.compare import (
    STATE,
    differs,
    gradients,
    must_be_zero,
    not_finite,
    only,
    same_bits,
)
from rtrl.testing.cell_checks.points import EvaluationPoint, Subject, build_points, cast, leaves
from rtrl.testing.cell_checks.rows import row_group_failures
from rtrl.testing.report import Failure, Found, Report

Check = Callable[[Subject], Iterator[Found]]
_NEEDS_NOTHING, _NEEDS_A_STEP, _NEEDS_POINTS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class _Registered:
    check: Check
    needs: int


_CHECKS: dict[str, _Registered] = {}


def _check(name: str, needs: int = _NEEDS_POINTS) -> Callable[[Check], Check]:
    def register(function: Check) -> Check:
        _CHECKS[name] = _Registered(function, needs)
        return function

    return register


def cell_checks() -> list[str]:
    """List the names of all checks of a cell, in the order in which they run.

    Example:
        >>> cell_checks()[:3]
        ['returns', 'state form', 'y per sample']
    """
    return list(_CHECKS)


def run_checks(subject: Subject, report: Report) -> Report:
    """Run every check of the ``subject`` that can be judged, and add to the ``report``.

    A cell that raises fails the check in which it raises.
    """
    stage = _NEEDS_NOTHING
    for name, registered in _CHECKS.items():
        if registered.needs > stage:
            report.skipped[name] = "because a check that it depends on failed"
            continue
        report.checks.append(name)
        said: set[str] = set()  # one failure of each kind: the first step and sample that shows it
        before = len(report.failures)
        try:
            for found in registered.check(subject):
                if found.message not in said:
                    said.add(found.message)
                    report.failures.append(Failure(name, *found))
        except Exception as error:
            report.failures.append(Failure(name, f"the cell raised {first_line(error)}"))
        passed = len(report.failures) == before
        if name == "returns" and passed:
            stage = _NEEDS_A_STEP
        if name == "state form" and passed:
            stage = _NEEDS_POINTS
    report.notes.extend(dict.fromkeys(subject.notes))
    return report


@_check("returns", _NEEDS_NOTHING)
def _returns(subject: Subject) -> Iterator[Found]:
    """The cell returns (y, h_next) or (y, h_next, Sparsity), well formed, at every point."""
    if subject.trouble is not None:
        message, step = subject.trouble
        yield Found(message, step)
        return
    kept = [point for point in subject.given if _form(point.run()[1]) == _form(point.h)]
    if len(kept) == len(subject.given):
        build_points(subject)


@_check("state form", _NEEDS_A_STEP)
def _state(subject: Subject) -> Iterator[Found]:
    for point in subject.given:
        h_next = point.with_own_cell().run()[1]
        if _form(h_next) != _form(point.h):
            yield Found(
                "the next state has another shape, dtype or device than the state",
                point.step,
                where="h_next",
                found=_form(h_next),
                expected=_form(point.h),
            )


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}"


@_check("y per sample", _NEEDS_A_STEP)
def _y(subject: Subject) -> Iterator[Found]:
    for point in subject.given:
        y, _, _ = point.with_own_cell().run()
        for leaf in pytrees.tensors(y):
            if leaf.ndim == 0 or leaf.shape[0] != point.h.shape[0]:
                yield Found(
                    "a tensor of y does not have the batch as dimension 0; reduce in the loss, not here",
                    point.step,
                    where="y",
                    found=f"shape {tuple(leaf.shape)}",
                    expected=f"shape ({point.h.shape[0]}, ...)",
                )


@_check("finite", _NEEDS_A_STEP)
def _finite(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell().with_leaf_state() for p in subject.given):
        y, h_next, _ = point.run(grad=True)
        values = {"h_next": h_next, **leaves(y, point.h.shape[0])}
        for what, value in values.items():
            yield from not_finite(f"NaN or infinity in {what}", point, value, what)
        if all(checks.finite(value) for value in values.values()):
            heads = {what: value for what, value in values.items() if what != "h_next" or value.dtype == point.h.dtype}
            for what, grad in gradients(point, heads, state=True).items():
                yield from not_finite(
                    f"NaN or infinity in the derivative by {what}", point, grad, what, samples=what == STATE
                )


@_check("pure", _NEEDS_A_STEP)
def _pure(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell() for p in subject.given):
        others = random.getstate(), np.random.get_state()[1:3]  # type: ignore[index]  # noqa: NPY002
        try:
            with torch.no_grad():
                contract.check_purity(point.cell, point.x, point.h, point.replay)
        except CellError as error:
            yield Found(str(error), point.step, where="forward")
        now = random.getstate(), np.random.get_state()[1:3]  # type: ignore[index]  # noqa: NPY002
        if repr(others) != repr(now):
            yield Found("the cell draws random numbers of Python or NumPy; pass them in x", point.step, where="forward")


@_check("deterministic", _NEEDS_A_STEP)
def _deterministic(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell() for p in subject.given):
        (y, h, used), (y_again, h_again, used_again) = point.run(free=True), point.run(free=True)
        if not same_choices(used, used_again):
            yield Found("run twice, the cell makes other choices", point.step, where="Sparsity")
        first, second = ({"h_next": h, **leaves(y, h.shape[0])}, {"h_next": h_again, **leaves(y_again, h.shape[0])})
        for what, value in first.items():
            yield from differs(
                f"run twice, {what} is not the same bit for bit", point, second[what], value, what, exact=True
            )


@_check("unwritten rows are copied")
def _copied(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell() for p in subject.points):
        if point.sparsity.writes is None:
            continue
        _, h_next, _ = point.run()
        kept = index_sets.scatter(h_next, point.sparsity.writes, index_sets.gather(point.h, point.sparsity.writes))
        yield from differs(
            "a row that is not declared as written changes (a row that decays is written, too)",
            point,
            kept,
            point.h,
            "row",
            exact=True,
        )


@_check("unwritten rows are copied in derivative")
def _copied_derivative(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell().with_leaf_state() for p in subject.points):
        if point.sparsity.writes is None:
            continue
        _, h_next, _ = point.run(grad=True)
        heads = {"h": index_sets.zero(h_next, point.sparsity.writes)}
        for i in range(point.h.shape[0]):
            weights = {"h": only(i, subject.draw(torch.zeros_like(point.h), 1.0))}
            for what, grad in gradients(point, heads, weights, state=True).items():
                if what == STATE:
                    expected = index_sets.zero(weights["h"], point.sparsity.writes)
                    one = slice(i, i + 1)
                    message = "the derivative of a row that is not declared as written is not that of a copy"
                    yield from differs(message, point, grad[one], expected[one], "row", exact=True, offset=i)
                else:
                    message = f"a row that is not declared as written moves with parameter {what!r}"
                    yield from must_be_zero(message, point, grad, f"parameter {what}", sample=i)


def _undeclared(point: EvaluationPoint) -> Tensor | None:
    """The rows (B, n) that are neither read nor written, as a mask; None if there are none."""
    declared = index_sets.union(point.sparsity.reads, point.sparsity.writes, point.h.shape[1])
    return None if declared is None or bool(declared.all()) else ~declared


@_check("reads are declared")
def _reads(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell() for p in subject.points):
        rows = _undeclared(point)
        if rows is None:
            continue
        at = point.with_leaf_state()
        y, h_next, _ = at.run(grad=True)
        wide = rows.reshape(*rows.shape, *[1] * (point.h.ndim - 2)).expand_as(point.h)
        for what, head in at.heads(y, h_next).items():
            for i in range(point.h.shape[0]):
                weights = {what: only(i, subject.draw(torch.zeros_like(head), 1.0))}
                grad = gradients(at, {what: head}, weights, state=True, parameters=False)[STATE]
                grad = torch.where(wide, grad, 0.0)[i : i + 1]
                message = f"{what.removeprefix('the ')} depend on a row that is not declared as read (derivative)"
                yield from must_be_zero(message, point, grad, "row", offset=i)
        yield from _poisoned(subject, point, wide)


def _poisoned(subject: Subject, point: EvaluationPoint, wide: Tensor) -> Iterator[Found]:
    """Other values in the undeclared rows must not change anything. Finite values decide; a NaN also reaches what is
    multiplied by an exact zero, which is only worth a note."""
    y, h_next, used = point.run()
    clean = point.heads(y, h_next)
    other = subject.draw(torch.zeros_like(point.h), 1.0)
    for poison in (other, -point.h, 1e3 * other, torch.full_like(other, float("nan"))):
        moved = replace(point, h=torch.where(wide, poison, point.h))
        try:
            y, h_next, now = moved.run()
        except Exception:
            if bool(poison.isnan().any()):
                continue  # a cell may refuse what is not finite
            raise
        if not same_choices(used, now):
            continue  # it chose differently: the check of replay reports it if that is wrong
        for what, value in moved.heads(y, h_next).items():
            if not bool(poison.isnan().any()):
                message = f"{what.removeprefix('the ')} depend on a row that is not declared as read (value)"
                yield from differs(message, point, value, clean[what], what, exact=True)
            elif not same_bits(value, clean[what]):
                subject.notes.append(
                    f"a NaN in a row that is not declared as read reaches {what}: finite values there are multiplied "
                    "by zero, which is exact; gathering the rows would also be faster"
                )


@_check("active slices are declared")
def _active(subject: Subject) -> Iterator[Found]:
    for point in (p.with_own_cell().with_leaf_state() for p in subject.points):
        active = point.sparsity.active
        if not active:
            continue
        for i in range(point.h.shape[0]):
            lone = point.sample(i)  # so that slices of other samples are not taken for its own if samples interact
            y, h_next, _ = lone.run(grad=True)
            heads = {"h_next": h_next, **leaves(y, 1)}
            weights = {what: subject.draw(torch.zeros_like(head), 1.0) for what, head in heads.items()}
            for what, grad in gradients(lone, heads, weights).items():
                if what in active:
                    dormant = grad.index_fill(0, active[what][i], 0.0)
                    message = f"a slice of parameter {what!r} is used that Sparsity.active does not declare"
                    yield from must_be_zero(message, point, dormant, f"parameter {what}", sample=i)


_check("row groups hold")(row_group_failures)
_check("independent samples")(sample_failures)
_check("replay")(replay_failures)


@_check("dtype and device")
def _dtype(subject: Subject) -> Iterator[Found]:
    for first in subject.given:
        for point in (cast(first, dtype) for dtype in (torch.float32, torch.float64)):
            try:
                y, h_next, _ = point.run(free=True)
            except Exception as error:
                message = f"the cell does not run in {point.h.dtype}: {first_line(error)}"
                yield Found(message, point.step, where="forward")
                continue
            for what, value in {"h_next": h_next, **leaves(y, point.h.shape[0])}.items():
                found, expected = (f"{t.dtype.to_real()} {t.device}" for t in (value, point.h))
                if found != expected:
                    message = f"{what} does not keep the dtype and device of the state"
                    yield Found(message, point.step, None, what, found, expected)


_check("torch.func")(torch_func_failures)


@_check("unroll")
def _unroll(subject: Subject) -> Iterator[Found]:
    """Several steps at once, if the cell takes them, are those of single steps."""
    for point in (p.with_own_cell() for p in subject.points):
        if not isinstance(point.cell, HasUnroll):
            continue
        form = pytrees.signature(point.x)
        own = ([p.x for p in subject.points if pytrees.signature(p.x) == form] * 3)[:3]
        xs, h = pytrees.stack(own), point.h
        with torch.no_grad():
            out = point.cell.unroll(pytrees.map_tensors(torch.clone, xs), h.clone())
        if out is None:
            continue
        ys, states = out
        for k in range(3):
            y, h, _ = replace(point, x=own[k], h=h).run(free=True)
            expected = {"the next state": h, **leaves(y, len(h))}
            found = {"the next state": states[k], **leaves(pytrees.map_tensors(itemgetter(k), ys), len(h))}
            for what, value in expected.items():
                if what not in found or not checks.nearly_equal(found[what], value):
                    yield Found(
                        f"unroll gives another value of {what} than single steps", point.step, where=f"step {k} of 3"
                    )
                    return


@_check("analytic step")
def _analytic_step(subject: Subject) -> Iterator[Found]:
    """Analytic derivatives, if the cell supplies them, equal those of autograd."""
    for point in (p.with_own_cell() for p in subject.points):
        declared = point.sparsity
        if not isinstance(point.cell, HasAnalyticStep) or not (declared.reads is declared.writes is None):
            continue  # the learner uses them at dense steps only
        trained = {name: p for name, p in point.cell.named_parameters() if p.requires_grad}
        try:
            check_analytic_step(point.cell, trained, point.x, point.h, point.step)
        except CellError as error:
            yield Found(str(error).removeprefix(f"step {point.step}: "), point.step, where="analytic_step")
