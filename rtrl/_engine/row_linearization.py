"""The derivatives of a batch of steps with structure: all rows of a group that no other feeds in one backward pass.

A probe holds the structure against every block: with random weights of the rows, one more backward pass must give each
row's weight times what the passes without weights give. An entry that depends on another row shows, up to rounding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rtrl._engine import contract, deferred
from rtrl._engine.autograd import AutogradLinearization
from rtrl._engine.losses import loss_cotangents
from rtrl._engine.mixing import normal_like
from rtrl._engine.recorded import StepBatch
from rtrl._engine.taps import Tap
from rtrl._engine.untapped import pull_rows, weighted_jacobians
from rtrl._influence.structure import ALL, ParameterReach, RowMap, Structure
from rtrl._utils.real_pairs import as_real

_FEW = 6  # backward passes: up to this many, one after the other costs less than a batch of them
ROUNDING = 32  # how many rounding errors of a sample's largest entry a probe may be off


class CouplingFound(Exception):
    """A derivative was found that the structure does not have."""


@dataclass(frozen=True, slots=True)
class RowTap:
    """A linear use of a parameter with its derivatives, over the N = B·m samples of a batch.

    Attributes:
        use: the tap; z is (N, L, O), its outputs being the channels of the parameter.
        alone: (w, N, L, O), ``∂h_next/∂z`` at entry k of the one row that a channel reaches, in groups that none feeds;
            None if it reaches none.
        fed: group → (N, L, n·w, O), ``∂h_next/∂z`` of a group that another feeds.
        grad_output: (N, L, O), ``∂ℓ/∂z`` through y; None if no loss reaches it.
    """

    use: Tap
    alone: Tensor | None
    fed: Mapping[int, Tensor]
    grad_output: Tensor | None

    def inputs(self, slices: int) -> Tensor | None:
        """What z is linear in, (N, L, I); None for ones."""
        if self.use.index is not None:  # rows of a table: z is (N, K, O)
            return torch.nn.functional.one_hot(self.use.index, slices).to(self.use.output.dtype)
        return None if self.use.inputs is None else self.use.inputs[:, 0]


@dataclass(frozen=True, slots=True)
class RowLinearization:
    """m steps of one kind, linearised.

    Attributes:
        times: positions of the steps in their block, ascending.
        own: for each group (B, m, n, w, w), ``J_aa``.
        cross: (a, b) → (B, m, n_a·w_a, n_b, w_b), ``J_ab``.
        adjoints: for each group (B, m, n, w), ``∂ℓ/∂h`` through each step's own y; None if it is zero.
        taps: the linear uses of parameters.
        untapped: names of parameters with other uses, which the next state depends on.
        gradients: gradient through y, summed over steps and samples, of parameters with uses that are not taps.
        has_losses: whether a loss was added at any of the steps.
        untapped_jacobians: cotangents (B, U, m, H) → the untapped parameters' weighted immediate Jacobians
            (B, U, *shape).
    """

    times: list[int]
    own: list[Tensor]
    cross: dict[tuple[int, int], Tensor]
    adjoints: list[Tensor | None]
    taps: list[RowTap]
    untapped: list[str]
    gradients: dict[str, Tensor]
    has_losses: bool
    untapped_jacobians: Callable[[Tensor], dict[str, Tensor]]


class RowSeeds:
    """The cotangents of the next state for a structure.

    Args:
        structure: the structure.
        like: a tensor of the state's dtype and device.

    Attributes:
        alone: (w, H), entry k of every row of the groups that no other feeds; w is the largest width among them.
        mix: (w,), random weights of these.
        weights: (H,), a random weight for each row of these groups, at all of its entries; zero elsewhere.
        fed: group → (n·w, H), one entry each of a group that another feeds.
    """

    def __init__(self, structure: Structure, like: Tensor) -> None:
        groups, alone = structure.groups, structure.alone
        numbers = sum(group.numel() for group in groups)
        generator = torch.Generator().manual_seed(2)  # not the user's, whose random numbers stay as they are
        width = max(groups[a].shape[1] for a in alone)
        self.alone = like.new_zeros(width, numbers)
        self.weights = like.new_zeros(numbers)
        self.mix = normal_like(like.new_empty(width), generator)
        for a in alone:
            n, own_width = groups[a].shape
            for k in range(own_width):
                self.alone[k, groups[a][:, k]] = 1.0
            self.weights[groups[a]] = normal_like(like.new_empty(n, 1), generator).expand(n, own_width)
        eye = torch.eye(numbers, dtype=like.dtype, device=like.device)
        self.fed = {a: eye[group.flatten()] for a, group in enumerate(groups) if a not in alone}

    @property
    def n_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in (self.alone, self.mix, self.weights, *self.fed.values()))

    @property
    def probe(self) -> Tensor:
        """(H,), the cotangent of the probe."""
        return self.weights * (self.mix @ self.alone)


def linearize_rows(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batch: StepBatch,
    structure: Structure,
    seeds: RowSeeds,
    untapped: Iterable[str],
    *,
    probed: bool = True,
) -> RowLinearization:
    """Linearise a batch of dense steps, run again with a graph.

    Args:
        cell: the cell.
        parameters: its trainable parameters.
        batch: the steps, whose h requires grad.
        structure: what is known of the state and the parameters.
        seeds: those of the structure.
        untapped: parameters whose uses are not recorded.
        probed: False takes the structure at its word.

    Raises:
        CouplingFound: a derivative does not fit the structure.
        CellError: run as one batch, the cell computes something else than it did step by step.
        NonFiniteError: NaN or infinity in a derivative.

    Cost: w + 1 backward passes over the batch, ``n·w`` for each group that another feeds, and one for the losses.
    """
    run = AutogradLinearization(cell, parameters, batch, untapped, elementwise=True)
    uses = [taps[0] for taps in run.recorder.by_output]
    inputs = [batch.h, *(use.output for use in uses)]
    size, head = batch.h.shape[0], run.written
    passes = [*seeds.alone, seeds.probe]
    pulled = _pull(head, inputs, passes)
    at_state, at_outputs = (
        pulled[0].flatten(2),
        [
            value.reshape(len(passes), size, *_rows_and_channels(use))
            for value, use in zip(pulled[1:], uses, strict=True)
        ],
    )
    fed = {a: _pull(head, inputs, seed) for a, seed in seeds.fed.items()}
    (adjoint, *grad_outputs), gradients = loss_cotangents(batch, run.outputs, inputs, run.untapped_anywhere)
    gradients = {name: as_real(gradient) for name, gradient in gradients.items()}
    named = [("the dynamics Jacobian", at_state.movedim(1, 0)), *_named(run, at_outputs)]
    named += [(f"the dynamics Jacobian of group {a}", values[0].movedim(1, 0)) for a, values in fed.items()]
    if adjoint is not None:
        named.append(("the adjoint", adjoint))
    contract.check_finite_samples(batch, named)
    if probed and not _agrees(structure, seeds, at_state, at_outputs, run):
        raise CouplingFound

    own, cross = _jacobians(structure, batch, at_state, {a: values[0].flatten(2) for a, values in fed.items()})
    taps = []
    for i, linked in enumerate(run.recorder.by_output):
        grad = grad_outputs[i]
        shape = _rows_and_channels(linked[0])
        grad = None if grad is None else grad.reshape(size, *shape)
        by_group = {
            a: values[i + 1].reshape(len(values[0]), size, *shape).permute(1, 2, 0, 3) for a, values in fed.items()
        }
        for use in linked:
            _check_rows_reached(structure, structure.parameters[use.name], by_group)
            taps.append(RowTap(use, at_outputs[i][:-1], by_group, grad))
    adjoints: list[Tensor | None] = [None] * len(structure.groups)
    if adjoint is not None:
        adjoints = [batch.by_step(part) for part in structure.split(adjoint.flatten(1))]
    x, h, replay, m = batch.x, batch.h.detach(), batch.replay, len(batch.steps)

    def untapped_jacobians(cotangents: Tensor) -> dict[str, Tensor]:
        tapped = {use.name for use in run.recorder.taps}
        if size == m and not run.recorder.inner_gradient and tapped.isdisjoint(run.untapped):  # this graph serves
            rows = _pull(head, [parameters[name] for name in run.untapped], cotangents[0])
            return {name: as_real(value).unsqueeze(0) for name, value in zip(run.untapped, rows, strict=True)}
        by_sample = run.recorder.inner_gradient
        return weighted_jacobians(cell, run.untapped, cotangents, x, h, replay, None, by_sample=by_sample)

    return RowLinearization(
        batch.times, own, cross, adjoints, taps, run.untapped, gradients, batch.has_losses, untapped_jacobians
    )


def _rows_and_channels(use: Tap) -> tuple[int, int]:
    """(L, O) of a use: tokens, and outputs of the linear map; rows picked from a table are tokens."""
    k, length, o = use.shape
    return k * length, o


def _pull(head: Tensor, inputs: Sequence[Tensor], cotangents: Sequence[Tensor] | Tensor) -> list[Tensor]:
    """Pull cotangents of the next state, (H,) for every sample or (N, H), back to the inputs: (I, *input.shape) for
    each."""
    if len(cotangents) > _FEW or not head.requires_grad:
        stacked = cotangents if isinstance(cotangents, Tensor) else torch.stack(list(cotangents))
        stacked = stacked if stacked.ndim == 3 else stacked.unsqueeze(1)
        return pull_rows(head, inputs, stacked.expand(-1, *head.shape))
    columns: list[list[Tensor]] = [[] for _ in inputs]
    for cotangent in cotangents:
        grads = torch.autograd.grad(head, inputs, cotangent.expand_as(head), retain_graph=True, allow_unused=True)
        for column, grad, value in zip(columns, grads, inputs, strict=True):
            column.append(torch.zeros_like(value) if grad is None else grad)
    return [torch.stack(column) for column in columns]


def _named(run: AutogradLinearization, at_outputs: Sequence[Tensor]) -> list[tuple[str, Tensor]]:
    return [
        (f"the immediate Jacobian of parameter {taps[0].name!r}", values.movedim(1, 0))
        for taps, values in zip(run.recorder.by_output, at_outputs, strict=True)
    ]


def _agrees(
    structure: Structure, seeds: RowSeeds, at_state: Tensor, at_outputs: Sequence[Tensor], run: AutogradLinearization
) -> bool:
    """Whether the probe, the last of the passes, is what the others say."""
    pairs = [(at_state, seeds.weights)]
    for taps, values in zip(run.recorder.by_output, at_outputs, strict=True):
        pairs.append((values, channel_weights(structure, seeds.weights, taps[0].name, values.shape[-1])))
    eps, worst = torch.finfo(at_state.dtype).eps, []
    for values, weights in pairs:
        terms = seeds.mix.reshape(-1, *[1] * (values.ndim - 1)) * values[:-1]
        if not values.numel():
            continue
        largest = terms.abs().sum(dim=0).flatten(1).amax(dim=1)
        error = (values[-1] - weights * terms.sum(dim=0)).abs().flatten(1)
        bound = ROUNDING * eps * largest * seeds.weights.abs().max()
        worst.append((error > bound[:, None]).any())
    return deferred.holds(~torch.stack(worst).any())


def _check_rows_reached(structure: Structure, reach: ParameterReach, fed: Mapping[int, Tensor]) -> None:
    """Refuse an output that reaches other rows of a group that another feeds, (N, L, n·w, O).

    Raises:
        CouplingFound: it does.
    """
    for a, values in fed.items():
        rows = reach.groups[a]
        if rows is ALL:
            continue
        known = values.new_zeros((), dtype=torch.int64)
        if isinstance(rows, RowMap):
            n, width = structure.groups[a].shape
            at = values.unflatten(2, (n, width))
            index = rows.index.view(1, 1, 1, 1, -1).expand(*at.shape[:2], 1, width, -1)
            known = (at.gather(2, index) * rows.present).count_nonzero()
        if not deferred.holds(known == values.count_nonzero()):
            raise CouplingFound


def channel_weights(structure: Structure, weights: Tensor, name: str, count: int) -> Tensor:
    """The weight of the row that each channel of a parameter reaches in groups that none feeds; zero without one."""
    total = weights.new_zeros(count)
    for a in structure.alone:
        rows = structure.parameters[name].groups[a]
        if isinstance(rows, RowMap):
            total += weights[structure.groups[a][:, 0]][rows.index] * rows.present
    return total


def _jacobians(
    structure: Structure, batch: StepBatch, at_state: Tensor, fed: Mapping[int, Tensor]
) -> tuple[list[Tensor], dict[tuple[int, int], Tensor]]:
    """``J_aa`` and ``J_ab`` from the passes, (passes, N, H).

    Raises:
        CouplingFound: a row of a group that another feeds depends on an entry that it should not.
    """
    own: list[Tensor] = []
    cross = {}
    alone = structure.split(at_state)  # (passes, N, n, w)
    for a, group in enumerate(structure.groups):
        n, width = group.shape
        if a not in fed:
            own.append(batch.by_step(alone[a][:width].permute(1, 2, 0, 3)))  # (N, n, k, w)
            continue
        rows = fed[a].transpose(0, 1).unflatten(1, (n, width))  # (N, n, w, H)
        index = torch.arange(n, device=group.device)
        own.append(batch.by_step(rows[:, index[:, None], :, group].permute(2, 0, 3, 1)))
        known = own[-1].count_nonzero()
        for b in (b for b in range(a) if structure.feeds[a][b]):
            values = rows.flatten(1, 2)[:, :, structure.groups[b]]
            cross[a, b] = batch.by_step(values)
            known = known + values.count_nonzero()
        if not deferred.holds(known == rows.count_nonzero()):
            raise CouplingFound
    return own, cross
