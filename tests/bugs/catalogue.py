"""Bugs that implementations of these ideas really had, each put into the code in memory, with the check that must catch it.

Numbers up to 28 were seen in other people's code; those from 29 on were met, or nearly made, while this was written.
"""

from dataclasses import dataclass
from typing import Any

from rtrl import _guard, _rows, block, checkpoint, influence, learner, linearize, segment_tree, taps, transition
from rtrl.cells import moe, stack
from rtrl.watch import ParameterWatch

Tree, Learner = segment_tree.CircularSegmentTree, learner.BlockRTRL
Influence, Element = influence.ParameterInfluence, transition.Transition


@dataclass(frozen=True)
class Bug:
    """A bug: its number and name, its edits (a function, and pairs of old and new text in it), the check that must catch it."""

    number: int
    name: str
    edits: tuple[tuple[Any, ...], ...]
    check: str


BUGS = [
    Bug(
        1,
        "a wrapped range is composed newest first",
        (
            (
                Tree.cover,
                (
                    "0, 0, self.capacity, first, self.capacity, start - first,",
                    "0, 0, self.capacity, 0, last, start - first + self.capacity,",
                ),
                (
                    "self._collect(0, 0, self.capacity, 0, last, start - first + self.capacity, cost, parts)\n    return",
                    "self._collect(0, 0, self.capacity, first, self.capacity, start - first, cost, parts)\n    return",
                ),
            ),
        ),
        "tree_in_order",
    ),
    Bug(
        2,
        "the influence advances before the adjoint meets it",
        (
            (
                Learner._advance,
                ("    self._pay(name, rows)\n", ""),
                ("    influence.clock[rows]", "    self._pay(name, rows)\n    influence.clock[rows]"),
            ),
        ),
        "dense_cells",
    ),
    Bug(
        3,
        "losses that fall while a slice sleeps are dropped",
        ((transition.compose, ("one.pull(two.pull(None))", "one.pull(None)")),),
        "sleeping_slices",
    ),
    Bug(
        4,
        "a decaying row passes as unwritten",
        (
            (_guard.check_copied, ("if bool(changed.any())", "if False")),
            (linearize.Linearizer._only_written, ("if writes is None:", "if True:")),
        ),
        "under_declared",
    ),
    Bug(
        5,
        "columns that matter are cut",
        (
            (
                linearize.Linearizer._group,
                ("_rows.union(sparsity.reads, sparsity.writes, n)", "_rows.union(sparsity.writes, sparsity.writes, n)"),
            ),
        ),
        "sparse_rows",
    ),
    Bug(
        6,
        "the batch's mean in place of its sum",
        ((Influence.earn, ("choose @ owed", "choose @ owed / self.batch_size")),),
        "dense_cells",
    ),
    Bug(
        7,
        "a slice older than the window is not caught up",
        ((Learner._close_block, ("if expiring is not None", "if False")),),
        "sleeping_slices",
    ),
    Bug(
        8,
        "the current block is applied twice at wake-up",
        (
            (
                Learner._advance,
                ("influence.clock[rows] = self._history.now", "influence.clock[rows] = self._history.now - 1"),
            ),
        ),
        "sparse_rows",
    ),
    Bug(
        9,
        "rows are overwritten while they are still being read",
        ((_rows.put, ("values.scatter(", "values.scatter_(")),),
        "sparse_rows",
    ),
    Bug(
        10,
        "the immediate Jacobian is added before catching up",
        (
            (
                Learner._close_block,
                ("        influence.add(rows, result.transition, birth.values)\n", ""),
                (
                    "        self._advance(name, rows if",
                    "        influence.add(rows, result.transition, birth.values)\n        self._advance(name, rows if",
                ),
            ),
        ),
        "dense_cells",
    ),
    Bug(
        11,
        "a reset leaves influence and clocks behind",
        ((Influence.drop, ("& (self._row >= 0)", "& (self._row < -1)")),),
        "resets",
    ),
    Bug(
        12,
        "the Jacobian is transposed",
        (
            (
                block._sweep,
                (
                    "jacobian = group.jacobian[j]",
                    "jacobian = group.jacobian[j] if group.writes is not None else group.jacobian[j].mT",
                ),
            ),
        ),
        "dense_cells",
    ),
    Bug(
        13,
        "identity rows are lost in composition",
        ((Element.square, ("torch.eye(full, ", "torch.zeros(full, full, ")),),
        "sleeping_slices",
    ),
    Bug(
        14,
        "a remembered node outlives the leaf under it",
        ((Tree._value, (" or self._stamps[node] != low + shift", "")),),
        "tree_in_order",
    ),
    Bug(
        15,
        "one sample's index sets serve all",
        (
            (
                Element.apply,
                ("_rows.pick(self.rows, sample)", "_rows.pick(self.rows, None if sample is None else sample * 0)"),
            ),
        ),
        "sparse_rows",
    ),
    Bug(
        16,
        "gradient leaks to experts that were not chosen",
        (
            (
                moe.RecurrentMoE.forward,
                ("logits.gather(1, experts).softmax(dim=-1)", "logits.softmax(dim=-1).gather(1, experts)"),
            ),
        ),
        "cell_equals_loops",
    ),
    Bug(
        17,
        "the loss's direct path to the parameters is dropped",
        ((block._earned, ("weight = weight + tap.earned", "pass")),),
        "dense_cells",
    ),
    Bug(
        18,
        "what a step returned is kept alive",
        (
            (
                Learner.step,
                (
                    "    self._taken += 1\n",
                    "    self._taken += 1\n    self.__dict__.setdefault('_kept', []).append(y)\n",
                ),
            ),
        ),
        "bytes_held",
    ),
    Bug(
        19,
        "the carry between blocks is dropped: truncated BPTT",
        ((Influence.move, ("block.apply(moved, sample)", "moved * 0")),),
        "dense_cells",
    ),
    Bug(
        20,
        "a reset touches the other samples",
        ((Learner.reset, ("influence.drop(samples)", "influence.drop(samples | True)")),),
        "resets",
    ),
    Bug(
        21,
        "layers are cut apart",
        ((stack.Stack.forward, ("call_cell(layer, y, ", "call_cell(layer, y.detach(), ")),),
        "layers",
    ),
    Bug(
        22,
        "NaN is turned to zero in silence",
        (
            (
                _guard.check_finite,
                (
                    "if not _tree.finite(value):",
                    "if not _tree.finite(value):\n        value.nan_to_num_(0.0, 0.0, 0.0)\n    if False:",
                ),
            ),
        ),
        "not_finite",
    ),
    Bug(
        23,
        "parameters changed inside an open block pass",
        ((ParameterWatch.check, ("if changed:", "if False:")),),
        "parameters_changed_in_an_open_block",
    ),
    Bug(
        24,
        "a near tie is decided again",
        ((linearize.Linearizer._group, ("replay = sparsity if self._replays else None", "replay = None")),),
        "choices_are_replayed",
    ),
    Bug(
        25,
        "an empty range returns the whole window",
        (
            (
                Tree.cover,
                (
                    "if start == stop:\n        return []",
                    "if start == stop:\n        start, stop = self.oldest, self._stop\n    if start == stop:\n        return []",
                ),
            ),
        ),
        "tree_in_order",
    ),
    Bug(
        26,
        "old Jacobians are applied again",
        (
            (
                Learner._advance,
                ("self._history.cover(clock, ", "self._history.cover(max(clock - 1, self._history.oldest), "),
            ),
        ),
        "sparse_rows",
    ),
    Bug(
        27,
        "the written rows' own columns are dropped",
        (
            (
                linearize.Linearizer._group,
                ("_rows.union(sparsity.reads, sparsity.writes, n)", "_rows.union(sparsity.reads, sparsity.reads, n)"),
            ),
        ),
        "sparse_rows",
    ),
    Bug(
        28,
        "a kernel assumes float32",
        (
            (
                taps.segment_products,
                ("return torch.bmm(rows, cols)", "return torch.bmm(rows.float(), cols.float()).to(rows.dtype)"),
            ),
        ),
        "sleeping_slices",
    ),
    Bug(
        29,
        "sleeping slices are paid twice",
        ((Learner._pay, ("paid = max(clock, self._paid)", "paid = clock")),),
        "early_delivery",
    ),
    Bug(
        30,
        "an early sync gives the open block up",
        (
            (
                Learner.sync,
                ("    self._close()\n", "    self._close() if self.at_block_end else self._give_up_block()\n"),
            ),
        ),
        "early_delivery",
    ),
    Bug(
        31,
        "parameters outside linear maps are forgotten",
        ((block._bear_general, ("birth.values.add_(mine)", "pass")),),
        "dense_cells",
    ),
    Bug(
        32,
        "of two uses of a parameter the last one wins",
        ((block._bear, ("birth.values.add_(born", "birth.values.copy_(born")),),
        "dense_cells",
    ),
    Bug(
        33,
        "the adjoint does not travel inside a block",
        ((block._sweep, ("torch.bmm(weight.unsqueeze(1), jacobian).squeeze(1) + group", "group")),),
        "dense_cells",
    ),
    Bug(
        34,
        "gradients of an open block are not saved",
        (
            (
                checkpoint._step_state,
                (
                    "[None if leaf.grad is None else leaf.grad.clone() for leaf in step.outputs]",
                    "[None for leaf in step.outputs]",
                ),
            ),
        ),
        "saved_and_loaded",
    ),
    Bug(
        35,
        "a first state of zeros hides that samples mix",
        ((linearize.Linearizer._group, ("if (*key, m) not in self._verified:", "if False:")),),
        "samples_apart",
    ),
    Bug(
        36,
        "reads that are not declared pass",
        ((linearize.Linearizer._only_declared, ("if bool(stray.any()):", "if False:")),),
        "under_declared",
    ),
    Bug(
        37,
        "slices that a step does not name count as asleep",
        (
            (
                block._active,
                ("torch.arange(slices, device=device)", "torch.arange(slices if slices == 1 else 0, device=device)"),
            ),
        ),
        "everything_declared_now_and_then",
    ),
    Bug(
        38,
        "bookkeeping of the CPU is made on the default device",
        ((influence.ParameterInfluence.claim, ('torch.arange(grow, device="cpu")', "torch.arange(grow)")),),
        "whatever_the_default_device",
    ),
    Bug(
        39,
        "outputs after one without a loss are forgotten",
        ((linearize.Linearizer._earn, ("            continue\n", "            break\n")),),
        "losses_of_the_second_output",
    ),
]
