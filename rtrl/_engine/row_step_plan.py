"""What is the same at all steps of a kind that ``row_step`` processes: found once, and compared at every step."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rtrl._engine.recorded import RecordedStep
from rtrl._engine.row_linearization import ROUNDING, RowSeeds, channel_weights
from rtrl._engine.taps import Tap, TapRecorder
from rtrl._influence.structure import RowMap, Structure, from_channels
from rtrl._utils import pytrees
from rtrl._utils.real_pairs import is_continuous
from rtrl.cells.protocol import call_cell


class StepRun(NamedTuple):
    """A step, run again with a graph.

    Attributes:
        h, h_next: the states before and after it.
        outputs: the tensors of y.
        uses: the recorded uses of parameters, those of one output together.
        inputs: what is differentiated by: h, the recorded outputs, all parameters.
    """

    h: Tensor
    h_next: Tensor
    outputs: list[Tensor]
    uses: list[list[Tap]]
    inputs: list[Tensor]


class Place(NamedTuple):
    """A parameter among the columns of what the passes give.

    Attributes:
        name: the parameter.
        group, width: of the rows that it reaches.
        columns: where the derivatives by it, or by the output of its use, are.
        use: output and number of that use; None for the parameter itself.
    """

    name: str
    group: int
    width: int
    columns: slice
    use: tuple[int, int] | None


class StepPlan(NamedTuple):
    """What is the same at all steps of a kind.

    Attributes:
        structure: the structure that it was made for.
        skipped: parameters whose uses are not recorded.
        form: that of the recorded uses, see ``form_of``.
        reached: for each of the inputs, whether the next state depends on it.
        cotangents: of the passes, like the state; the last one is the probe.
        mix: (w, 1), the weight of each pass but the last in the probe.
        weights: (T,), what the probe weights each column with.
        sizes: of the inputs that are reached, in numbers; none of them is empty.
        allowed: how far the probe may be off, as a part of the largest number of each input.
        places: of the parameters that the next state depends on.
    """

    structure: Structure
    skipped: frozenset[str]
    form: tuple[Any, ...]
    reached: tuple[bool, ...]
    cotangents: list[Tensor]
    mix: Tensor
    weights: Tensor
    sizes: list[int]
    allowed: float
    places: list[Place]


def run_again(
    cell: nn.Module, parameters: Mapping[str, nn.Parameter], step: RecordedStep, skipped: Iterable[str]
) -> StepRun | None:
    """StepRun a step again; None if the cell does anything unusual."""
    h = step.h.detach().requires_grad_()
    recorder = TapRecorder(parameters, 1, skipped, elementwise=True)
    with recorder:
        y, h_next, sparsity = call_cell(cell, step.x, h, None)
    usual = sparsity.reads is None and sparsity.writes is None and not sparsity.active and h_next.requires_grad
    if not usual or recorder.inner_gradient or recorder.changed_in_place:
        return None
    outputs = [leaf for leaf in pytrees.tensors(y) if is_continuous(leaf)]
    inputs = [h, *(taps[0].output for taps in recorder.by_output), *parameters.values()]
    return StepRun(h, h_next, outputs, recorder.by_output, inputs)


def plan_for(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    step: RecordedStep,
    structure: Structure,
    skipped: frozenset[str],
) -> StepPlan | None:
    """Make the plan for steps like this one; None if they are not for here."""
    with torch.enable_grad():
        run = run_again(cell, parameters, step, skipped)
        if run is None or len(structure.alone) != len(structure.groups):
            return None
        pulled = torch.autograd.grad(
            run.h_next, run.inputs, torch.ones_like(run.h_next), retain_graph=True, allow_unused=True
        )
    tapped = {tap.name for taps in run.uses for tap in taps}
    seeds = RowSeeds(structure, run.h)
    weights, sizes, places, start = [seeds.weights], [run.h.numel()], list[Place](), run.h.numel()
    outer: list[list[Tap] | str] = [*run.uses, *parameters]  # what the inputs but h belong to
    reached = tuple(value is not None for value in pulled)
    if not reached[0] or not all(_usual(tap, structure, run.h.dtype) for taps in run.uses for tap in taps):
        return None
    for i, (of_input, value) in enumerate(zip(outer, pulled[1:], strict=True)):
        if value is None:
            continue
        names = [of_input] if isinstance(of_input, str) else [tap.name for tap in of_input]
        columns = slice(start, start + value.numel())
        for k, name in enumerate(names):
            reach = structure.parameters[name]
            groups = [a for a, rows in enumerate(reach.groups) if rows is not None]
            if len(groups) > 1 or (isinstance(of_input, str) and name in tapped):
                return None
            for a in groups:
                rows = reach.groups[a]
                if not isinstance(rows, RowMap) or not rows.complete:
                    return None
                use = None if isinstance(of_input, str) else (i, k)
                places.append(Place(name, a, structure.groups[a].shape[1], columns, use))
        reach = structure.parameters[names[0]]
        by_channels = channel_weights(structure, seeds.weights, names[0], reach.sizes[0])
        if isinstance(of_input, str):
            wide = from_channels(by_channels[:, None].expand(reach.sizes), reach.shape, reach.orientation)
            weights.append(wide.flatten())
        else:
            weights.append(by_channels.repeat(value.numel() // max(len(by_channels), 1)))
        sizes.append(value.numel())
        start += value.numel()
    if not all(sizes):
        return None
    return StepPlan(
        structure=structure,
        skipped=skipped,
        form=form_of(run),
        reached=reached,
        cotangents=[seed.view_as(run.h_next) for seed in (*seeds.alone, seeds.probe)],
        mix=seeds.mix[:, None],
        weights=torch.cat(weights),
        sizes=sizes,
        allowed=ROUNDING * torch.finfo(run.h.dtype).eps * float(seeds.weights.abs().max()),
        places=places,
    )


def form_of(run: StepRun) -> tuple[Any, ...]:
    """What must stay the same from step to step."""
    return tuple(
        [
            (tap.name, tap.shape, tap.transposed, tap.index is None, tap.factor is None, tap.inputs is None)
            for taps in run.uses
            for tap in taps
        ]
    ) + tuple([len(taps) for taps in run.uses])


def _usual(tap: Tap, structure: Structure, dtype: torch.dtype) -> bool:
    """Whether a use is of a kind that is processed here: its outputs are the channels of the whole parameter."""
    reach = structure.parameters[tap.name]
    fits = tap.index is None and tap.shape[0] == 1 and tap.shape[2] == reach.sizes[0] and tap.output.dtype == dtype
    if tap.inputs is None:
        return fits and reach.sizes[1] == 1
    return fits and tap.inputs.shape[-1] == reach.sizes[1]
