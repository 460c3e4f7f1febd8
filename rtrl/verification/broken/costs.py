"""Faults of speed and memory: gradients stay exact, but what sparsity, blocks or the tree should save is not saved."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from rtrl._engine import contract, linearizer
from rtrl._engine.recorded import StepBatch
from rtrl._influence.catch_up_plan import CatchUpPlan, CatchUpPlanner, Hop
from rtrl._influence.segment_tree import CircularSegmentTree, Node
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.learners.carried import CarriedInfluence
from rtrl.learners.carried_rows import CarriedRows
from rtrl.learners.closing import BlockCloser
from rtrl.verification.broken.fault import Patch, break_, original

LEAK_FROM = 200
"""The step from which the learner leaks."""


def _made_with(patch: Patch, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Make learners with other options than those asked for."""
    init = original(BlockRTRL, "__init__")

    def make(self: BlockRTRL, *args: Any, **options: Any) -> None:
        init(self, *args, **{**options, **change(options)})

    patch(BlockRTRL, "__init__", make)


@break_("eager")
def eager(patch: Patch) -> None:
    """Nothing is ever dormant: every slice is brought up to date at every block, although ``lazy`` was asked for."""
    _made_with(patch, lambda options: {"lazy": False})


@break_("step-by-step")
def step_by_step(patch: Patch) -> None:
    """Steps are processed one by one, although a longer block was asked for."""
    _made_with(patch, lambda options: {"block": 1})


@break_("double-window")
def double_window(patch: Patch) -> None:
    """The tree holds twice as many blocks as were asked for."""
    _made_with(patch, lambda options: {"window": 2 * options.get("window", 64)})


def _ignore(patch: Patch, **undeclared: Any) -> None:
    """Let the engine see another sparsity than the cell declared."""
    join = original(linearizer, "join_steps")

    def joined(*args: Any) -> StepBatch:
        batch: StepBatch = join(*args)
        return replace(batch, sparsity=batch.sparsity._replace(**undeclared))

    patch(linearizer, "join_steps", joined)
    patch(contract, "check_same_choices", lambda batch, sparsity: None)


@break_("ignore-reads")
def ignore_reads(patch: Patch) -> None:
    """What a cell declares to read is ignored: every row of the state counts as read."""
    _ignore(patch, reads=None)


@break_("ignore-writes")
def ignore_writes(patch: Patch) -> None:
    """What a cell declares to write is ignored: every row of the state counts as written."""
    _ignore(patch, writes=None)


@break_("ignore-experts")
def ignore_experts(patch: Patch) -> None:
    """What a cell declares to use is ignored: every slice of every parameter counts as active."""
    _ignore(patch, active={})


@break_("no-reuse")
def no_reuse(patch: Patch) -> None:
    """The tree composes every product again, and shares none between reactivations."""

    def value(self: CircularSegmentTree[Any], node: Node) -> Any:
        if node.is_leaf:
            return self._values[node.number]
        first, second = node.halves
        return self._hold(node, self.combine(self.value(first), self.value(second)))

    patch(CircularSegmentTree, "value", value)
    patch(CircularSegmentTree, "is_held", lambda self, node: node.is_leaf)


@break_("one-by-one")
def one_by_one(patch: Patch) -> None:
    """Dormant slices are caught up block by block: no product of several blocks is ever composed."""

    def plan(self: CatchUpPlanner[Any], columns: Mapping[int, int], stop: int, *, shared: bool = False) -> CatchUpPlan:
        first, hops, cost = min(columns, default=stop), [], 0
        for start in range(first, stop):
            (node,) = self.tree.nodes(start, start + 1)
            hops.append(Hop(first, start, start + 1, (node,), self.pattern(node)))
            behind = [number for begun, number in columns.items() if begun <= start]
            cost += self.pattern(node).apply_macs * (max(behind) if shared else sum(behind))
        return CatchUpPlan(hops, cost, 0)

    patch(CatchUpPlanner, "plan", plan)


@break_("linearize-twice")
def linearize_twice(patch: Patch) -> None:
    """Every block is linearised twice, and the first result thrown away."""
    close = original(BlockCloser, "close")

    def twice(self: BlockCloser, *args: Any) -> Any:
        close(self, *args)
        return close(self, *args)

    patch(BlockCloser, "close", twice)


def _at_closing(patch: Patch, also: Callable[[BlockRTRL], None]) -> None:
    """Do something besides whenever a block closes."""
    close = original(BlockRTRL, "_close")

    def closing(self: BlockRTRL) -> None:
        open_ = bool(self._open_steps)
        close(self)
        if open_:
            also(self)

    patch(BlockRTRL, "_close", closing)


@break_("slow")
def slow(patch: Patch) -> None:
    """Every block takes 5 milliseconds longer."""
    _at_closing(patch, lambda learner: time.sleep(0.005))


@break_("leak")
def leak(patch: Patch) -> None:
    """From step 200 on the learner leaks a megabyte with every block, which it does not count."""
    leaked: list[Tensor] = []

    def leaks(learner: BlockRTRL) -> None:
        if learner.steps_taken >= LEAK_FROM:
            leaked.append(torch.ones(250_000, device=learner.state.device))

    _at_closing(patch, leaks)


@break_("keep-states")
def keep_states(patch: Patch) -> None:
    """The learner keeps the state of every block, and counts the bytes: they grow with the number of steps."""
    kept: WeakKeyDictionary[BlockRTRL, list[Tensor]] = WeakKeyDictionary()
    held_bytes = original(BlockRTRL, "_held_bytes")

    def grown(self: BlockRTRL) -> dict[str, int]:
        held = held_bytes(self)
        more = sum(state.numel() * state.element_size() for state in kept.get(self, []))
        return {**held, "influence": held["influence"] + more}

    _at_closing(patch, lambda learner: kept.setdefault(learner, []).append(learner.state))
    patch(BlockRTRL, "_held_bytes", grown)


@break_("uncounted-influence")
def uncounted_influence(patch: Patch) -> None:
    """``retained_bytes`` leaves the influence out."""
    for kind in (CarriedInfluence, CarriedRows):
        n_bytes = original(kind, "n_bytes")
        patch(kind, "n_bytes", lambda self, n_bytes=n_bytes: {**n_bytes(self), "influence": 0})
