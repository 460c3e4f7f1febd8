"""Checks that run a cell as the learner does: in other batches, with replayed choices, with many steps as one batch,
and under ``torch.func``."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import index_sets, pytrees
from rtrl._utils.formatting import first_line
from rtrl._utils.functional_call import check_substituted, functional_call
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import Sparsity, call_cell, own_copy, same_choices
from rtrl.testing.cell_checks.compare import STATE, differs, gradients, must_be_zero, only
from rtrl.testing.cell_checks.points import EvaluationPoint, Heads, Subject, leaves
from rtrl.testing.report import Found

_TRIES = 4  # perturbed points per step at which a cell that routes by values may choose differently


def sample_failures(subject: Subject) -> Iterator[Found]:
    """A sample gives the same alone, in the batch and in a larger batch, and has no derivative by another sample."""
    for point in (p.with_own_cell() for p in subject.points):
        batch = point.h.shape[0]
        y, h_next, _ = point.run()
        together = {"h_next": h_next, **leaves(y, batch)}
        for i in range(batch):
            y, h_next, _ = point.sample(i).run()
            alone = {"h_next": h_next, **leaves(y, 1)}
            for what in together.keys() & alone.keys():
                message = f"a sample computes another {what} alone than in the batch"
                value = together[what][i : i + 1]
                yield from differs(message, point, value, alone[what], what, offset=i)
        if point.replay is None:  # else the check of replay covers it
            yield from _in_a_larger_batch(point, together)
        yield from _interactions(subject, point)


def _in_a_larger_batch(point: EvaluationPoint, together: Heads) -> Iterator[Found]:
    twice = replace(point, x=pytrees.concatenate([point.x] * 2), h=torch.cat([point.h] * 2))
    y, h_next, _ = twice.run()
    larger = {"h_next": h_next, **leaves(y, twice.h.shape[0])}
    for what in together.keys() & larger.keys():
        message = f"a sample computes another {what} in a batch of twice the size"
        yield from differs(message, point, larger[what][: point.h.shape[0]], together[what], what)


def _interactions(subject: Subject, point: EvaluationPoint) -> Iterator[Found]:
    """Derivatives of h_next and y across samples, by the state and by x."""
    x = pytrees.map_tensors(lambda t: t.clone().requires_grad_(is_continuous(t)), point.x)
    at = replace(point.with_leaf_state(), x=x)
    y, h_next, _ = at.run(grad=True)
    heads = {"h_next": h_next, **leaves(y, point.h.shape[0])}
    inputs = {"the state": at.h, **{f"x[{k}]": t for k, t in enumerate(pytrees.tensors(x)) if t.requires_grad}}
    for what, head in heads.items():
        if not head.requires_grad:
            continue
        for i in range(point.h.shape[0]):
            weight = only(i, subject.draw(torch.zeros_like(head), 1.0))
            grads = torch.autograd.grad(head, list(inputs.values()), weight, retain_graph=True, allow_unused=True)
            for source, grad in zip(inputs, grads, strict=True):
                if grad is not None:
                    others = grad.index_fill(0, torch.tensor([i], device=grad.device), 0.0)
                    for found in must_be_zero(
                        f"{what} of one sample depends on {source} of another", point, others, source
                    ):
                        yield found._replace(sample=i, where=f"sample {found.sample} of {found.where}")


def replay_failures(subject: Subject) -> Iterator[Found]:
    """A cell whose choices depend on values takes ``replay=``, and follows it exactly and in any batch."""
    for point in (p.with_own_cell() for p in subject.points if not p.perturbed):
        others = [subject.perturb(point, scale=1.0) for _ in range(_TRIES)]
        elsewhere = [other for other in others if not same_choices(other.sparsity, point.sparsity)]
        if elsewhere and point.replay is None:
            message = "choices depend on the state or the parameters, so forward must take replay=None and follow it"
            yield _choices(message, point, elsewhere[0].sparsity, point.sparsity)
        elif elsewhere:
            yield from _replayed(elsewhere[0], point.sparsity)
    for point in (p.with_own_cell() for p in subject.points):
        if point.replay is not None:
            yield from _own_choices(point)
    if any(point.replay is not None or point.sparsity != Sparsity() for point in subject.points):
        for group in _alike(subject.points):
            yield from _as_one_batch(group)


def _choices(message: str, point: EvaluationPoint, found: Sparsity, expected: Sparsity) -> Found:
    """Name the first choice that differs."""
    pairs = [("Sparsity.reads", found.reads, expected.reads), ("Sparsity.writes", found.writes, expected.writes)]
    pairs += [(f"Sparsity.active[{k!r}]", v, expected.active.get(k)) for k, v in found.active.items()]
    for what, first, second in pairs:
        if first is None or second is None or first.shape != second.shape:
            if first is not second:
                forms = ["all" if t is None else f"shape {tuple(t.shape)}" for t in (first, second)]
                return Found(message, point.step, None, what, *forms)
        elif not torch.equal(first, second):
            sample = int((first != second).any(dim=1).nonzero()[0])
            return Found(message, point.step, sample, what, str(first[sample].tolist()), str(second[sample].tolist()))
    return Found(message, point.step, None, "Sparsity.active", str(sorted(found.active)), str(sorted(expected.active)))


def _replayed(point: EvaluationPoint, recorded: Sparsity) -> Iterator[Found]:
    """The cell makes the choices of another point when they are replayed."""
    at = replace(point, replay=own_copy(recorded), sparsity=recorded)
    _, h_next, used = at.run()
    if not same_choices(used, recorded):
        yield _choices("the cell does not make the choices of its replay", at, used, recorded)
    elif recorded.writes is not None:
        kept = index_sets.scatter(h_next, recorded.writes, index_sets.gather(at.h, recorded.writes))
        yield from differs("replaying a Sparsity, the cell writes other rows", at, kept, at.h, "row", exact=True)


def _own_choices(point: EvaluationPoint) -> Iterator[Found]:
    """Replaying the cell's own choices does not change a bit."""
    (y, h_next, _), (y_again, h_again, used) = point.run(free=True), point.run()
    if not same_choices(used, point.sparsity):
        yield _choices("replaying its own choices, the cell makes others", point, used, point.sparsity)
        return
    batch = point.h.shape[0]
    again = {"h_next": h_again, **leaves(y_again, batch)}
    for what, value in {"h_next": h_next, **leaves(y, batch)}.items():
        message = f"replaying its own choices changes {what}"
        yield from differs(message, point, again[what], value, what, exact=True)


def _alike(points: Sequence[EvaluationPoint]) -> list[list[EvaluationPoint]]:
    """Groups of steps that can be run as one batch; a single step is used twice."""
    groups: dict[Any, list[EvaluationPoint]] = {}
    for point in points:
        if not point.perturbed:  # these share their parameters
            groups.setdefault(pytrees.signature((_per_sample(point.x), _per_sample(point.sparsity))), []).append(point)
    return [group if len(group) > 1 else group * 2 for group in groups.values()]


def _per_sample(tree: Any) -> Any:
    """Reduce every tensor to one sample, so that batches of any size have the same signature."""
    return pytrees.map_tensors(lambda t: t[:1], tree)


def _as_one_batch(group: list[EvaluationPoint]) -> Iterator[Found]:
    """Several steps as one batch give the results of the single steps."""
    first = group[0].with_own_cell()
    x, h, sparsity, replay = pytrees.concatenate([(p.x, p.h, p.sparsity, p.replay) for p in group])
    y, h_next, used = replace(first, x=x, h=h, replay=replay).run()
    if not same_choices(used, sparsity):
        yield _choices("as one batch, several steps make other choices than one by one", first, used, sparsity)
        return
    if replay is None:
        return  # without a replay, another check covers larger batches
    together = {"h_next": h_next, **leaves(y, h.shape[0])}
    size = first.h.shape[0]
    for k, point in enumerate(group):
        y, h_next, _ = point.with_own_cell().run()
        for what, value in {"h_next": h_next, **leaves(y, size)}.items():
            if what in together:
                part = together[what][k * size : (k + 1) * size]
                message = f"as one batch, several steps give another {what} than one by one"
                yield from differs(message, point, part, value, what)


def torch_func_failures(subject: Subject) -> Iterator[Found]:
    """Every parameter can be substituted; ``vjp`` and ``vmap`` agree with autograd, or the cell does not run there,
    which only costs time."""
    given = [p for p in subject.points if not p.perturbed]
    for point in (p.with_own_cell() for p in subject.points):
        batch = point.h.shape[0]
        y, h_next, _ = point.run()
        direct = {"h_next": h_next, **leaves(y, batch)}
        theta = {name: p.detach() for name, p in point.cell.named_parameters()}
        called = _Functional(replace(point, cell=copy.deepcopy(given[0].cell)), list(direct))
        for what, value in zip(direct, called(theta, point.h), strict=True):
            message = f"with other values of its parameters, the cell gives another {what}: it keeps values of its own"
            yield from differs(message, point, value, direct[what], what)
        for check in (_vjp, _vmap):
            try:
                found = list(check(subject, point, called, direct, theta))
            except Exception as error:
                subject.notes.append(
                    f"the cell does not run under torch.func ({first_line(error)}); parameters without a linear use "
                    "are then linearized sample by sample: exact, but slow"
                )
                return
            yield from found


class _Functional:
    """A step as a function of parameters and state."""

    def __init__(self, point: EvaluationPoint, names: list[str]) -> None:
        self.point, self.names = point, names

    def __call__(
        self, theta: dict[str, Tensor], h: Tensor, x: Any = None, replay: Sparsity | None = None
    ) -> list[Tensor]:
        """Return h_next and the leaves of y."""
        buffers = {name: value.clone() for name, value in self.point.cell.named_buffers()}

        def substituted(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.point.cell, {**buffers, **theta}, args, kwargs)

        x, replay = (self.point.x, self.point.replay) if x is None else (x, replay)
        y, h_next, _ = call_cell(substituted, pytrees.map_tensors(torch.clone, x), h.clone(), replay)
        if torch._C._functorch.is_functorch_wrapped_tensor(h_next):
            check_substituted(h_next)
        found = {"h_next": h_next, **leaves(y, h.shape[0])}
        return [found[name] for name in self.names]


def _vjp(
    subject: Subject, point: EvaluationPoint, called: _Functional, direct: Heads, theta: dict[str, Tensor]
) -> Iterator[Found]:
    at = point.with_leaf_state()
    y, h_next, _ = at.run(grad=True)
    heads = {"h_next": h_next, **leaves(y, point.h.shape[0])}
    weights = {what: subject.draw(torch.zeros_like(head), 1.0) for what, head in heads.items()}
    expected = gradients(at, heads, weights, state=True)
    moving = {name: value for name, value in theta.items() if name in expected}
    frozen = {name: value for name, value in theta.items() if name not in expected}
    pull = torch.func.vjp(lambda values, h: called({**frozen, **values}, h), moving, point.h)[1]
    ways = {"vjp": pull(list(weights.values()))}
    doubled = torch.func.vmap(pull)([torch.stack([w, -w]) for w in weights.values()])
    ways["vmap over vjp"] = pytrees.map_tensors(lambda t: t[0], doubled)
    for way, (by_theta, by_h) in ways.items():
        for what, value in {STATE: by_h, **by_theta}.items():
            message = f"torch.func.{way} gives another derivative by {what} than autograd"
            yield from differs(message, point, value.unsqueeze(0), expected[what].unsqueeze(0), what)


def _vmap(
    subject: Subject, point: EvaluationPoint, called: _Functional, direct: Heads, theta: dict[str, Tensor]
) -> Iterator[Found]:
    """The cell gives the same per sample under vmap."""
    flat, refill = pytrees.flatten((point.x, point.h, point.replay))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]

    def one_sample(*leaves_of_one: Tensor) -> list[Tensor]:
        refilled = list(flat)
        for i, leaf in zip(places, leaves_of_one, strict=True):
            refilled[i] = leaf
        x, h, replay = refill(refilled)
        return called(theta, h, x, replay)

    found = torch.func.vmap(one_sample)(*(flat[i].unsqueeze(1) for i in places))
    for i in range(point.h.shape[0]):
        y, h_next, _ = point.sample(i).run()  # not the batch: another check reports interactions
        alone = {"h_next": h_next, **leaves(y, 1)}
        for what, value in zip(direct, found, strict=True):
            if what in alone:
                message = f"under torch.func.vmap a sample computes another {what}"
                yield from differs(message, point, value[i], alone[what], what, offset=i)
