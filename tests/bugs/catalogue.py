"""Bugs that implementations of these ideas really had, each put into the code in memory, and the check that catches it.

Numbers up to 28 were seen in other people's code; those from 29 on were met, or nearly made, while this was written.

A bug is a wrong function in the place of another (``replaced``) or a change where a function has a certain form
(``swapped``). Either way it is tied to names that are imported here, once, and to as few others as it can be.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from breaking import Break, replaced, swapped
from torch import Tensor
from torch.nn import Parameter
from torch.nn.functional import hardshrink

from rtrl._engine.analytic import _step_of, check_analytic_step
from rtrl._engine.autograd import AutogradLinearization
from rtrl._engine.block import accumulate_losses, close_block
from rtrl._engine.checks import check_copied, check_finite
from rtrl._engine.contract import check_declared_columns, check_unwritten_rows
from rtrl._engine.first_influence import first_influence, replace_samples
from rtrl._engine.immediate import InfluenceWriter, _batches, _used_slices, active, immediate_terms
from rtrl._engine.input_gradient import input_gradients
from rtrl._engine.linearization import UnitwiseOutputJacobian, cut_at_restarts
from rtrl._engine.linearizer import Linearizer
from rtrl._engine.losses import add_loss, check_loss, loss_cotangents
from rtrl._engine.mixing import _separating_subsets, taps_mixing_samples
from rtrl._engine.optimizer_watch import OptimizerWatch
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._engine.parameter_hooks import _check_can_be_added_to, accumulate, has_hooks, hooks_suspended
from rtrl._engine.probe import ProbeWeights
from rtrl._engine.recorded import StepBatch, join_steps
from rtrl._engine.reverse_sweep import (
    _add_adjoint,
    _init_identity,
    _one_by_one,
    _per_step_adjoints,
    _scan,
    _sparse,
    reverse_sweep,
)
from rtrl._engine.row_block import _add_untapped
from rtrl._engine.row_linearization import RowSeeds, _agrees, _check_rows_reached
from rtrl._engine.row_step import _as_expected
from rtrl._engine.row_sweep import _step_across, sweep_rows
from rtrl._engine.step import _checked_leaf, take
from rtrl._engine.structure_search import _reach, find_structure
from rtrl._engine.taps import TapRecorder, _matmul
from rtrl._engine.unitwise import _state_uses, unitwise_derivatives
from rtrl._engine.untapped import sample_jacobians
from rtrl._influence.catch_up import SampleHops
from rtrl._influence.history import History
from rtrl._influence.rows import RowInfluence, row_products
from rtrl._influence.segment_tree import CircularSegmentTree as Tree
from rtrl._influence.store import ParameterInfluence as Influence
from rtrl._influence.structure import RowMap, Structure
from rtrl._influence.transition import Transition, compose, flush_subnormals
from rtrl._utils.functional_call import check_substituted
from rtrl._utils.index_sets import zero
from rtrl._utils.out_of_memory import is_out_of_memory
from rtrl._utils.real_pairs import is_continuous, unpaired
from rtrl.cells import RecurrentMoE, Stack
from rtrl.cells.complex_state import RealState
from rtrl.cells.protocol import under_vmap
from rtrl.cells.row_groups import rows_of
from rtrl.cells.supported import runs_as_written
from rtrl.cells.torch_equations import derivatives, sequence
from rtrl.errors import NonFiniteError
from rtrl.learners.block_rtrl import BlockRTRL as Learner
from rtrl.learners.bptt import _add_run
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows
from rtrl.learners.layer_local import LayerLocal
from rtrl.learners.replayed_step import ParameterSnapshot, ReplayedStep
from rtrl.learners.rule import LearningRule
from rtrl.learners.skipping import SkippingLearner
from rtrl.learners.state import step_to_plain

Function = Callable[..., Any]


@dataclass(frozen=True)
class Bug:
    """A bug: its number and name, what breaks the code, and the check that must catch it."""

    number: int
    name: str
    breaks: tuple[Break, ...]
    check: str


def swap(function: Any, find: str, put: str) -> Break:
    """What breaks a function where it has the form ``find``; see ``breaking.swapped``."""
    return partial(swapped, function, find, put)


def wrong(function: Any, make: Callable[[Function], Function]) -> Break:
    """What puts ``make(function)`` in the place of a function; see ``breaking.replaced``."""
    return partial(replaced, function, make)


def idle(function: Function) -> Function:
    """A function that does nothing."""
    return lambda *args, **options: None


# ---------------------------------------------------------------------- wrong functions that take some lines


def takes_an_empty_range_for_all(nodes: Function) -> Function:
    def wrong_nodes(self: Tree[Any], start: int, stop: int) -> Any:
        return nodes(self, self.oldest, self.stop) if start == stop else nodes(self, start, stop)

    return wrong_nodes


def pays_after_moving(advance: Function) -> Function:
    def wrong_advance(self: Influence, block: Any, gradient: Tensor) -> None:
        advance(self, block, torch.zeros_like(gradient))
        moved = self.values.clone()
        advance(self, block, gradient)
        self.values.copy_(moved)

    return wrong_advance


def pays_the_mean(advance: Function) -> Function:
    def wrong_advance(self: Influence, block: Any, gradient: Tensor) -> None:
        paid = torch.zeros_like(gradient)
        advance(self, block, paid)
        gradient += paid / self.batch_size

    return wrong_advance


def carries_nothing(advance: Function) -> Function:
    def wrong_advance(self: Influence, block: Any, gradient: Tensor) -> None:
        advance(self, block, gradient)
        self.values.zero_()

    return wrong_advance


def transposes_dense_jacobians(reverse_sweep: Function) -> Function:
    def wrong_group(group: Any) -> Any:
        sparse = group.written is not None or group.touched is not None
        return group if sparse else replace(group, state_jacobian=lambda *steps: group.state_jacobian(*steps).mT)

    return lambda groups, *rest: reverse_sweep([wrong_group(group) for group in groups], *rest)


def keeps_of_the_leaves(keeps: Callable[[Tensor, bool], bool]) -> Callable[[Function], Function]:
    """A loss counts at the leaves for which ``keeps(leaf, whether it is of this step's y)``."""

    def make(check: Function) -> Function:
        def wrong_check(loss: Tensor, outputs: list[Tensor], *rest: Any) -> list[Tensor]:
            leaves = check(loss, outputs, *rest)
            return [leaf for leaf in leaves if keeps(leaf, any(leaf is output for output in outputs))]

        return wrong_check

    return make


def shares_influences(allocate: Function) -> Function:
    made: dict[Any, Any] = {}

    def wrong_allocate(self: CarriedInfluence, sparsity: Any) -> None:
        allocate(self, sparsity)
        form = tuple((name, influence.shape) for name, influence in self.influences.items())
        self.influences = made.setdefault(form, self.influences)

    return wrong_allocate


def keeps_y(step: Function) -> Function:
    def wrong_step(self: Learner, x: Any, **options: Any) -> Any:
        y = step(self, x, **options)
        self.__dict__.setdefault("_kept", []).append(y)
        return y

    return wrong_step


def makes_numbers_of_nan(check: Function) -> Function:
    def wrong_check(what: str, value: Tensor, step: int) -> None:
        try:
            check(what, value, step)
        except NonFiniteError:
            value.nan_to_num_(0.0, 0.0, 0.0)

    return wrong_check


def gives_up_an_open_block(sync: Function) -> Function:
    def wrong_sync(self: Learner, dormant: bool = True) -> None:
        if not self.at_block_end:
            self._give_up_block()
        sync(self, dormant)

    return wrong_sync


def lets_the_last_use_win(immediate_terms: Function) -> Function:
    def wrong_terms(group: Any, *rest: Any) -> Any:
        last = {tap.name: tap for tap in group.taps if tap.output_jacobian is not None}
        return immediate_terms(replace(group, taps=list(last.values())), *rest)

    return wrong_terms


def forgets_the_adjoint_so_far(add_adjoint: Function) -> Function:
    def wrong_add_adjoint(product: Tensor, adjoint: Tensor | None, out: Tensor) -> None:
        add_adjoint(product, adjoint, out)
        if adjoint is not None:
            out[:, -1] = adjoint

    return wrong_add_adjoint


def marks_losses(add_loss: Function) -> Function:
    def marking_add_loss(loss: Any, newest: Any, *rest: Any) -> None:
        add_loss(loss, newest, *rest)
        for leaf in newest.leaves:
            leaf.marked = True

    return marking_add_loss


def drops_losses_not_marked(linearize: Function) -> Function:
    def wrong_linearize(self: Linearizer, steps: Any, *rest: Any) -> Any:
        for leaf in (leaf for step in steps for leaf in step.outputs):
            leaf.grad = leaf.grad if hasattr(leaf, "marked") else None
        return linearize(self, steps, *rest)

    return wrong_linearize


def gives_everyone_a_gradient(sync: Function) -> Function:
    def wrong_sync(self: Learner, dormant: bool = True) -> None:
        sync(self, dormant)
        for parameter in self.cell.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    return wrong_sync


def wrong_step(change: Callable[[RecurrentMoE, Tensor, Tensor], tuple[Any, Tensor]]) -> Break:
    """Steps of the mixture with another y and next state, ``change(cell, y, h_next)``."""

    def make(forward: Function) -> Function:
        def wrong_forward(self: RecurrentMoE, *args: Any, **options: Any) -> tuple[Any, ...]:
            y, h_next, sparsity = forward(self, *args, **options)
            return (*change(self, y, h_next), sparsity)

        return wrong_forward

    return wrong(RecurrentMoE.forward, make)


def counts_calls(cell: RecurrentMoE, y: Tensor, h_next: Tensor) -> tuple[Tensor, Tensor]:
    calls = cell.__dict__["_calls"] = cell.__dict__.get("_calls", 0) + 1
    return y + 1e-3 * calls, h_next


def goes_another_way_under_vmap(cell: RecurrentMoE, y: Tensor, h_next: Tensor) -> tuple[Tensor, Tensor]:
    return 2.0 * y if under_vmap(y) else y, h_next


def of_new_learners_alone(first_influence: Function) -> Function:
    def wrong_influence(first: Tensor, parameters: Any, samples: Tensor | None = None) -> Any:
        return first_influence(first, parameters) if samples is None else {}

    return wrong_influence


# ---------------------------------------------------------------------- the bugs

PARAMETERS_ARE_NOT_WATCHED = wrong(ParameterGuard.check, lambda check: lambda self, open_steps: check(self, []))
ANALYTIC_STEPS_ARE_BELIEVED = wrong(check_analytic_step, idle)

BUGS = [
    Bug(
        1,
        "a wrapped range is composed newest first",
        (wrong(Tree.nodes, lambda nodes: lambda *args: sorted(nodes(*args), key=lambda node: node.lo)),),
        "tree_in_order",
    ),
    Bug(
        2,
        "the influence advances before the adjoint meets it",
        (wrong(Influence.advance, pays_after_moving),),
        "learner: dense cell",
    ),
    Bug(
        3,
        "losses that fall while a slice sleeps are dropped",
        (
            swap(
                History._pull_back,
                "FOUND[HOP.start] = PRODUCT.pull_back(FOUND[HOP.stop], with_adjoint=WITH)",
                "FOUND[HOP.start] = PRODUCT.pull_back(FOUND[HOP.stop], with_adjoint=WITH and HOP.stop == self.now)",
            ),
        ),
        "learner: dormant slices",
    ),
    Bug(
        4,
        "a decaying row passes as unwritten",
        (wrong(check_copied, idle), wrong(check_unwritten_rows, idle)),
        "under_declared",
    ),
    Bug(
        5,
        "columns that matter are cut",
        (
            swap(
                AutogradLinearization._touched,
                "ROWS.union(READS, WRITES, SIZE)",
                "ROWS.union(WRITES, WRITES, SIZE)",
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        6,
        "the batch's mean in place of its sum",
        (wrong(Influence.advance, pays_the_mean),),
        "learner: own streams",
    ),
    Bug(
        7,
        "a slice older than the window is not caught up",
        (wrong(History.next_overwritten, idle),),
        "learner: long dormancy",
    ),
    Bug(
        8,
        "the current block is applied twice at wake-up",
        (swap(CarriedInfluence._advance, "INFLUENCE.last_block[ROWS] = NOW", "INFLUENCE.last_block[ROWS] = NOW - 1"),),
        "learner: sparse rows",
    ),
    Bug(
        9,
        "rows are overwritten while they are still being read",
        (swap(zero, "VALUES.scatter(...)", "VALUES.scatter_(...)"),),
        "learner: sparse rows",
    ),
    Bug(
        10,
        "the immediate Jacobian is added before catching up",
        (
            swap(
                CarriedInfluence.add,
                """
for NAME, INFLUENCE in INFLUENCES.items():
    if not INFLUENCE.sliced:
        ...
if CHECK is not None:
    CHECK.check_advanced(GRADIENTS, ROWS)
RESULT.add_immediate(INFLUENCES, ROWS)
""",
                """
RESULT.add_immediate(INFLUENCES, ROWS)
for NAME, INFLUENCE in INFLUENCES.items():
    if not INFLUENCE.sliced:
        ...
""",
            ),
        ),
        "learner: dense cell",
    ),
    Bug(
        11,
        "a reset leaves influence and clocks behind",
        (wrong(Influence.clear_samples, idle),),
        "learner: resets",
    ),
    Bug(
        12,
        "the Jacobian is transposed",
        (wrong(reverse_sweep, transposes_dense_jacobians),),
        "learner: layers",
    ),
    Bug(
        13,
        "identity rows are lost in composition",
        (swap(compose, "OLD.masked_fill(READ[:, :, None, None], 0.0)", "torch.zeros_like(OLD)"),),
        "learner: dormant slices",
    ),
    Bug(
        14,
        "a remembered node outlives the leaf under it",
        (swap(Tree.value, "STAMP != NODE.start", "STAMP is None"),),
        "tree_in_order",
    ),
    Bug(
        15,
        "one sample's index sets serve all",
        (
            swap(
                Transition.select_samples,
                "ROWS.select_samples(INDEX, SAMPLES)",
                "ROWS.select_samples(INDEX, SAMPLES * 0)",
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        16,
        "gradient leaks to experts that were not chosen",
        (
            swap(
                RecurrentMoE.forward,
                "LOGITS.gather(1, EXPERTS).softmax(dim=-1)",
                "LOGITS.softmax(dim=-1).gather(1, EXPERTS)",
            ),
        ),
        "cell: active slices are declared",
    ),
    Bug(
        17,
        "the loss's direct path to the parameters is dropped",
        (
            swap(
                accumulate_losses,
                "TAP.grad_output if WEIGHT is None else WEIGHT + TAP.grad_output",
                "TAP.grad_output if WEIGHT is None else WEIGHT",
            ),
        ),
        "learner: dense cell",
    ),
    Bug(
        18,
        "what a step returned is kept alive",
        (wrong(Learner.step, keeps_y),),
        "learner: constant memory",
    ),
    Bug(
        19,
        "the carry between blocks is dropped: truncated BPTT",
        (wrong(Influence.advance, carries_nothing),),
        "learner: dense cell",
    ),
    Bug(
        20,
        "a reset touches the other samples",
        (wrong(Influence.clear_samples, lambda drop: lambda self, samples: drop(self, samples | True)),),
        "learner: resets",
    ),
    Bug(
        21,
        "layers are cut apart",
        (
            swap(
                Stack.forward,
                "OUT, NEXT, USED = CALL(LAYER, OUT, ...)",
                "OUT, NEXT, USED = CALL(LAYER, OUT.detach(), ...)",
            ),
        ),
        "layers_by_hand",
    ),
    Bug(
        22,
        "NaN is turned to zero in silence",
        (wrong(check_finite, makes_numbers_of_nan),),
        "learner: error inputs",
    ),
    Bug(
        23,
        "parameters changed inside an open block pass",
        (PARAMETERS_ARE_NOT_WATCHED,),
        "parameters_changed_in_an_open_block",
    ),
    Bug(
        24,
        "a near tie is decided again",
        (swap(join_steps, "SPARSITY if TAKES_REPLAY else None", "None"),),
        "learner: near ties",
    ),
    Bug(
        25,
        "an empty range returns the whole window",
        (wrong(Tree.nodes, takes_an_empty_range_for_all),),
        "tree_in_order",
    ),
    Bug(
        26,
        "old Jacobians are applied again",
        (swap(SampleHops.apply_, "BLOCK <= HOP.start", "BLOCK <= HOP.start + 1"),),
        "learner: sparse rows",
    ),
    Bug(
        27,
        "the written rows' own columns are dropped",
        (
            swap(
                AutogradLinearization._touched,
                "ROWS.union(READS, WRITES, SIZE)",
                "ROWS.union(READS, READS, SIZE)",
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        28,
        "a kernel assumes float32",
        (
            swap(
                Influence.add_products,
                "torch.bmm(LEFT.mT, RIGHT)",
                "torch.bmm(LEFT.mT.float(), RIGHT.float()).to(LEFT.dtype)",
            ),
        ),
        "learner: dormant slices",
    ),
    Bug(
        29,
        "sleeping slices are paid twice",
        (wrong(History.pending_adjoints, lambda pending: lambda self, blocks, done: pending(self, blocks, 0)),),
        "learner: early syncs",
    ),
    Bug(
        30,
        "an early sync gives the open block up",
        (wrong(Learner.sync, gives_up_an_open_block),),
        "learner: early syncs",
    ),
    Bug(
        31,
        "parameters outside linear maps are forgotten",
        (wrong(close_block, lambda close: lambda *args: replace(close(*args), untapped={})),),
        "learner: unusual parameters",
    ),
    Bug(
        32,
        "of two uses of a parameter the last one wins",
        (wrong(immediate_terms, lets_the_last_use_win),),
        "learner: shared parameters",
    ),
    Bug(
        33,
        "the adjoint does not travel inside a block",
        (wrong(_add_adjoint, forgets_the_adjoint_so_far),),
        "learner: one loss at the last step",
    ),
    Bug(
        34,
        "gradients of an open block are not saved",
        (wrong(step_to_plain, lambda state: lambda step: {**state(step), "grads": [None for _ in step.outputs]}),),
        "learner: save and load",
    ),
    Bug(
        35,
        "a first state of zeros hides that samples mix",
        (wrong(taps_mixing_samples, lambda taps: lambda *args: set()),),
        "samples_apart",
    ),
    Bug(
        36,
        "reads that are not declared pass",
        (wrong(check_declared_columns, idle),),
        "under_declared",
    ),
    Bug(
        37,
        "slices that a step does not name count as asleep",
        (swap(active, "torch.arange(SLICES, ...)", "torch.arange(SLICES if SLICES == 1 else 0, ...)"),),
        "learner: all rows declared at some steps",
    ),
    Bug(
        38,
        "y goes through half precision",
        (
            swap(
                take,
                "OUT = MAP(torch.clone, OUT)",
                "OUT = MAP(lambda value: value.to(torch.bfloat16).to(value.dtype), OUT)",
            ),
        ),
        "learner: interface",
    ),
    Bug(
        39,
        "small products are set to zero too early",
        (
            wrong(
                flush_subnormals,
                lambda flush_subnormals: lambda product, out=None: flush_subnormals(hardshrink(product, 0.05), out),
            ),
        ),
        "learner: long stream",
    ),
    Bug(
        40,
        "a step without a loss is given that of another",
        (
            swap(
                StepBatch.grad,
                "torch.zeros_like(LEAF) if LEAF.grad is None else LEAF.grad",
                "next(s.leaves[i].grad for s in self.steps if s.has_loss) if LEAF.grad is None else LEAF.grad",
            ),
        ),
        "learner: losses at some steps",
    ),
    Bug(
        41,
        "the second loss of a step replaces the first",
        (swap(accumulate, "(BEFORE + GRADIENT).detach()", "GRADIENT.detach()"),),
        "learner: several losses per step",
    ),
    Bug(
        42,
        "the buffer of the gradient is not cleared",
        (swap(Learner._gradient_of, "torch.zeros_like(PARAMETER)", "torch.full_like(PARAMETER, 1e-3)"),),
        "learner: no loss",
    ),
    Bug(
        43,
        "an early sync leaves its open block to the new parameters",
        (
            swap(Learner.sync, "self.CLOSE()", "if self.at_block_end:\n    self.CLOSE()"),
            PARAMETERS_ARE_NOT_WATCHED,
        ),
        "learner: changed parameters",
    ),
    Bug(
        44,
        "an influence is handed out without catching up",
        (swap(CarriedInfluence.catch_up, "self.ADVANCE({NAME: ROWS})", ""),),
        "learner: influence",
    ),
    Bug(
        45,
        "gradients are float64 whatever the parameters",
        (
            swap(
                Learner._gradient_of, "torch.zeros_like(PARAMETER)", "torch.zeros_like(PARAMETER, dtype=torch.float64)"
            ),
        ),
        "learner: float32",
    ),
    Bug(
        46,
        "the cell is left in evaluation mode",
        (wrong(take, lambda take: lambda cell, *rest: take(cell.eval(), *rest)),),
        "learner: cell unchanged",
    ),
    Bug(
        47,
        "a choice lies beyond the last slot",
        (
            swap(
                RecurrentMoE.forward,
                "self.choices(READS, WRITES, EXPERTS)",
                "self.choices(READS, WRITES + 4, EXPERTS)",
            ),
        ),
        "cell: returns",
    ),
    Bug(
        48,
        "the state grows a row a step",
        (wrong_step(lambda cell, y, h_next: (y, torch.cat([h_next, h_next[:, :1]], dim=1))),),
        "cell: state form",
    ),
    Bug(
        49,
        "y is one number for the batch",
        (wrong_step(lambda cell, y, h_next: (y.sum(), h_next)),),
        "cell: y per sample",
    ),
    Bug(
        50,
        "a square root has no derivative at zero",
        (wrong_step(lambda cell, y, h_next: (y + (0 * y).square().sum(dim=1, keepdim=True).sqrt(), h_next)),),
        "cell: finite",
    ),
    Bug(
        51,
        "the router explores by chance",
        (
            swap(
                RecurrentMoE.forward,
                "LOGITS = self.router(INPUT)",
                "LOGITS = self.router(INPUT)\nLOGITS = LOGITS + 0.1 * torch.rand_like(LOGITS)",
            ),
        ),
        "cell: pure",
    ),
    Bug(
        52,
        "what is computed depends on what was computed before",
        (wrong_step(counts_calls),),
        "cell: deterministic",
    ),
    Bug(
        53,
        "slots that are not written decay",
        (swap(RecurrentMoE.forward, "h.scatter(...)", "(0.99 * h).scatter(...)"),),
        "cell: unwritten rows are copied",
    ),
    Bug(
        54,
        "slots that are not written are copied without their derivative",
        (swap(RecurrentMoE.forward, "h.scatter(...)", "h.detach().scatter(...)"),),
        "cell: unwritten rows are copied in derivative",
    ),
    Bug(
        55,
        "the read's softmax runs over all slots",
        (
            swap(
                RecurrentMoE.forward,
                """
SCORES = torch.einsum("bd,brd->br", QUERY, SLOTS) / SCALE
READ = READS.shape[1] * SCORES.softmax(dim=-1).unsqueeze(-1) * SLOTS
""",
                """
SCORES = torch.einsum("bd,bnd->bn", QUERY, h + self.slot_embedding) / SCALE
READ = READS.shape[1] * SCORES.softmax(dim=-1).gather(1, READS).unsqueeze(-1) * SLOTS
""",
            ),
        ),
        "cell: reads are declared",
    ),
    Bug(
        56,
        "scores are normalised over the batch",
        (
            swap(
                RecurrentMoE.forward,
                "LOGITS = self.router(INPUT)",
                "LOGITS = self.router(INPUT)\nLOGITS = LOGITS - LOGITS.mean(dim=0)",
            ),
        ),
        "cell: independent samples",
    ),
    Bug(
        57,
        "a replay of experts is not obeyed",
        (
            swap(
                RecurrentMoE.forward,
                "if replay is None:\n    EXPERTS = TOP(LOGITS, self.topk)",
                "EXPERTS = TOP(LOGITS, self.topk)",
            ),
        ),
        "cell: replay",
    ),
    Bug(
        58,
        "a constant is made in float32",
        (wrong_step(lambda cell, y, h_next: (y + torch.zeros(1, dtype=torch.float64), h_next)),),
        "cell: dtype and device",
    ),
    Bug(
        59,
        "under vmap the cell computes something else",
        (wrong_step(goes_another_way_under_vmap),),
        "cell: torch.func",
    ),
    Bug(
        60,
        "the write gate forgets its score",
        (swap(RecurrentMoE.forward, "self.gate(SOURCE) + SCORE", "self.gate(SOURCE)"),),
        "cell_equals_loops",
    ),
    Bug(
        61,
        "a loss that was not handed to the learner is dropped",
        (wrong(add_loss, marks_losses), wrong(Linearizer.__call__, drops_losses_not_marked)),
        "learner: plain backward",
    ),
    Bug(
        62,
        "frozen parameters are given a gradient",
        (wrong(Learner.sync, gives_everyone_a_gradient),),
        "learner: partly trained",
    ),
    Bug(
        63,
        "samples without a loss take that of the others",
        (
            swap(
                accumulate,
                "GRADIENT.clone() if OTHER else SUM",
                "torch.where((GRADIENT == 0).flatten(1).all(dim=1).reshape(-1, *[1] * (GRADIENT.ndim - 1)), "
                "GRADIENT.sum(dim=0, keepdim=True), GRADIENT) if OTHER else SUM",
            ),
        ),
        "learner: losses of single samples",
    ),
    Bug(
        64,
        "adjoints are clipped",
        (
            swap(
                accumulate,
                "GRADIENT.clone() if OTHER else SUM",
                "GRADIENT.clamp(-1000, 1000) if OTHER else SUM",
            ),
        ),
        "learner: losses of all scales",
    ),
    Bug(
        65,
        "x is kept, not copied",
        (swap(_checked_leaf, "LEAF.clone()", "LEAF.detach()"),),
        "learner: views as inputs",
    ),
    Bug(
        66,
        "a reset inside a block is not recorded",
        (swap(Learner.reset, "self._restarting = RESTARTING", "pass"),),
        "learner: resets of several samples",
    ),
    Bug(
        67,
        "bookkeeping of the CPU is made on the default device",
        (swap(Influence.allocate, 'torch.arange(COUNT, device="cpu")', "torch.arange(COUNT)"),),
        "whatever_the_default_device",
    ),
    Bug(
        68,
        "outputs after one without a loss are forgotten",
        (swap(loss_cotangents, "continue", "break"),),
        "losses_of_the_second_output",
    ),
    Bug(
        69,
        "pieces of a scan do not see what comes after them",
        (
            swap(
                _scan,
                "BETWEEN[:, 1:].unsqueeze(2)",
                "BETWEEN[:, -1:].expand_as(BETWEEN[:, 1:]).unsqueeze(2)",
            ),
        ),
        "analytic_steps",
    ),
    Bug(
        70,
        "a scan over steps that do not fill its pieces begins with zeros",
        (swap(_scan, "torch.eye(SIZE, ...)", "torch.zeros(SIZE, SIZE, ...)"),),
        "analytic_steps",
    ),
    Bug(
        71,
        "adjoints of tiny losses are set to zero with the products",
        (wrong(_add_adjoint, lambda add: lambda product, adjoint, out: add(flush_subnormals(product), adjoint, out)),),
        "tiny_losses",
    ),
    Bug(
        72,
        "an analytic step forgets what a gate does",
        (
            swap(derivatives, "[BY_NEW * NEW, CHANGE]", "[0 * BY_NEW, CHANGE]"),
            ANALYTIC_STEPS_ARE_BELIEVED,
        ),
        "analytic_steps",
    ),
    Bug(
        73,
        "an analytic step that is wrong is believed",
        (ANALYTIC_STEPS_ARE_BELIEVED,),
        "wrong_analytic_steps_are_refused",
    ),
    Bug(
        74,
        "only the first part of the state responds",
        (swap(UnitwiseOutputJacobian.vjp, "range(1, PARTS)", "range(1, 1)"),),
        "analytic_steps",
    ),
    Bug(
        75,
        "of many rows of a Jacobian only the first ones are pulled back",
        (swap(sample_jacobians, "slice(START, START + SPAN)", "slice(0, SPAN)"),),
        "long_blocks",
    ),
    Bug(
        76,
        "of many entries of a slice only the first batch counts",
        (swap(_batches, "range(0, LONGEST, LIMIT)", "range(0, 1)"),),
        "long_blocks",
    ),
    Bug(
        77,
        "rows of a Jacobian that are pulled back together are stored in reverse order",
        (
            swap(
                sample_jacobians,
                "GRAD.reshape(len(GRAD), NN, -1).transpose(0, 1)",
                "GRAD.reshape(len(GRAD), NN, -1).flip(0).transpose(0, 1)",
            ),
        ),
        "long_blocks",
    ),
    Bug(
        78,
        "immediate influence added some rows of the state at a time goes to the first rows every time",
        (swap(InfluenceWriter.parts, "slice(START, min(START + SPAN, COUNT))", "slice(0, min(SPAN, COUNT - START))"),),
        "long_blocks",
    ),
    Bug(
        79,
        "memory that is used again is taken to be empty",
        (swap(_init_identity, "XS[:, -1] = 0.0", ""),),
        "long_blocks",
    ),
    Bug(
        80,
        "the slope of a gate is taken for the gate",
        (swap(derivatives, "torch.addcmul(GATES, GATES, GATES, value=-1)", "GATES"),),
        "cell: analytic step",
    ),
    Bug(
        81,
        "the adjoint does not travel through a large dense block",
        (swap(_one_by_one, "ROWS[INDEX].add_(ADJOINT)", "ROWS[INDEX].copy_(ADJOINT)"),),
        "long_blocks",
    ),
    Bug(
        82,
        "the adjoint at a step's next state is added a step late",
        (swap(_per_step_adjoints, "ADJOINTS[:, 1:] += NEXT", "ADJOINTS[:, :-1] += NEXT"),),
        "long_blocks",
    ),
    Bug(
        83,
        "adjoints of tiny losses are set to zero in large dense blocks",
        (swap(_one_by_one, "XS[..., :-1, :]", "XS"),),
        "tiny_losses",
    ),
    Bug(
        84,
        "a reset after a multiple of 32 steps keeps the influence",
        (
            wrong(
                Learner._clear,
                lambda clear: lambda self, *args: None if self.steps_taken % 32 == 0 else clear(self, *args),
            ),
            swap(
                Learner.reset,
                "self._restarting = RESTARTING",
                "self._restarting = None if self.steps_taken % 32 == 0 else RESTARTING",
            ),
        ),
        "learner: resets at block borders",
    ),
    Bug(
        85,
        "what a loss says of the parameters is dropped",
        (wrong(check_loss, keeps_of_the_leaves(lambda leaf, of_y: of_y)),),
        "learner: losses with a penalty",
    ),
    Bug(
        86,
        "of a loss over two steps only the newest y counts",
        (wrong(check_loss, keeps_of_the_leaves(lambda leaf, of_y: of_y or isinstance(leaf, Parameter))),),
        "learner: losses over two steps",
    ),
    Bug(
        87,
        "a loss after a sync is lost without a word",
        (
            wrong(
                Learner.backward,
                lambda backward: lambda self, loss: backward(self, loss) if self._open_steps else None,
            ),
        ),
        "learner: syncs before the loss",
    ),
    Bug(
        88,
        "learners of cells of one form share their influences",
        (wrong(CarriedInfluence._allocate, shares_influences),),
        "learner: two learners at once",
    ),
    Bug(
        89,
        "a save forgets what was delivered to dormant slices",
        (wrong(CarriedInfluence.state_dict, lambda saved: lambda self: {**saved(self), "accumulated_until": 0}),),
        "learner: drawn mixtures",
    ),
    Bug(
        90,
        "slices met by a matrix product are taken for rows of its output",
        (swap(_matmul, "RECORDER.record(..., transposed=True)", "RECORDER.record(...)"),),
        "declared_slices",
    ),
    Bug(
        91,
        "the active slices of a weight serve its bias",
        (
            swap(
                immediate_terms,
                "torch.equal(INDEX, USED) and torch.equal(ACTIVE, KEYS[TAP.name])",
                "torch.equal(INDEX, USED)",
            ),
        ),
        "declared_slices",
    ),
    Bug(
        92,
        "undeclared slices of a whole product pass",
        (swap(_used_slices, "int(VALUES.count_nonzero()) != INSIDE", "False"),),
        "declared_slices",
    ),
    Bug(
        93,
        "a readout is given the weights of another readout's loss",
        (
            swap(
                accumulate_losses,
                "(id(TAP.output_jacobian), id(TAP.grad_output), STATE)",
                "(id(TAP.output_jacobian), TAP.grad_output is None, STATE)",
            ),
        ),
        "analytic_steps_of_several_kinds",
    ),
    Bug(
        94,
        "the adjoint at a step's next state is dropped between groups",
        (swap(_sparse, "if GROUP.adjoint_next is not None:\n    ...", ""),),
        "analytic_steps_of_several_kinds",
    ),
    Bug(
        95,
        "rows that begin in one piece are taken to lie in one piece",
        (swap(Influence.add_products, "bool((ROWS == ALL).all())", "bool((ROWS == ALL).any())"),),
        "rows_in_pieces",
    ),
    Bug(
        96,
        "a probe of samples holds the last one every time",
        (wrong(_separating_subsets, lambda subsets: lambda *args: subsets(*args)[: len(subsets(*args)) // 2]),),
        "leaning_samples_are_found",
    ),
    Bug(
        97,
        "a loss counts only if every output has one",
        (swap(ReplayedStep.has_pending_loss, "any(...)", "all(...)"),),
        "losses_of_the_second_output",
    ),
    Bug(
        98,
        "a learned first state is a constant after a reset",
        (wrong(first_influence, of_new_learners_alone),),
        "learned_first_states",
    ),
    Bug(
        99,
        "samples that restart take the place of those that did before",
        (wrong(replace_samples, lambda replace: lambda held, new, samples: dict(new)),),
        "learned_first_states",
    ),
    Bug(
        100,
        "an optimizer that leaves versions as they are is not heard of",
        (wrong(OptimizerWatch.step, idle),),
        "fused_updates",
    ),
    Bug(
        101,
        "an update of before the block counts as one inside it",
        (swap(ParameterGuard.begin, "self.optimizers.updated.clear()", "pass"),),
        "fused_updates",
    ),
    Bug(
        102,
        "deliveries that were erased are not counted",
        (swap(OptimizerWatch.step, "self.lost += 1", "pass"),),
        "gradients_that_no_optimizer_finds",
    ),
    Bug(
        103,
        "parameters that are frozen or unfrozen change nothing",
        (wrong(Learner._adopt, idle),),
        "frozen_parameters",
    ),
    Bug(
        104,
        "the gradient at x goes through no state",
        (swap(input_gradients, "call_cell(CELL, XS, STATE, REPLAY)", "call_cell(CELL, XS, STATE.detach(), REPLAY)"),),
        "gradients_at_inputs",
    ),
    Bug(
        105,
        "a copy is not given the losses of the open block",
        (
            swap(
                step_to_plain,
                "[None if GRAD is None else GRAD.clone() for GRAD in step.grads]",
                "[None] * len(step.outputs)",
            ),
        ),
        "copies",
    ),
    Bug(
        106,
        "what was not substituted goes unnoticed",
        (wrong(check_substituted, idle),),
        "user_cells",
    ),
    Bug(
        107,
        "a gradient that a cell takes is not noticed",
        (swap(TapRecorder.__torch_function__, "FUNC in _GRADIENTS", "False"),),
        "user_cells",
    ),
    Bug(
        108,
        "uses inside torch.func are recorded",
        (swap(TapRecorder.__torch_function__, "torch._C._are_functorch_transforms_active()", "False"),),
        "user_cells",
    ),
    Bug(
        109,
        "a tangent is taken for a constant",
        (swap(TapRecorder.__torch_function__, "forward_ad._current_level >= 0", "False"),),
        "user_cells",
    ),
    Bug(
        110,
        "a module with hooks is taken for its equations",
        (wrong(runs_as_written, lambda runs: lambda module: True),),
        "modules_with_hooks",
    ),
    Bug(
        111,
        "a bias that is computed is taken for a constant",
        (swap(_step_of, "(TAP.weight, TAP.bias)", "(TAP.weight,)"), wrong(check_analytic_step, idle)),
        "user_cells",
    ),
    Bug(
        112,
        "steps are run again with the present parameters",
        (swap(ParameterSnapshot.applied, "present.copy_(value)", "pass"),),
        "parameters_of_each_step",
    ),
    Bug(
        113,
        "a change of parameters cuts the gradient",
        (swap(_add_run, "heads.append((h, adjoint))", "pass"),),
        "parameters_of_each_step",
    ),
    Bug(
        114,
        "hooks see the learner's own derivatives",
        (wrong(hooks_suspended, lambda suspended: lambda tensors: nullcontext()),),
        "hooks_on_parameters",
    ),
    Bug(
        115,
        "hooks are not heard at a delivery",
        (wrong(has_hooks, lambda has: lambda tensor: False),),
        "hooks_on_parameters",
    ),
    Bug(
        116,
        "the two parts of a complex unit are declared apart",
        (wrong(rows_of, lambda rows_of: lambda n, width: rows_of(n * width, 1)),),
        "cell: row groups hold",
    ),
    Bug(
        117,
        "a reset inside a block leaks: the influence goes on",
        (swap(cut_at_restarts, "zero_restarted(jacobian(START, STOP), PART)", "jacobian(START, STOP)"),),
        "learner: resets",
    ),
    Bug(
        118,
        "a reset inside a block leaks: the losses after it reach back",
        (swap(cut_at_restarts, "zero_restarted(STEPS.adjoint, RESTARTED)", "STEPS.adjoint"),),
        "learner: resets",
    ),
    Bug(
        119,
        "a reset inside a block revives dormant slices",
        (swap(CarriedInfluence.add, "self._drop(...)", "pass"),),
        "learner: drawn mixtures",
    ),
    Bug(
        120,
        "a reset inside a block leaves what rows that are not written hand on",
        (swap(_sparse, "XX.view(...).masked_fill_(RESTARTED, 0.0)", "pass"),),
        "learner: drawn mixtures",
    ),
    Bug(
        121,
        "a coupling of units missed by the probe: behind or before a linear map, or in the state",
        (wrong(ProbeWeights.agree, lambda agree: lambda *args: True),),
        "units_that_begin_to_interact",
    ),
    Bug(
        122,
        "a linear map behind another is taken for one of the state alone",
        (swap(_state_uses, "any(GRAD is not None for GRAD in THROUGH)", "False"),),
        "units_that_interact",
    ),
    Bug(
        123,
        "the slope of what a linear map takes is left out",
        (swap(_state_uses, "_is_one(PLAIN[:, PART])", "True"),),
        "plain_cells_of_users",
    ),
    Bug(
        124,
        "what units do to themselves outside the linear maps is left out",
        (
            swap(
                unitwise_derivatives,
                "UnitwiseStateJacobian(STATES, SIZES, USES, DIRECT)",
                "UnitwiseStateJacobian(STATES, SIZES, USES, None)",
            ),
        ),
        "plain_cells_of_users",
    ),
    Bug(
        125,
        "a loss of a complex output is dropped",
        (swap(is_continuous, "VALUE.is_floating_point() or VALUE.is_complex()", "VALUE.is_floating_point()"),),
        "complex_numbers",
    ),
    Bug(
        126,
        "the gradient by a complex number is conjugated",
        (
            swap(
                unpaired,
                "torch.complex(VALUE[..., 0], VALUE[..., 1])",
                "torch.complex(VALUE[..., 0], -VALUE[..., 1])",
            ),
        ),
        "complex_numbers",
    ),
    Bug(
        127,
        "the imaginary part of a complex state is taken for a constant",
        (
            swap(
                RealState.forward,
                "torch.complex(STATE[..., 0], STATE[..., 1])",
                "torch.complex(STATE[..., 0], STATE[..., 1].detach())",
            ),
        ),
        "complex_numbers",
    ),
    Bug(
        128,
        "RTRL within layers keeps what the layers above remember",
        (swap(LayerLocal._layer_pattern, "OWN[ENTRIES[PREFIX]] = True", "OWN[:] = True"),),
        "influence_of_layers",
    ),
    Bug(
        129,
        "a coupling is missed: the probe weighs all rows alike",
        (swap(RowSeeds.__init__, "normal_like(LIKE.new_empty(n, 1), GENERATOR)", "LIKE.new_ones(n, 1)"),),
        "rows_that_open",
    ),
    Bug(
        130,
        "a weight that reaches another row than before goes unnoticed",
        (swap(_add_untapped, "PROBED and not ANY", "False"),),
        "weights_that_reach_other_rows",
    ),
    Bug(
        131,
        "an output that reaches another row of an upper layer goes unnoticed",
        (wrong(_check_rows_reached, idle),),
        "outputs_above_that_reach_other_rows",
    ),
    Bug(
        132,
        "what a layer passes on directly is dropped from the products",
        (swap(_step_across, "OUT += row_products(...).reshape(OUT.shape)", "pass"),),
        "layers_of_rows",
    ),
    Bug(
        133,
        "what passes through the layer between is dropped from the products",
        (swap(_step_across, "(a, c) in YS and (c, b) in CROSS", "False"),),
        "layers_of_rows",
    ),
    Bug(
        134,
        "the adjoint does not reach the layer below",
        (swap(sweep_rows, "(c, a) in CROSS", "False"),),
        "layers_of_rows",
    ),
    Bug(
        135,
        "the influence of the layer below does not move on to the one above",
        (wrong(RowInfluence._add_from_below, idle),),
        "layers_of_rows",
    ),
    Bug(
        136,
        "a widened influence is put on other rows",
        (swap(RowInfluence.to_dense, "ROWS.index", "ROWS.index.flip(0)"),),
        "rows_that_open",
    ),
    Bug(
        137,
        "a row map is off by one",
        (wrong(RowMap.take, lambda take: lambda self, value, dim: take(self, value.roll(1, dim), dim)),),
        "rows_of_states",
    ),
    Bug(
        138,
        "the rows of another sample get the immediate influence",
        (wrong(RowInfluence.add, lambda add: lambda self, group, left, right: add(self, group, left.flip(0), right)),),
        "rows_of_states",
    ),
    Bug(
        139,
        "a reset inside a block leaks into independent rows",
        (swap(sweep_rows, "VALUE[j].masked_fill_(...)", "pass"),),
        "resets_of_rows",
    ),
    Bug(
        140,
        "a reset leaves the influence on rows behind",
        (wrong(RowInfluence.clear_samples, idle),),
        "resets_of_rows",
    ),
    Bug(
        141,
        "one entry of a row is dropped",
        (swap(row_products, "range(1, WIDTH)", "range(1, 1)"),),
        "rows_of_states",
    ),
    Bug(
        142,
        "a parameter of several rows is taken for one of one row, and no probe looks",
        (
            swap(_reach, "bool((COUNT > 1).any())", "False"),
            wrong(_agrees, lambda agrees: lambda *args: True),
            swap(_add_untapped, "PROBED and not ANY", "False"),
        ),
        "weights_of_several_rows",
    ),
    Bug(
        143,
        "a structure that is widened forgets what was carried",
        (wrong(CarriedRows.dense, lambda dense: lambda self: {}),),
        "rows_that_open",
    ),
    Bug(
        144,
        "the adjoint meets the influence on rows after it has moved",
        (swap(CarriedRows.add, "INFLUENCE.contract(ADJOINT)", "INFLUENCE.contract(ADJOINT, staged=True)"),),
        "rows_of_states",
    ),
    Bug(
        145,
        "the first states' influence on other rows is dropped",
        (swap(find_structure, "PATTERN.add(NAME, SHAPES[NAME], 'element', HITS)", "pass"),),
        "rows_of_states",
    ),
    Bug(
        146,
        "a saved structure is believed whatever it says",
        (swap(Structure.from_state_dict.__func__, "raise ConfigError(...)", "pass"),),
        "saved_structures",
    ),
    Bug(
        147,
        "the gradient at the y of a sequence is put to the step after",
        (
            swap(
                StepBatch.grad,
                "join(RUNS, FILLED, FILLED, PLACE)",
                "join(RUNS, FILLED, lambda *a: FILLED(*a).roll(1, 0), PLACE)",
            ),
        ),
        "learner: sequences",
    ),
    Bug(
        148,
        "a sequence of a GRU's steps is run backward",
        (wrong(sequence, lambda run: lambda mode, xs, h, weights: run(mode, xs, h, weights).flip(0)),),
        "cell: unroll",
    ),
    Bug(
        149,
        "a coupling that begins after steps are processed at once goes unnoticed",
        (wrong(_as_expected, lambda check: lambda *args: True),),
        "single_steps_that_open",
    ),
    Bug(
        150,
        "gradients are delivered up to the first that cannot be",
        (wrong(_check_can_be_added_to, idle),),
        "half_a_delivery",
    ),
    Bug(
        151,
        "a learner goes on from a block that was added in part",
        (wrong(LearningRule._check_intact, idle),),
        "half_a_block",
    ),
    Bug(
        152,
        "memory that runs out counts as an input that the cell does not take",
        (wrong(is_out_of_memory, lambda check: lambda error: False),),
        "memory_that_runs_out",
    ),
    Bug(
        153,
        "a skipped step leaves its state behind",
        (swap(SkippingLearner._skip, "state.clone()", "self._state.clone()"),),
        "skipped_steps",
    ),
]
