"""The structure of a cell: which entries of the state depend on which, and which of them each parameter reaches.

It is looked for at perturbed points, where no derivative is zero by chance, and kept if it makes the influence smaller.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rtrl._engine.checks import reached_leaves
from rtrl._engine.mixing import perturb
from rtrl._engine.probe import has_numbers
from rtrl._engine.recorded import StepBatch
from rtrl._engine.taps import Tap, record_taps
from rtrl._engine.untapped import call_with, pull_rows
from rtrl._influence.condensation import coupled, feeding, independent_rows, layers
from rtrl._influence.structure import (
    ALL,
    GroupReach,
    Orientation,
    ParameterReach,
    RowMap,
    Structure,
    by_channel,
    channels,
    from_channels,
)
from rtrl._utils import pytrees
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import RealForms, as_real, real_numbers
from rtrl.errors import CellError

_SAMPLES = 4  # of a batch of steps, at each perturbed point
_POINTS = (0.1, 0.1, 1.0, 1.0)  # sizes of the perturbations: units that are cut off at one point are not at another
_MORE_POINTS = 12  # at most, as long as an entry of the next state is cut off from the state at all of them
_CHUNK = 2**23  # numbers of Jacobians that are looked at together
_MOST = 2**28  # pairs of an entry of the state and an element of a parameter that are kept apart
_WORTH = 0.6  # of the influence's numbers: a structure that saves less is not used


@dataclass(slots=True)
class Pattern:
    """Which derivatives of a step are not zero.

    Attributes:
        adjacency: Boolean (H, H) on the CPU, ``∂h_next[i]/∂h[j]``.
        hits: parameter → its orientation and Boolean (H, C) on the CPU, ``∂h_next[i]/∂θ`` of each channel.
        unfit: parameters with linear uses that are not of this form, or of several.
        tapped: parameters with linear uses, which say what their channels are.
    """

    adjacency: Tensor
    hits: dict[str, tuple[Orientation, Tensor]] = field(default_factory=dict)
    unfit: set[str] = field(default_factory=set)
    tapped: set[str] = field(default_factory=set)

    def add(self, name: str, shape: torch.Size, orientation: Orientation, hits: Tensor) -> None:
        """Add what a parameter reaches. Elements are added to the channels that they belong to."""
        if name not in self.hits:
            self.hits[name] = orientation, hits
            return
        kept, known = self.hits[name]
        if kept != orientation:
            kept = orientation if kept == "element" else kept if orientation == "element" else "element"
            known, hits = (_in_orientation(kept, *each, shape) for each in (self.hits[name], (orientation, hits)))
        self.hits[name] = kept, known | hits

    def include(self, structure: Structure, numbers: int) -> None:
        """Add all that a structure allows."""
        self.adjacency |= coupled(
            [group.cpu() for group in structure.groups], [list(fed) for fed in structure.feeds], numbers
        )
        for name, reach in structure.parameters.items():
            self.add(name, reach.shape, reach.orientation, _allowed(structure, reach, numbers))

    def within(self, structure: Structure) -> bool:
        """Whether a structure allows all of it."""
        numbers = len(self.adjacency)
        allowed = Pattern(torch.zeros_like(self.adjacency))
        allowed.include(structure, numbers)
        if bool((self.adjacency & ~allowed.adjacency).any()):
            return False
        for name, (orientation, hits) in self.hits.items():
            side, most = allowed.hits[name]
            if side != orientation:
                shape = structure.parameters[name].shape
                hits, most = _elements(orientation, hits, shape), _elements(side, most, shape)
            if bool((hits & ~most).any()):
                return False
        return True


def _elements(orientation: Orientation, hits: Tensor, shape: torch.Size) -> Tensor:
    """(H, C) → (H, P)."""
    count, each = channels(shape, orientation)
    return from_channels(hits.unsqueeze(2).expand(-1, count, each), shape, orientation).reshape(len(hits), -1)


def _in_orientation(kept: Orientation, orientation: Orientation, hits: Tensor, shape: torch.Size) -> Tensor:
    """(H, C) in one orientation → what includes it in another."""
    if kept == orientation:
        return hits
    elements = _elements(orientation, hits, shape).reshape(len(hits), *shape)
    return by_channel(elements, shape, kept).any(dim=2)


def _allowed(structure: Structure, reach: ParameterReach, numbers: int) -> Tensor:
    """What a parameter may reach, Boolean (H, C)."""
    count = reach.sizes[0]
    allowed = torch.zeros(numbers, count, dtype=torch.bool, device="cpu")
    for group, rows in zip(structure.groups, reach.groups, strict=True):
        if rows is ALL:
            allowed[group.flatten().cpu()] = True
        elif rows is not None:
            present = rows.present.cpu()
            allowed[group.cpu()[rows.index.cpu()[present]], torch.arange(count, device="cpu")[present][:, None]] = True
    return allowed


def look(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: StepBatch,
    untapped: Iterable[str],
    generator: torch.Generator | None = None,
    size_of_noise: float = 0.1,
) -> Pattern:
    """Look which derivatives of a batch of dense steps are not zero.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        batch: the steps.
        untapped: parameters whose uses are not recorded.
        generator: perturbs the states and parameters of some of the samples; None looks at all of them as they are.
        size_of_noise: see ``perturb``.

    Cost: H backward passes over the samples, batched.
    """
    size, numbers = batch.h.shape[0], batch.h[0].numel()
    kept = list(range(size))
    if generator is not None:
        kept = torch.linspace(0, size - 1, _SAMPLES, device="cpu").long().tolist()
    x, h, replay = pytrees.map_tensors(lambda leaf: leaf[kept], (batch.x, batch.h.detach(), batch.replay))

    def moved(value: Tensor) -> Tensor:
        return value.detach().clone() if generator is None else perturb(value, generator, size_of_noise)

    theta = {name: moved(p).requires_grad_(name in parameters) for name, p in cell.named_parameters()}
    h = moved(h).requires_grad_()
    skipped, shapes = set(untapped), {name: p.shape for name, p in RealForms(parameters).items()}
    with torch.enable_grad():
        (_, h_next, _), recorder = record_taps(
            lambda: call_with(cell, theta, x, h, replay),
            {name: theta[name] for name in parameters},
            len(h),
            skipped,
            copy=True,
            elementwise=True,
        )
        head = h_next.reshape(len(h), numbers)
    pattern = Pattern(torch.zeros(numbers, numbers, dtype=torch.bool, device="cpu"))
    if not reached_leaves(head).keys().isdisjoint(map(id, parameters.values())):
        return _everything(pattern)  # code that PyTorch does not dispatch from Python took a parameter itself
    uses: list[list[tuple[Tap, Orientation]]] = []
    for taps in recorder.by_output:
        fitting = []
        for tap in taps:
            orientation = _orientation(tap, shapes[tap.name])
            if orientation is None:
                pattern.unfit.add(tap.name)
            else:
                fitting.append((tap, orientation))
        uses.append(fitting)
    if not head.requires_grad:
        return pattern
    reached = reached_leaves(head)
    other_uses = [name for name in parameters if id(theta[name]) in reached]
    if numbers * sum(real_numbers(theta[name]) for name in other_uses) > _MOST:
        return _everything(pattern)
    leaves = [theta[name] for name in other_uses]
    inputs = [h, *(taps[0].output for taps in recorder.by_output), *leaves]
    span = max(1, _CHUNK // sum(value.numel() for value in inputs))
    eye = torch.eye(numbers, dtype=head.dtype, device=head.device)
    rows: list[list[Tensor]] = [[] for _ in inputs]
    for start in range(0, numbers, span):
        weights = eye[start : start + span, None].expand(-1, *head.shape)
        for place, jacobian in enumerate(pull_rows(head, inputs, weights)):
            found = (jacobian != 0) & (jacobian == jacobian)  # NaN says nothing
            if place == 0:
                found = found.flatten(2).any(dim=1)
            elif place <= len(uses):
                found = found.reshape(len(found), -1, recorder.by_output[place - 1][0].shape[2]).any(dim=1)
            else:
                found = as_real(jacobian)
                found = ((found != 0) & (found == found)).reshape(len(found), -1)
            rows[place].append(found.cpu())
    joined = [torch.cat(parts) for parts in rows]
    pattern.adjacency |= joined[0]
    for fitting, hits in zip(uses, joined[1:], strict=False):
        for tap, orientation in fitting:
            if tap.name in pattern.hits and pattern.hits[tap.name][0] != orientation:
                pattern.unfit.add(tap.name)
            pattern.tapped.add(tap.name)
            pattern.add(tap.name, shapes[tap.name], orientation, hits)
    for name, hits in zip(other_uses, joined[1 + len(uses) :], strict=True):
        if hits.any():
            if name in pattern.hits:
                pattern.unfit.add(name)
            pattern.add(name, shapes[name], "element", hits)
    return pattern


def _everything(pattern: Pattern) -> Pattern:
    """A pattern that leaves no structure."""
    pattern.adjacency |= True
    return pattern


def _orientation(tap: Tap, shape: torch.Size) -> Orientation | None:
    """What the outputs of a linear map are to a parameter; None if they are not its channels."""
    count = tap.shape[2]
    if tap.factor is not None:
        return "element"
    table = tap.index is not None and tap.inputs is None and len(shape) == 2
    if (tap.transposed or table) and shape[-1] == count:
        return "last"
    return "first" if tap.index is None and not tap.transposed and shape[:1] == (count,) else None


def find_structure(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[StepBatch],
    untapped: Iterable[str],
    known: Structure | None = None,
    first: Mapping[str, Tensor] | None = None,
    declared: list[Tensor] | None = None,
) -> Structure | None:
    """Look for a structure that the steps of a block have.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        batches: the steps, those of one kind together.
        untapped: parameters whose uses are not recorded.
        known: a structure that they had so far; what it allows stays allowed.
        first: parameter → influence of a learned first state (B, H, P).
        declared: the groups that the cell declares, see ``rtrl.cells.row_groups``.

    Returns:
        The structure, on the CPU; None if there is none that makes the influence much smaller, or if there are
        no numbers to look at.

    Raises:
        CellError: rows that are declared as independent are not.

    Cost: once, four to sixteen times H backward passes over four samples, one time where every entry of the state
        depends on every other; with ``known``, over all steps as well.
    """
    numbers, shapes = batches[0].h[0].numel(), {name: p.shape for name, p in RealForms(parameters).items()}
    if not has_numbers(batches[0].h):
        return None
    skipped = set(untapped)
    for _ in range(3):
        pattern = _pattern(cell, parameters, batches, skipped, known is not None)
        if not pattern.unfit <= skipped:
            skipped |= pattern.unfit
            continue
        if known is not None:
            pattern.include(known, numbers)
        for name, influence in (first or {}).items():
            hits = (influence != 0).any(dim=0).cpu()
            pattern.add(name, shapes[name], "element", hits)
        structure = _best(pattern, parameters, numbers, frozenset(skipped), declared)
        ambiguous = set() if structure is None else _ambiguous(structure) - skipped
        if not ambiguous:
            return structure
        skipped |= ambiguous
    return None


def _pattern(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Sequence[StepBatch],
    untapped: Iterable[str],
    everywhere: bool,
) -> Pattern:
    """What is found at perturbed points, and at the steps themselves if ``everywhere``."""
    shapes = {name: p.shape for name, p in RealForms(parameters).items()}
    merged = Pattern(torch.zeros(2 * [batches[0].h[0].numel()], dtype=torch.bool, device="cpu"))

    def take(batch: StepBatch, generator: torch.Generator | None, noise: float) -> None:
        try:
            pattern = look(cell, parameters, batch, untapped, generator, noise)
        except RuntimeError as error:  # the perturbed point may lie outside the cell's domain
            if is_out_of_memory(error):
                raise
            pattern = look(cell, parameters, batch, untapped)
        merged.adjacency.logical_or_(pattern.adjacency)
        merged.unfit.update(pattern.unfit)
        merged.tapped.update(pattern.tapped)
        for name, (orientation, hits) in pattern.hits.items():
            merged.add(name, shapes[name], orientation, hits)

    for batch in batches:
        for i, noise in enumerate(_POINTS):
            if merged.adjacency.all():  # there is nothing more to find
                return merged
            take(batch, torch.Generator().manual_seed(4 + i), noise)
        for i in range(_MORE_POINTS):
            if merged.adjacency.any(dim=1).all():
                break
            take(batch, torch.Generator().manual_seed(4 + len(_POINTS) + i), _POINTS[-1])
        if everywhere:
            take(batch, None, 0.0)
    return merged


def _best(
    pattern: Pattern,
    parameters: Mapping[str, nn.Parameter],
    numbers: int,
    untapped: frozenset[str],
    declared: list[Tensor] | None,
) -> Structure | None:
    """The structure that is declared, or else the one with the fewest numbers of influence, if it is worth having;
    rather rows than layers."""
    shapes = {name: parameter.shape for name, parameter in RealForms(parameters).items()}
    reached = sum(shapes[name].numel() for name, (_, hits) in pattern.hits.items() if hits.any())
    least = _WORTH * numbers * reached
    best = None
    if declared is None:
        divisions = [independent_rows(pattern.adjacency), layers(pattern.adjacency)]
    else:
        _check_declared(declared, pattern.adjacency)
        divisions = [declared]
    for groups in divisions:
        if groups is None or (len(groups) == 1 and groups[0].shape[0] == 1):
            continue
        structure = _structure(groups, pattern, shapes, untapped)
        if structure.numbers() <= least:
            best, least = structure, _WORTH * structure.numbers()
    return best


def _check_declared(groups: list[Tensor], adjacency: Tensor) -> None:
    """Refuse rows that are declared as independent and are not.

    Raises:
        CellError: naming two entries.
    """
    feeds = [[b < a for b in range(len(groups))] for a in range(len(groups))]
    stray = adjacency & ~coupled(groups, feeds, len(adjacency))
    if bool(stray.any()):
        i, j = stray.nonzero()[0].tolist()
        raise CellError(
            f"the cell declares by row_groups() that entry {i} of the state does not depend on entry {j}, but it does. "
            "Declare one row for both, or let the learner find the rows: leave row_groups() out"
        )


def _structure(
    groups: list[Tensor], pattern: Pattern, shapes: Mapping[str, torch.Size], untapped: frozenset[str]
) -> Structure:
    feeds = feeding(groups, pattern.adjacency)
    parameters = {}
    for name, shape in shapes.items():
        if name not in pattern.hits:
            parameters[name] = ParameterReach(shape, "element", (None,) * len(groups))
            continue
        orientation, hits = pattern.hits[name]
        forms = [(orientation, hits)]
        if name not in pattern.tapped and orientation == "element" and len(shape) > 1:
            element = hits.reshape(len(hits), *shape)
            forms += [(side, by_channel(element, shape, side).any(dim=2)) for side in ("first", "last")]
        reaches = [ParameterReach(shape, side, _reach(groups, feeds, of_side)) for side, of_side in forms]
        parameters[name] = min(reversed(reaches), key=lambda reach: _weight(groups, reach))
    return Structure(tuple(groups), tuple(tuple(fed) for fed in feeds), parameters, untapped)


def _weight(groups: list[Tensor], reach: ParameterReach) -> int:
    """How many numbers of influence each element has."""
    pairs = zip(groups, reach.groups, strict=True)
    return sum(0 if rows is None else group.numel() if rows is ALL else group.shape[1] for group, rows in pairs)


def _reach(groups: list[Tensor], feeds: list[list[bool]], hits: Tensor) -> tuple[GroupReach, ...]:
    reach: list[GroupReach] = []
    for a, group in enumerate(groups):
        rows = hits[group].any(dim=1)  # (n, C)
        count = rows.sum(dim=0)
        if any(feeds[a][b] and reach[b] is not None for b in range(a)) or bool((count > 1).any()):
            reach.append(ALL)
        elif not bool(rows.any()):
            reach.append(None)
        else:
            reach.append(RowMap.of(torch.where(count > 0, rows.int().argmax(dim=0), -1), group.shape[0]))
    return tuple(reach)


def _ambiguous(structure: Structure) -> set[str]:
    """The parameters with an output that may reach several rows of the groups that no other feeds."""
    found = set()
    for name, reach in structure.parameters.items():
        rows = [reach.groups[a] for a in structure.alone]
        reached = [each for each in rows if isinstance(each, RowMap)]
        several = len(reached) > 1 and bool((torch.stack([each.present for each in reached]).sum(dim=0) > 1).any())
        if several or any(each is ALL for each in rows):
            found.add(name)
    return found
