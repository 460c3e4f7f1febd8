"""The contract that a cell must keep: a step is a pure function, and run again as part of a batch it does the same.

The functions on a ``StepBatch`` check what came of running its steps once more, with the choices replayed.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtrl._engine import checks
from rtrl._engine.recorded import StepBatch
from rtrl._engine.surroundings import RefuseUnsupported
from rtrl._utils import index_sets, pytrees
from rtrl._utils.functional_call import attributes, attributes_kept
from rtrl._utils.undo import undone
from rtrl.cells.protocol import OTHER_CHOICES, Sparsity, call_cell, same_choices
from rtrl.cells.supported import original
from rtrl.errors import CellError, NonFiniteError, SparsityError


class _NoRandomness(TorchDispatchMode):
    """Refuses every operation that draws random numbers."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, seconds of it, to keep it away from this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        # Attention without dropout carries the tag, too: what counts is whether a generator moves.
        before = _generator_states(kwargs.get("generator"))
        out = func(*args, **kwargs)
        if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(kwargs.get("generator")), strict=True)):
            raise CellError(
                f"the cell draws random numbers in its forward ({func}); a step could not be run again as it was. Draw "
                "them outside and pass them in x, or call cell.eval() if they come from dropout"
            )
        return out


def _generator_states(generator: torch.Generator | None) -> list[Tensor]:
    if generator is not None:
        return [generator.get_state()]
    states = [torch.get_rng_state()]
    return [*states, *torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else states


def check_purity(cell: nn.Module, x: Any, h: Tensor, replay: Sparsity | None) -> None:
    """Run the cell once on copies; refuse it, and restore it, if it draws random numbers, changes its input, state,
    buffers or parameters, or does what ``RefuseUnsupported`` lists."""
    cell = original(cell)
    x, h = pytrees.map_tensors(torch.clone, x), h.clone()
    held = [*cell.parameters(), *cell.buffers()]
    saved = [value.detach().clone() for value in held]
    rng_state = torch.get_rng_state()
    watched = {"x": pytrees.tensors(x), "the state h": [h], "a parameter or buffer of its own": held}
    versions = {what: [t._version for t in tensors] for what, tensors in watched.items()}
    grads = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in cell.parameters()]
    try:
        with (
            attributes_kept(cell, registered=False),
            _dispatch_modes_kept(),
            RefuseUnsupported(),
            _NoRandomness(),  # type: ignore[no-untyped-call]
        ):
            before = attributes(cell)
            call_cell(cell, x, h, replay)
            keeps = any(before.get(name) is not value for name, value in attributes(cell).items())
        if keeps:
            _check_keeps_no_result(cell, x, h, replay)
        for what, tensors in watched.items():
            if [t._version for t in tensors] != versions[what]:
                raise CellError(
                    f"the cell changes {what} in place; a cell must be a pure function of (x, h, parameters)"
                )
        if not all(_same_grad(p, grad, values) for p, grad, values in grads):
            raise CellError(
                "the cell changes the .grad of a parameter of its own; take gradients inside a cell by "
                "torch.autograd.grad(..., create_graph=True)"
            )
        if [id(t) for t in held] != [id(t) for t in (*cell.parameters(), *cell.buffers())]:
            raise CellError(
                "the cell replaces a parameter or buffer of its own; a cell must be a pure function of (x, h, "
                "parameters)"
            )
    except CellError:
        for p, grad, values in grads:
            p.grad = grad
            if grad is not None and values is not None:
                grad.copy_(values)
        for value, kept in zip(held, saved, strict=True):
            if not torch.equal(value, kept):
                value.copy_(kept)
        names = dict(cell.named_buffers())
        for name, buffer in zip(names, held[len(held) - len(names) :], strict=False):
            owner, _, leaf = name.rpartition(".")
            cell.get_submodule(owner)._buffers[leaf] = buffer
        torch.set_rng_state(rng_state)
        raise


def _dispatch_modes_kept() -> AbstractContextManager[None]:
    """A context that leaves no more modes of dispatch entered than there are."""
    count = torch._C._len_torch_dispatch_stack()

    def leave() -> None:
        while torch._C._len_torch_dispatch_stack() > count:
            torch._C._pop_torch_dispatch_stack()

    return undone(leave)


def _check_keeps_no_result(cell: nn.Module, x: Any, h: Tensor, replay: Sparsity | None) -> None:
    """Refuse a cell that computes a tensor from its parameters once, and keeps it for later calls: it has no graph, and
    does not follow the parameters."""
    with attributes_kept(cell), torch.enable_grad():
        before = attributes(cell)
        call_cell(cell, x, h, replay)
        first = attributes(cell)
        call_cell(cell, x, h, replay)
        for name, value in attributes(cell).items():
            if value is first.get(name) and value is not before.get(name) and value.requires_grad:
                raise CellError(
                    f"the cell computes {name!r} from its parameters and keeps it for later calls, without its graph; "
                    "compute it in every call"
                )


def _same_grad(parameter: Tensor, grad: Tensor | None, values: Tensor | None) -> bool:
    """Whether the ``.grad`` of a parameter is the same tensor with the same values."""
    return parameter.grad is grad and (grad is None or values is None or torch.equal(grad, values))


def check_same_choices(batch: StepBatch, sparsity: Sparsity) -> None:
    """Refuse a cell that made other choices than those it was to repeat."""
    if not same_choices(sparsity, batch.sparsity):
        raise CellError(f"{batch.span}: {OTHER_CHOICES}")


def check_same_result(batch: StepBatch, h_next: Tensor, outputs: Sequence[Tensor]) -> None:
    """Refuse a cell that computes another next state or y for the batch than it did step by step."""
    recorded = [batch.reached, *batch.outputs()]
    names = ["state", *["output"] * len(outputs)]
    for name, value, by_step in zip(names, (h_next, *outputs), recorded, strict=True):
        if not checks.nearly_equal(value.detach(), by_step.detach()):
            raise CellError(
                f"{batch.span}: re-running these steps as one batch gave a different {name} than running them one by "
                "one. Either the cell is not a pure function of (x, h, parameters), its samples are not independent, "
                "or its parameters were changed behind autograd's back inside an open block (call sync() first)"
            )


def check_declared_columns(batch: StepBatch, jacobian: Tensor) -> None:
    """Refuse a state Jacobian (N, W, n, slot_size) with an entry in a slot that is neither read nor written."""
    declared = index_sets.union(batch.sparsity.reads, batch.sparsity.writes, jacobian.shape[2])
    if declared is None:
        return
    stray = (jacobian != 0).any(dim=3).any(dim=1) & ~declared
    if bool(stray.any()):
        i, sample = batch.locate(stray.any(dim=1))
        row = int(batch.by_step(stray)[sample, i].nonzero()[0])
        raise SparsityError(
            f"step {batch.steps[i].number}: the written rows of sample {sample} depend on row {row} of the state, "
            "which it declares neither as read nor as written"
        )


def check_declared_adjoint(batch: StepBatch, adjoint: Tensor, touched: Tensor) -> None:
    """Refuse an adjoint (N, n, slot_size) of y with an entry outside the slots ``touched``."""
    if int(adjoint.count_nonzero()) > int(index_sets.gather(adjoint, touched).count_nonzero()):
        raise SparsityError(f"{batch.span}: y depends on rows of the state outside the declared reads and writes")


def check_unwritten_rows(batch: StepBatch, h_next: Tensor, inputs: Sequence[Tensor]) -> None:
    """Refuse a row that is copied in value only: its derivative must be that of a copy, too.

    Args:
        inputs: all that the next state may depend on, the states themselves included."""
    h, writes = batch.h, batch.sparsity.writes
    if writes is None:
        return
    unwritten = ~index_sets.mask(writes, h.shape[1])
    change = torch.where(unwritten.reshape(*h.shape[:2], *[1] * (h.ndim - 2)), h_next - h, 0.0)

    def depends(weights: Tensor) -> bool:
        grads = torch.autograd.grad(change, inputs, weights, retain_graph=True, allow_unused=True)
        return any(grad is not None and bool(grad.count_nonzero()) for grad in grads)

    weights = torch.linspace(1.0, 2.0, change.numel(), dtype=h.dtype, device=h.device).reshape(change.shape)
    if not depends(weights):
        return
    for place, row in unwritten.nonzero().tolist():
        alone = torch.zeros_like(weights)
        alone[place, row] = weights[place, row]
        if depends(alone):
            sample, i = divmod(place, len(batch.steps))
            raise SparsityError(
                f"step {batch.steps[i].number}: row {row} of the state of sample {sample} is not declared as "
                "written, yet it depends on more than its own last value (which did not change)"
            )


def check_finite_samples(batch: StepBatch, named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse NaN and infinity in any of the tensors (N, ...)."""
    for what, values in named:
        if not checks.finite(values):
            i, sample = batch.locate(~torch.isfinite(values).flatten(1).all(dim=1))
            raise NonFiniteError(f"NaN or infinity in {what}, step {batch.steps[i].number}, sample {sample}")
