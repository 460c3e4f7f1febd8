"""The checks that run a cell in the ways that the learner does: samples in other batches, with choices replayed, many
steps as one batch, and under ``torch.func``."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rtrl._utils import index_sets, pytrees
from rtrl._utils.formatting import first_line
from rtrl._utils.functional_call import functional_call
from rtrl.cells.protocol import Sparsity, call_cell, own_copy, same_choices
from rtrl.testing.cell_checks.compare import STATE, differs, gradients, only, stray
from rtrl.testing.cell_checks.points import Heads, Point, Subject, leaves
from rtrl.testing.report import Found

_TRIES = 4  # generic points a step at which a cell that routes by values has its chance to choose otherwise


def sample_failures(subject: Subject) -> Iterator[Found]:
    """A sample is the same alone, in the batch and in a larger one, and no derivative leads to another sample."""
    for point in (p.fresh() for p in subject.points):
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
        if point.replay is None:  # else the check of replay does as much
            yield from _in_a_larger_batch(point, together)
        yield from _meeting(subject, point)


def _in_a_larger_batch(point: Point, together: Heads) -> Iterator[Found]:
    twice = replace(point, x=pytrees.concatenate([point.x] * 2), h=torch.cat([point.h] * 2))
    y, h_next, _ = twice.run()
    larger = {"h_next": h_next, **leaves(y, twice.h.shape[0])}
    for what in together.keys() & larger.keys():
        message = f"a sample computes another {what} in a batch of twice the size"
        yield from differs(message, point, larger[what][: point.h.shape[0]], together[what], what)


def _meeting(subject: Subject, point: Point) -> Iterator[Found]:
    """Derivatives across samples, of everything by the state and by x."""
    x = pytrees.map_tensors(lambda t: t.clone().requires_grad_(t.is_floating_point()), point.x)
    at = replace(point.leaf(), x=x)
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
                    for found in stray(f"{what} of one sample depends on {source} of another", point, others, source):
                        yield found._replace(sample=i, where=f"sample {found.sample} of {found.where}")


def replay_failures(subject: Subject) -> Iterator[Found]:
    """Choices that depend on values need ``replay=``, and a replay is obeyed, exactly and in any batch."""
    for point in (p.fresh() for p in subject.points if not p.generic):
        others = [subject.disturbed(point, scale=1.0) for _ in range(_TRIES)]
        elsewhere = [other for other in others if not same_choices(other.sparsity, point.sparsity)]
        if elsewhere and point.replay is None:
            message = "the choices depend on the state or the parameters, so forward must take replay=None and obey it"
            yield _choices(message, point, elsewhere[0].sparsity, point.sparsity)
        elif elsewhere:
            yield from _obeyed(elsewhere[0], point.sparsity)
    for point in (p.fresh() for p in subject.points):
        if point.replay is not None:
            yield from _own_choices(point)
    if any(point.replay is not None or point.sparsity != Sparsity() for point in subject.points):
        for group in _alike(subject.points):
            yield from _as_one_batch(group)


def _choices(message: str, point: Point, found: Sparsity, expected: Sparsity) -> Found:
    """A failure that names the first choice that differs."""
    pairs = [("Sparsity.reads", found.reads, expected.reads), ("Sparsity.writes", found.writes, expected.writes)]
    pairs += [(f"Sparsity.active[{k!r}]", v, expected.active.get(k)) for k, v in found.active.items()]
    for what, one, two in pairs:
        if one is None or two is None or one.shape != two.shape:
            if one is not two:
                forms = ["all" if t is None else f"shape {tuple(t.shape)}" for t in (one, two)]
                return Found(message, point.step, None, what, *forms)
        elif not torch.equal(one, two):
            sample = int((one != two).any(dim=1).nonzero()[0])
            return Found(message, point.step, sample, what, str(one[sample].tolist()), str(two[sample].tolist()))
    return Found(message, point.step, None, "Sparsity.active", str(sorted(found.active)), str(sorted(expected.active)))


def _obeyed(point: Point, laid_down: Sparsity) -> Iterator[Found]:
    """Choices made elsewhere are made here when they are replayed."""
    at = replace(point, replay=own_copy(laid_down), sparsity=laid_down)
    _, h_next, used = at.run()
    if not same_choices(used, laid_down):
        yield _choices("the cell does not make the choices of the Sparsity that it is given", at, used, laid_down)
    elif laid_down.writes is not None:
        kept = index_sets.scatter(h_next, laid_down.writes, index_sets.gather(at.h, laid_down.writes))
        yield from differs("replaying a Sparsity, the cell writes other rows", at, kept, at.h, "row", exact=True)


def _own_choices(point: Point) -> Iterator[Found]:
    """Replaying the choices just made changes no bit."""
    (y, h_next, _), (y_again, h_again, used) = point.run(free=True), point.run()
    if not same_choices(used, point.sparsity):
        yield _choices("replaying its own choices, the cell makes others", point, used, point.sparsity)
        return
    batch = point.h.shape[0]
    again = {"h_next": h_again, **leaves(y_again, batch)}
    for what, value in {"h_next": h_next, **leaves(y, batch)}.items():
        message = f"replaying its own choices changes {what}"
        yield from differs(message, point, again[what], value, what, exact=True)


def _alike(points: Sequence[Point]) -> list[list[Point]]:
    """Steps that can be run as one batch; a lone one is taken twice."""
    groups: dict[Any, list[Point]] = {}
    for point in points:
        if not point.generic:  # these share their parameters
            groups.setdefault(pytrees.signature((_per_sample(point.x), _per_sample(point.sparsity))), []).append(point)
    return [group if len(group) > 1 else group * 2 for group in groups.values()]


def _per_sample(tree: Any) -> Any:
    """The same tree with one sample's worth of every tensor, so that signatures compare what joins."""
    return pytrees.map_tensors(lambda t: t[:1], tree)


def _as_one_batch(group: list[Point]) -> Iterator[Found]:
    """Several steps as one batch give what each gave."""
    first = group[0].fresh()
    x, h, sparsity, replay = pytrees.concatenate([(p.x, p.h, p.sparsity, p.replay) for p in group])
    y, h_next, used = replace(first, x=x, h=h, replay=replay).run()
    if not same_choices(used, sparsity):
        yield _choices("as one batch, several steps make other choices than one by one", first, used, sparsity)
        return
    if replay is None:
        return  # nothing to replay: samples in other batches are another check's
    together = {"h_next": h_next, **leaves(y, h.shape[0])}
    size = first.h.shape[0]
    for k, point in enumerate(group):
        y, h_next, _ = point.fresh().run()
        for what, value in {"h_next": h_next, **leaves(y, size)}.items():
            if what in together:
                part = together[what][k * size : (k + 1) * size]
                message = f"as one batch, several steps give another {what} than one by one"
                yield from differs(message, point, part, value, what)


def torch_func_failures(subject: Subject) -> Iterator[Found]:
    """``functional_call`` substitutes every parameter, ``vjp`` and ``vmap`` over cotangents give what autograd does."""
    given = [p for p in subject.points if not p.generic]
    for point in (p.fresh() for p in subject.points):
        batch = point.h.shape[0]
        y, h_next, _ = point.run()
        direct = {"h_next": h_next, **leaves(y, batch)}
        theta = {name: p.detach() for name, p in point.cell.named_parameters()}
        called = _Functional(replace(point, cell=copy.deepcopy(given[0].cell)), list(direct))
        for what, value in zip(direct, called(theta, point.h), strict=True):
            message = f"torch.func.functional_call gives another {what}: a parameter is used that was not substituted"
            yield from differs(message, point, value, direct[what], what)
        yield from _vjp(subject, point, called, direct, theta)
        yield from _vmap(subject, point, called, direct, theta)


class _Functional:
    """A step as a function of parameters and state."""

    def __init__(self, point: Point, names: list[str]) -> None:
        self.point, self.names = point, names

    def __call__(
        self, theta: dict[str, Tensor], h: Tensor, x: Any = None, replay: Sparsity | None = None
    ) -> list[Tensor]:
        """h_next and the leaves of y."""

        buffers = {name: value.clone() for name, value in self.point.cell.named_buffers()}  # the check of purity's

        def substituted(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self.point.cell, {**buffers, **theta}, args, kwargs)

        x, replay = (self.point.x, self.point.replay) if x is None else (x, replay)
        y, h_next, _ = call_cell(substituted, pytrees.map_tensors(torch.clone, x), h.clone(), replay)
        found = {"h_next": h_next, **leaves(y, h.shape[0])}
        return [found[name] for name in self.names]


def _vjp(
    subject: Subject, point: Point, called: _Functional, direct: Heads, theta: dict[str, Tensor]
) -> Iterator[Found]:
    at = point.leaf()
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
    subject: Subject, point: Point, called: _Functional, direct: Heads, theta: dict[str, Tensor]
) -> Iterator[Found]:
    """Sample by sample under vmap: the same, or a refusal, which costs time and nothing else."""
    flat, refill = pytrees.flatten((point.x, point.h, point.replay))
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]

    def one(*mine: Tensor) -> list[Tensor]:
        refilled = list(flat)
        for i, leaf in zip(places, mine, strict=True):
            refilled[i] = leaf
        x, h, replay = refill(refilled)
        return called(theta, h, x, replay)

    try:
        found = torch.func.vmap(one)(*(flat[i].unsqueeze(1) for i in places))
    except Exception as error:
        subject.notes.append(
            f"the cell does not run under torch.func.vmap ({first_line(error)}); parameters without a linear use are "
            "then linearised sample by sample: exact, but slow"
        )
        return
    for i in range(point.h.shape[0]):
        y, h_next, _ = point.sample(i).run()  # not the batch: where samples meet, another check says so
        alone = {"h_next": h_next, **leaves(y, 1)}
        for what, value in zip(direct, found, strict=True):
            if what in alone:
                message = f"under torch.func.vmap a sample computes another {what}"
                yield from differs(message, point, value[i], alone[what], what, offset=i)
