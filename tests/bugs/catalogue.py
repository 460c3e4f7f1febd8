"""Bugs that implementations of these ideas really had, each put into the code in memory, with the check that must catch it.

Numbers up to 28 were seen in other people's code; those from 29 on were met, or nearly made, while this was written.
"""

from dataclasses import dataclass
from typing import Any

from rtrl._engine import analytic, checks, immediate, linearization, linearizer, losses, output_jacobian, reverse_sweep
from rtrl._engine import block as block_module
from rtrl._engine import step as forward_step
from rtrl._engine.parameter_guard import ParameterGuard
from rtrl._influence import catch_up, history, segment_tree, store, transition
from rtrl._utils import index_sets
from rtrl.cells import moe, stack, torch_derivatives
from rtrl.learners import block_rtrl
from rtrl.learners import state as saved_state

Tree, Learner = segment_tree.CircularSegmentTree, block_rtrl.BlockRTRL
Influence = store.ParameterInfluence


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
                Tree.nodes,
                (
                    "self.capacity, start - first), first, self.capacity, parts)",
                    "self.capacity, start - first + self.capacity), 0, last, parts)",
                ),
                (
                    "self.capacity, start - first + self.capacity), 0, last, parts)\n    return",
                    "self.capacity, start - first), first, self.capacity, parts)\n    return",
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
                Influence.advance,
                (
                    "torch.sum(moved[:, -1], dim=0",
                    "torch.sum((block.adjoint.unsqueeze(1) @ moved[:, :-1])[:, 0], dim=0",
                ),
            ),
        ),
        "learner: dense cell",
    ),
    Bug(
        3,
        "losses that fall while a slice sleeps are dropped",
        ((history.History._sweep, ("earn=earn)", "earn=earn and leg.stop == self.now)")),),
        "learner: sleeping slices",
    ),
    Bug(
        4,
        "a decaying row passes as unwritten",
        (
            (checks.check_copied, ("if bool(changed.any())", "if False")),
            (linearizer.Linearizer._only_written, ("if writes is None:", "if True:")),
        ),
        "under_declared",
    ),
    Bug(
        5,
        "columns that matter are cut",
        (
            (
                linearizer.Linearizer._group,
                (
                    "index_sets.union(sparsity.reads, sparsity.writes, n)",
                    "index_sets.union(sparsity.writes, sparsity.writes, n)",
                ),
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        6,
        "the batch's mean in place of its sum",
        ((Influence.advance, ("torch.sum(moved", "torch.mean(moved")),),
        "learner: own streams",
    ),
    Bug(
        7,
        "a slice older than the window is not caught up",
        ((Learner._close_block, ("if expiring is not None", "if False")),),
        "learner: long sleep",
    ),
    Bug(
        8,
        "the current block is applied twice at wake-up",
        (
            (
                Learner._advance,
                ("influence.clock[own] = self._history.now", "influence.clock[own] = self._history.now - 1"),
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        9,
        "rows are overwritten while they are still being read",
        ((index_sets.zero, ("values.scatter(", "values.scatter_(")),),
        "learner: sparse rows",
    ),
    Bug(
        10,
        "the immediate Jacobian is added before catching up",
        (
            (
                Learner._close_block,
                ("influence.advance(result.transition, self._gradient(name))", "pass"),
                (
                    "    result.add_immediate(self._influences, rows)\n",
                    "    result.add_immediate(self._influences, rows)\n    for name, influence in self._influences.items():\n        if not influence.sliced:\n            influence.advance(result.transition, self._gradient(name))\n",
                ),
            ),
        ),
        "learner: dense cell",
    ),
    Bug(
        11,
        "a reset leaves influence and clocks behind",
        ((Influence.drop, ("& (self._row >= 0)", "& (self._row < -1)")),),
        "learner: resets",
    ),
    Bug(
        12,
        "the Jacobian is transposed",
        (
            (reverse_sweep._scan, ("jacobians = group.jacobian(0, m)", "jacobians = group.jacobian(0, m).mT")),
            (
                reverse_sweep._one_by_one,
                ("_by_step(group.jacobian(start, stop))", "_by_step(group.jacobian(start, stop).mT)"),
            ),
        ),
        "learner: layers",
    ),
    Bug(
        13,
        "identity rows are lost in composition",
        ((transition.compose, ("old.masked_fill(read[:, :, None, None], 0.0)", "torch.zeros_like(old)")),),
        "learner: sleeping slices",
    ),
    Bug(
        14,
        "a remembered node outlives the leaf under it",
        ((Tree._value, (" or self._stamps[node.place] != node.start", "")),),
        "tree_in_order",
    ),
    Bug(
        15,
        "one sample's index sets serve all",
        (
            (
                catch_up._of,
                ("index_sets.select_samples(t, samples)", "index_sets.select_samples(t, samples * 0)"),
            ),
        ),
        "learner: sparse rows",
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
        "cell: active slices are declared",
    ),
    Bug(
        17,
        "the loss's direct path to the parameters is dropped",
        ((block_module._earn, ("if weight is None else weight + tap.earned", "if weight is None else weight")),),
        "learner: dense cell",
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
        "learner: memory does not grow",
    ),
    Bug(
        19,
        "the carry between blocks is dropped: truncated BPTT",
        ((Influence.advance, ("columns.copy_(moved[:, :-1]", "columns.copy_(0 * moved[:, :-1]")),),
        "learner: dense cell",
    ),
    Bug(
        20,
        "a reset touches the other samples",
        ((Learner.reset, ("influence.drop(samples)", "influence.drop(samples | True)")),),
        "learner: resets",
    ),
    Bug(
        21,
        "layers are cut apart",
        ((stack.Stack.forward, ("call_cell(layer, y, ", "call_cell(layer, y.detach(), ")),),
        "layers_by_hand",
    ),
    Bug(
        22,
        "NaN is turned to zero in silence",
        (
            (
                checks.check_finite,
                (
                    "if not _tree.finite(value):",
                    "if not _tree.finite(value):\n        value.nan_to_num_(0.0, 0.0, 0.0)\n    if False:",
                ),
            ),
        ),
        "learner: error inputs",
    ),
    Bug(
        23,
        "parameters changed inside an open block pass",
        ((ParameterGuard.check, ("if changed:", "if False:")),),
        "parameters_changed_in_an_open_block",
    ),
    Bug(
        24,
        "a near tie is decided again",
        ((linearizer.Linearizer._group, ("replay = sparsity if self._replays else None", "replay = None")),),
        "learner: near ties",
    ),
    Bug(
        25,
        "an empty range returns the whole window",
        (
            (
                Tree.nodes,
                (
                    "if start == stop:\n        return parts",
                    "if start == stop:\n        start, stop = self.oldest, self._stop\n    if start == stop:\n        return parts",
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
                catch_up._Legs.apply,
                ("if clock <= leg.start)", "if clock <= leg.start + 1)"),
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        27,
        "the written rows' own columns are dropped",
        (
            (
                linearizer.Linearizer._group,
                (
                    "index_sets.union(sparsity.reads, sparsity.writes, n)",
                    "index_sets.union(sparsity.reads, sparsity.reads, n)",
                ),
            ),
        ),
        "learner: sparse rows",
    ),
    Bug(
        28,
        "a kernel assumes float32",
        (
            (
                Influence.add_products,
                ("born = torch.bmm(left.mT, right)", "born = torch.bmm(left.mT.float(), right.float()).to(left.dtype)"),
            ),
        ),
        "learner: sleeping slices",
    ),
    Bug(
        29,
        "sleeping slices are paid twice",
        ((Learner._pay, ("times.tolist(), self._paid)", "times.tolist(), 0)")),),
        "learner: early deliveries",
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
        "learner: early deliveries",
    ),
    Bug(
        31,
        "parameters outside linear maps are forgotten",
        ((block_module.close_block, ("dense[name] = dense[name] + value if name in dense else value", "pass")),),
        "learner: unusual parameters",
    ),
    Bug(
        32,
        "of two uses of a parameter the last one wins",
        (
            (
                immediate.births,
                ("shared.setdefault(id(tap.response), [])", "shared.setdefault(tap.tap.name, [])"),
                ("append(tap)\n    for taps", "__setitem__(slice(None), [tap])\n    for taps"),
            ),
        ),
        "learner: shared parameters",
    ),
    Bug(
        33,
        "the adjoint does not travel inside a block",
        ((reverse_sweep._onward, ("torch.add(product[:, -1], adjoint, out=out[:, -1])", "out[:, -1] = adjoint")),),
        "learner: one loss at the end",
    ),
    Bug(
        34,
        "gradients of an open block are not saved",
        (
            (
                saved_state._step_state,
                (
                    "[None if leaf.grad is None else leaf.grad.clone() for leaf in step.outputs]",
                    "[None for leaf in step.outputs]",
                ),
            ),
        ),
        "learner: saved and loaded",
    ),
    Bug(
        35,
        "a first state of zeros hides that samples mix",
        ((linearizer.Linearizer._group, ("if (*key, m) not in self._verified:", "if False:")),),
        "samples_apart",
    ),
    Bug(
        36,
        "reads that are not declared pass",
        ((linearizer.Linearizer._only_declared, ("if bool(stray.any()):", "if False:")),),
        "under_declared",
    ),
    Bug(
        37,
        "slices that a step does not name count as asleep",
        (
            (
                immediate.active,
                ("torch.arange(slices, device=device)", "torch.arange(slices if slices == 1 else 0, device=device)"),
            ),
        ),
        "learner: everything declared now and then",
    ),
    Bug(
        38,
        "y goes through half precision",
        (
            (
                forward_step.take,
                (
                    "y = _tree.map_tensors(torch.clone, y)",
                    "y = _tree.map_tensors(lambda value: value.to(torch.bfloat16).to(value.dtype), y)",
                ),
            ),
        ),
        "learner: interface",
    ),
    Bug(
        39,
        "small products are set to zero too early",
        ((transition.flush_subnormals, ("kind.tiny / kind.eps", "0.05")),),
        "learner: long stream",
    ),
    Bug(
        40,
        "a step without a loss is given that of another",
        (
            (
                linearizer.Linearizer._earn,
                (
                    "torch.zeros_like(step.outputs[place]) if g is None else g",
                    "next(v for v in given if v is not None) if g is None else g",
                ),
            ),
        ),
        "learner: losses now and then",
    ),
    Bug(
        41,
        "the second loss of a step replaces the first",
        ((losses.give, (" if leaf.grad is None else (leaf.grad + gradient).detach()", "")),),
        "learner: several losses a step",
    ),
    Bug(
        42,
        "the buffer of the gradient is not cleared",
        (
            (
                Learner._gradient,
                ("torch.zeros_like(self._parameters[name])", "torch.full_like(self._parameters[name], 1e-3)"),
            ),
        ),
        "learner: no loss at all",
    ),
    Bug(
        43,
        "an early sync leaves its open block to the new parameters",
        (
            (
                Learner.sync,
                ("    self._close()\n", "    self._close() if self.at_block_end or self._guard is None else None\n"),
            ),
            (ParameterGuard.check, ("if changed:", "if False:")),
        ),
        "learner: changed parameters",
    ),
    Bug(
        44,
        "an influence is handed out without catching up",
        ((Learner.influence, ("    self._advance({name: influence.held()})\n", "")),),
        "learner: influence",
    ),
    Bug(
        45,
        "gradients are float64 whatever the parameters",
        (
            (
                Learner._gradient,
                (
                    "torch.zeros_like(self._parameters[name])",
                    "torch.zeros_like(self._parameters[name], dtype=torch.float64)",
                ),
            ),
        ),
        "learner: float32",
    ),
    Bug(
        46,
        "the cell is left in evaluation mode",
        ((forward_step._run, ("    h = h.clone()\n", "    h = h.clone()\n    cell.eval()\n")),),
        "learner: the cell is left alone",
    ),
    Bug(
        47,
        "a choice lies beyond the last slot",
        (
            (
                moe.RecurrentMoE.forward,
                ("self.choices(reads, writes, experts)", "self.choices(reads, writes + 4, experts)"),
            ),
        ),
        "cell: returns",
    ),
    Bug(
        48,
        "the state grows a row a step",
        ((moe.RecurrentMoE.forward, ("return y, h_next,", "return y, torch.cat([h_next, h_next[:, :1]], dim=1),")),),
        "cell: state keeps its form",
    ),
    Bug(
        49,
        "y is one number for the batch",
        ((moe.RecurrentMoE.forward, ("return y, h_next,", "return y.sum(), h_next,")),),
        "cell: y per sample",
    ),
    Bug(
        50,
        "a square root has no derivative at zero",
        (
            (
                moe.RecurrentMoE.forward,
                ("return y, h_next,", "return y + (0 * y).square().sum(dim=1, keepdim=True).sqrt(), h_next,"),
            ),
        ),
        "cell: finite",
    ),
    Bug(
        51,
        "the router explores by chance",
        (
            (
                moe.RecurrentMoE.forward,
                (
                    "logits = self.router(_rms(z.mean(dim=1)))",
                    "logits = self.router(_rms(z.mean(dim=1)))\n    logits = logits + 0.1 * torch.rand_like(logits)",
                ),
            ),
        ),
        "cell: pure",
    ),
    Bug(
        52,
        "what is computed depends on what was computed before",
        (
            (
                moe.RecurrentMoE.forward,
                (
                    "return y, h_next,",
                    "self.__dict__['_calls'] = self.__dict__.get('_calls', 0) + 1\n    return y + 1e-3 * self._calls, h_next,",
                ),
            ),
        ),
        "cell: deterministic",
    ),
    Bug(
        53,
        "slots that are not written decay",
        ((moe.RecurrentMoE.forward, ("h_next = h.scatter(", "h_next = (0.99 * h).scatter(")),),
        "cell: unwritten rows are copied",
    ),
    Bug(
        54,
        "slots that are not written are copied without their derivative",
        ((moe.RecurrentMoE.forward, ("h_next = h.scatter(", "h_next = h.detach().scatter(")),),
        "cell: unwritten rows are copied in derivative",
    ),
    Bug(
        55,
        "the read's softmax runs over all slots",
        (
            (
                moe.RecurrentMoE.forward,
                (
                    "z = reads.shape[1] * scores.softmax(dim=-1).unsqueeze(-1) * labelled",
                    "every = torch.einsum('bd,bnd->bn', query, h + self.slot_embedding) / math.sqrt(self.d_model)\n    z = reads.shape[1] * every.softmax(dim=-1).gather(1, reads).unsqueeze(-1) * labelled",
                ),
            ),
        ),
        "cell: reads are declared",
    ),
    Bug(
        56,
        "scores are normalised over the batch",
        (
            (
                moe.RecurrentMoE.forward,
                (
                    "logits = self.router(_rms(z.mean(dim=1)))",
                    "logits = self.router(_rms(z.mean(dim=1)))\n    logits = logits - logits.mean(dim=0)",
                ),
            ),
        ),
        "cell: samples do not meet",
    ),
    Bug(
        57,
        "a replay of experts is not obeyed",
        (
            (
                moe.RecurrentMoE.forward,
                (
                    "    if replay is None:\n        experts = top(logits, self.topk)\n",
                    "    experts = top(logits, self.topk)\n",
                ),
            ),
        ),
        "cell: replay",
    ),
    Bug(
        58,
        "a constant is made in float32",
        ((moe.RecurrentMoE.forward, ("return y, h_next,", "return y + torch.zeros(1, dtype=torch.float64), h_next,")),),
        "cell: dtype and device are carried through",
    ),
    Bug(
        59,
        "a weight is used that was put aside at first sight",
        (
            (
                moe.RecurrentMoE.forward,
                (
                    "return y, h_next,",
                    "kept = self.__dict__.setdefault('_kept', self.head.bias.detach().clone())\n    return y + kept - kept.detach() + 0 * self.head.bias + self.__dict__.setdefault('_aside', self.head.bias), h_next,",
                ),
            ),
        ),
        "cell: torch.func",
    ),
    Bug(
        60,
        "the write gate forgets its score",
        (
            (
                moe.RecurrentMoE.forward,
                ("torch.sigmoid(self.gate(source) + _rows(write_scores, place))", "torch.sigmoid(self.gate(source))"),
            ),
        ),
        "cell_equals_loops",
    ),
    Bug(
        61,
        "a loss that was not handed to the learner is dropped",
        (
            (
                Learner._close_block,
                (
                    "    span = f",
                    "    if not self._given:\n        for step in self._steps:\n            for leaf in step.outputs:\n                leaf.grad = None\n    span = f",
                ),
            ),
        ),
        "learner: plain backward",
    ),
    Bug(
        62,
        "frozen parameters are given a gradient",
        (
            (
                Learner.sync,
                (
                    "    self._earned = {}\n",
                    "    self._earned = {}\n    for p in self.cell.parameters():\n        p.grad = torch.zeros_like(p) if p.grad is None else p.grad\n",
                ),
            ),
        ),
        "learner: partly trained",
    ),
    Bug(
        63,
        "samples without a loss take that of the others",
        (
            (
                losses.give,
                (
                    "        if gradient is not None:\n",
                    "        if gradient is not None:\n            none = (gradient == 0).flatten(1).all(dim=1).reshape(-1, *[1] * (gradient.ndim - 1))\n            gradient = torch.where(none, gradient.sum(dim=0, keepdim=True), gradient)\n",
                ),
            ),
        ),
        "learner: losses of one sample at a time",
    ),
    Bug(
        64,
        "adjoints are clipped",
        (
            (
                losses.give,
                ("gradient.detach().clone()", "gradient.detach().clamp(-1000, 1000)"),
            ),
        ),
        "learner: losses of all sizes",
    ),
    Bug(
        65,
        "x is kept, not copied",
        ((forward_step._own_input, ("_tree.map_tensors(torch.clone, x)", "_tree.map_tensors(torch.detach, x)")),),
        "learner: odd inputs",
    ),
    Bug(
        66,
        "a reset leaves the open block open",
        ((Learner.reset, ("    self._close()\n", "")),),
        "learner: resets of many",
    ),
    Bug(
        67,
        "bookkeeping of the CPU is made on the default device",
        ((store.ParameterInfluence.claim, ('torch.arange(grow, device="cpu")', "torch.arange(grow)")),),
        "whatever_the_default_device",
    ),
    Bug(
        68,
        "outputs after one without a loss are forgotten",
        ((linearizer.Linearizer._earn, ("            continue\n", "            break\n")),),
        "losses_of_the_second_output",
    ),
    Bug(
        69,
        "pieces of a scan do not see what comes after them",
        (
            (
                reverse_sweep._scan,
                ("behind[:, 1:].unsqueeze(2)", "behind[:, -1:].expand(-1, pieces, -1, -1).unsqueeze(2)"),
            ),
        ),
        "analytic_steps",
    ),
    Bug(
        70,
        "a scan over steps that do not fill its pieces begins with zeros",
        ((reverse_sweep._scan, ("torch.eye(full, dtype", "torch.zeros(full, full, dtype")),),
        "analytic_steps",
    ),
    Bug(
        71,
        "adjoints of tiny losses are set to zero with the products",
        (
            (
                reverse_sweep._onward,
                (
                    "flush_subnormals(product[:, :-1], out=out[:, :-1])",
                    "flush_subnormals(product, out=product)\n    out[:, :-1] = product[:, :-1]",
                ),
            ),
        ),
        "tiny_losses",
    ),
    Bug(
        72,
        "an analytic step forgets what a gate does",
        (
            (torch_derivatives.derivatives, ("by_new * new_h * reset * (1 - reset)", "0 * by_new")),
            (analytic.check_analytic_step, ("if form is None:", "if True:")),
        ),
        "analytic_steps",
    ),
    Bug(
        73,
        "an analytic step that is wrong is believed",
        ((analytic.check_analytic_step, ("if form is None:", "if True:")),),
        "wrong_analytic_steps_are_refused",
    ),
    Bug(
        74,
        "only the first part of the state responds",
        ((output_jacobian.UnitwiseOutputJacobian.left, ("range(1, s)", "range(1, 1)")),),
        "analytic_steps",
    ),
    Bug(
        75,
        "pieces of a long block are joined step by step, not sample by sample",
        (
            (
                linearization._over_samples,
                (
                    "split = [part.unflatten(dim, (size, -1)) for part in known]",
                    "split = [part.unflatten(dim, (-1, size)).transpose(dim, dim + 1) for part in known]",
                ),
            ),
        ),
        "long_blocks",
    ),
    Bug(
        76,
        "of many entries of a slice only the first batch counts",
        ((immediate._batches, ("for start in range(0, longest, limit):", "for start in range(0, 1):")),),
        "long_blocks",
    ),
    Bug(
        77,
        "pieces of a block are joined without their analytic steps",
        (
            (linearization.joined, (" or not _form(pieces[0])[1]", "")),
            (linearizer.Linearizer.__call__, ("closed = self._knows and", "closed = False and")),
        ),
        "long_blocks",
    ),
    Bug(
        78,
        "what is born some rows of the state at a time goes to the first rows every time",
        (
            (
                immediate.DenseImmediate._add_by_rows,
                ("tap.tap.transposed, slice(start, stop))", "tap.tap.transposed, slice(stop - start))"),
            ),
        ),
        "long_blocks",
    ),
    Bug(
        79,
        "memory that is used again is taken to be empty",
        ((reverse_sweep._start, ("reach[:, -1] = 0.0", "pass")),),
        "long_blocks",
    ),
    Bug(
        80,
        "the slope of a gate is taken for the gate",
        (
            (
                torch_derivatives.derivatives,
                ("by_update = (h - new) * update * (1 - update)", "by_update = (h - new) * update"),
            ),
        ),
        "cell: analytic step",
    ),
    Bug(
        81,
        "the adjoint does not travel through a large dense block",
        ((reverse_sweep._one_by_one, ("x[..., -1, :].add_(rows[j])", "x[..., -1, :].copy_(rows[j])")),),
        "long_blocks",
    ),
    Bug(
        82,
        "what a step earns through its next state joins the adjoint a step late",
        ((reverse_sweep._joined, ("joined[:, 1:] += after", "joined[:, :-1] += after")),),
        "long_blocks",
    ),
    Bug(
        83,
        "adjoints of tiny losses are set to zero in large dense blocks",
        ((reverse_sweep._one_by_one, ("products = x[..., :-1, :]", "products = x")),),
        "tiny_losses",
    ),
]
