"""What linearising one step of a cell costs ``rtrl.BlockRTRL``, measured by its own ``Linearizer``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine.linearization import Linearization, UnitwiseOutputJacobian
from rtrl._engine.linearizer import Linearizer
from rtrl._engine.recorded import RecordedStep
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter, Rule


@dataclass(frozen=True)
class Use:
    """One linear use of a parameter: ``z = W u`` with z (K, L, O) and u (L, I) a sample.

    Attributes:
        name: of the parameter. k, length, outputs, inputs: K, L, O, I; inputs is 0 for a bias or a look-up.
        indexed: whether slices were picked by an index. transposed: whether it is stored as (I, O).
        response, earned: which uses share them; None where there is none.
        gates: G, where an analytic step says how unit by unit the state responds; None where it is written out.
    """

    name: str
    k: int
    length: int
    outputs: int
    inputs: int
    indexed: bool
    transposed: bool
    response: int | None
    earned: int | None
    gates: int | None


@dataclass(frozen=True)
class Line:
    """A quantity of m steps that is linear in m, known for two of them."""

    one: int
    two: int

    def __call__(self, steps: int) -> int:
        """The quantity of ``steps`` ≥ 1 steps."""
        return self.one + (steps - 1) * (self.two - self.one)


@dataclass(frozen=True)
class Linear:
    """Linearising steps of one kind, at one batch size.

    Attributes:
        uses: the taps of a step.
        general: multiply-adds of the parameters' general path a step: a forward pass, and a row of weights.
        macs: of a step. first_macs: the part of the checks of a new kind of block that is linear in its steps;
            pass_macs: of one of its backward passes, a step; lone_macs: of its forward passes of single samples.
        parts: S, the parts of a state whose derivatives are known analytically; own: how many of them meet a linear
            map. None and 0 else.
        after, before: whether losses earn at the next state, and at the state.
        peak, kept: bytes while so many steps are linearised, and of what is left of it.
    """

    uses: tuple[Use, ...]
    general: tuple[int, int]
    macs: int
    first_macs: int
    pass_macs: int
    lone_macs: int
    parts: int | None
    own: int
    after: bool
    before: bool
    peak: Line
    kept: Line

    def first(self, batch_size: int, steps: int) -> int:
        """Multiply-adds of the checks of a new kind of block."""
        samples = batch_size * steps
        return self.first_macs * steps + (
            self.lone_macs + 2 * _passes(samples) * self.pass_macs * steps if samples > 1 else 0
        )


def _passes(samples: int) -> int:
    """How many subsets separate any two of so many samples, both ways counted once."""
    return (samples - 1).bit_length()


def measure(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    steps: list[RecordedStep],
    last: Tensor,
    lone_macs: int,
    rules: Mapping[str, Rule] | None,
) -> Linear:
    """Linearise the first step twice and the first two once.

    Args:
        steps: two steps of one kind, with the gradients of their losses at their outputs. last: the state after them.
        lone_macs: multiply-adds of two samples run alone.

    Cost: three blocks of at most two steps, without the influence.
    """
    linearizer = Linearizer(cell, parameters)

    def run(of: list[RecordedStep], after: Tensor) -> tuple[int, int, int, list[Linearization]]:
        with torch.enable_grad(), MacCounter(rules) as counter, LiveBytes() as alive:
            groups = linearizer(of, after)
        return counter.macs, alive.peak, alive.now, groups

    after = steps[1].h
    checked = run(steps[:1], after)[0], run(steps, last)[0]
    one, two = run(steps[:1], after), run(steps, last)
    first, a_pass = _split(checked[0] - one[0], checked[1] - two[0], steps[0].h.shape[0], lone_macs)
    group = one[3][0]
    jacobians = (tap.output_jacobian for tap in group.taps)
    closed = [jacobian for jacobian in jacobians if isinstance(jacobian, UnitwiseOutputJacobian)]
    return Linear(
        uses=_uses(group),
        general=_general(group, steps[0].h, rules),
        macs=one[0],
        first_macs=first,
        pass_macs=a_pass,
        lone_macs=lone_macs,
        parts=closed[0].values.shape[1] if closed else None,
        own=_own(cell, steps[0]) if closed else 0,
        after=group.adjoint_next is not None,
        before=group.adjoint is not None,
        peak=Line(one[1], two[1]),
        kept=Line(one[2], two[2]),
    )


def _split(one: int, two: int, batch_size: int, lone: int) -> tuple[int, int]:
    """The linear part of the checks of one step and of two, and one of their backward passes, both a step."""
    early = 2 * _passes(batch_size)
    one -= lone if batch_size > 1 else 0
    a_pass = (two - lone - 2 * one) // 4  # the second step doubles the samples: two passes more, over two steps
    return one - early * a_pass, a_pass


def _uses(group: Linearization) -> tuple[Use, ...]:
    places: dict[int, int] = {}

    def place(value: Any) -> int | None:
        return None if value is None else places.setdefault(id(value), len(places))

    found = []
    for tap in group.taps:
        use, response = tap.use, tap.output_jacobian
        k, length, outputs = use.shape
        found.append(
            Use(
                name=use.name,
                k=k,
                length=length,
                outputs=outputs,
                inputs=0 if use.inputs is None else use.inputs.shape[-1],
                indexed=use.index is not None,
                transposed=use.transposed,
                response=place(response if use.name not in group.untapped else None),
                earned=place(tap.grad_output),
                gates=response.values.shape[2] if isinstance(response, UnitwiseOutputJacobian) else None,
            )
        )
    return tuple(found)


def _general(group: Linearization, h: Tensor, rules: Mapping[str, Rule] | None) -> tuple[int, int]:
    if not group.untapped:
        return 0, 0
    size, _, rows, _ = group.state_jacobian(0, 1).shape
    macs = []
    for count in (1, 2):
        with MacCounter(rules) as counter, torch.no_grad():
            group.untapped_jacobians(h.new_ones(size, count, 1, rows))
        macs.append(counter.macs)
    return 2 * macs[0] - macs[1], macs[1] - macs[0]


def _own(cell: Any, step: RecordedStep) -> int:
    """The parts of the state that meet a linear map."""
    form = cell.analytic_step(step.x, step.h)
    return len({tap.part for tap in form.taps if tap.part is not None})
