"""Checks that the learner makes of a cell, a step and a loss, each before any state changes."""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtrl._utils import index_sets, pytrees
from rtrl.cells.protocol import Sparsity, call_cell
from rtrl.errors import CellError, LossError, NonFiniteError, ShapeError, SparsityError


class _NoRandomness(TorchDispatchMode):
    """Refuses every operation that draws random numbers."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, seconds of it, to keep it away from this mode

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        # Attention without dropout carries the tag too: what counts is whether a generator moves.
        before = _generator_states(kwargs.get("generator"))
        out = func(*args, **kwargs)
        if any(not torch.equal(a, b) for a, b in zip(before, _generator_states(kwargs.get("generator")), strict=True)):
            raise CellError(
                f"the cell draws random numbers in its forward ({func}); a step could not be run again as it was. Draw "
                "them outside and pass them in x, or call cell.eval() if they come from dropout"
            )
        return out


def _generator_states(own: torch.Generator | None) -> list[Tensor]:
    if own is not None:
        return [own.get_state()]
    states = [torch.get_rng_state()]
    return [*states, *torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else states


def check_purity(cell: nn.Module, x: Any, h: Tensor, replay: Sparsity | None) -> None:
    """Run the cell once on copies; refuse it if it draws random numbers or changes its input, state, buffers or
    parameters.

    Raises:
        CellError: naming what it did. Buffers and parameters are as they were before.
    """
    x, h = pytrees.map_tensors(torch.clone, x), h.clone()
    own = [*cell.parameters(), *cell.buffers()]
    saved = [value.detach().clone() for value in own]
    rng = _generator_states(None)
    watched = {"x": pytrees.tensors(x), "the state h": [h], "a parameter or buffer of its own": own}
    before = {what: [t._version for t in tensors] for what, tensors in watched.items()}
    try:
        with _NoRandomness():  # type: ignore[no-untyped-call]
            call_cell(cell, x, h, replay)
        for what, tensors in watched.items():
            if [t._version for t in tensors] != before[what]:
                raise CellError(
                    f"the cell changes {what} in place; a cell must be a pure function of (x, h, parameters)"
                )
        if [id(t) for t in own] != [id(t) for t in (*cell.parameters(), *cell.buffers())]:
            raise CellError(
                "the cell replaces a parameter or buffer of its own; a cell must be a pure function of (x, h, "
                "parameters)"
            )
    except CellError:
        for value, kept in zip(own, saved, strict=True):
            if not torch.equal(value, kept):
                value.copy_(kept)
        places = dict(cell.named_buffers())
        for name, buffer in zip(places, own[len(own) - len(places) :], strict=False):
            owner, _, leaf = name.rpartition(".")
            cell.get_submodule(owner)._buffers[leaf] = buffer
        torch.set_rng_state(rng[0])
        raise


def nearly_equal(one: Tensor, two: Tensor) -> bool:
    """Whether two runs of the same computation agree as far as rounding in another order lets them; NaN equals NaN.

    The slack is ``√eps · (1 + |entry|)``, plus ``1000·eps`` of the sample's largest entry for what cancels.
    """
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not two.numel() or not two.is_floating_point():
        return torch.equal(one, two)
    eps = torch.finfo(two.dtype).eps
    largest = two.abs().reshape(two.shape[0], -1).amax(dim=1).reshape(-1, *[1] * (two.ndim - 1))
    slack = eps**0.5 * (1 + two.abs()) + 1000 * eps * largest
    return bool((((one - two).abs() <= slack) | (one.isnan() & two.isnan()) | (one == two)).all())


def check_finite(what: str, value: Tensor, step: int) -> None:
    """Refuse NaN and infinity, naming the step, the place and the first sample.

    Raises:
        NonFiniteError: with the step's number.
    """
    if not pytrees.finite(value):
        where = tuple((~torch.isfinite(value)).nonzero()[0].tolist())
        raise NonFiniteError(f"NaN or infinity in {what} at step {step}, first at index {where}")


def checked_state(state: Any, batch_size: int, beside: Tensor, like: Tensor | None = None) -> Tensor:
    """A copy of a first state (batch_size, n, ...) on the device of ``beside`` and of the form of ``like``.

    Raises:
        ShapeError: naming what was wrong and what was expected. NonFiniteError.
    """
    tensor = isinstance(state, Tensor)
    if not tensor or state.ndim < 2 or state.shape[0] != batch_size or not state.is_floating_point():
        kind = f"{state.dtype} {tuple(state.shape)}" if tensor else type(state).__name__
        raise ShapeError(f"a state must be a floating-point tensor ({batch_size}, n, ...), got {kind}")
    if like is not None and (state.shape != like.shape or state.dtype != like.dtype or state.device != like.device):
        raise ShapeError(
            f"the state must stay {tuple(like.shape)} {like.dtype} {like.device}, got {tuple(state.shape)} "
            f"{state.dtype} {state.device}"
        )
    if state.device != beside.device:
        raise ShapeError(f"the state is on {state.device}, the parameters on {beside.device}; move one of them")
    if state[0].numel() == 0:
        raise ShapeError(f"a state must have at least one entry a sample, got shape {tuple(state.shape)}")
    if not pytrees.finite(state):
        raise NonFiniteError("NaN or infinity in the first state")
    own: Tensor = state.detach().clone()
    return own


def check_output(y: Any, h: Tensor, h_next: Tensor, step: int) -> None:
    """Refuse a step whose state changed its form, or whose y is not per sample.

    Raises:
        CellError, NonFiniteError.
    """
    if h_next.shape != h.shape or h_next.dtype != h.dtype or h_next.device != h.device:
        raise CellError(
            f"step {step}: the cell turned a state {tuple(h.shape)} {h.dtype} {h.device} into "
            f"{tuple(h_next.shape)} {h_next.dtype} {h_next.device}; a state must keep its shape, dtype and device"
        )
    leaves = pytrees.tensors(y)
    finite = not h.is_cpu and pytrees.all_finite([*leaves, h_next])  # one look at the device; a CPU is asked as we go
    for leaf in leaves:
        if leaf.ndim == 0 or leaf.shape[0] != h.shape[0]:
            raise CellError(
                f"step {step}: each tensor of y must have the batch of {h.shape[0]} as dimension 0, got shape "
                f"{tuple(leaf.shape)}; return per-sample values and reduce them in the loss"
            )
        if not (finite or pytrees.finite(leaf)):
            check_finite("y", leaf, step)
    if not (finite or (leaves and leaves[0] is h_next) or pytrees.finite(h_next)):
        check_finite("the next state", h_next, step)


def check_copied(h: Tensor, h_next: Tensor, writes: Tensor | None, step: int) -> None:
    """Refuse a step that changed a row it did not declare as written.

    Raises:
        SparsityError: with the step, sample and row.
    """
    if writes is None or torch.equal(index_sets.scatter(h, writes, index_sets.gather(h_next, writes)), h_next):
        return
    changed = (h != h_next).reshape(*h.shape[:2], -1).any(dim=2) & ~index_sets.mask(writes, h.shape[1])
    if bool(changed.any()):  # which one? only on the way to an error
        sample, row = (int(i) for i in changed.nonzero()[0])
        raise SparsityError(
            f"step {step}: row {row} of the state of sample {sample} changed, but is not declared as written (a row "
            "that decays is written, too)"
        )


def reached_leaves(*heads: Tensor) -> dict[int, Tensor]:
    """All leaves that a backward pass from these tensors would reach, by id."""
    found: dict[int, Tensor] = {}
    nodes: list[Any] = []
    for head in heads:
        if head.grad_fn is None:
            found[id(head)] = head
        else:
            nodes.append(head.grad_fn)
    seen = set()
    for node in nodes:  # a list that grows on the way
        if node in seen:
            continue
        seen.add(node)
        parents = node.next_functions
        if not parents and (variable := getattr(node, "variable", None)) is not None:
            found[id(variable)] = variable  # here gradients accumulate
        for parent, _ in parents:
            if parent is not None:
                nodes.append(parent)
    return found


def check_loss(loss: Any, outputs: list[Tensor], given: list["weakref.ref[Tensor]"], step: int) -> list[Tensor]:
    """The leaves that a loss of the newest step reaches; refuse what is no loss of it.

    Raises:
        LossError: not a scalar tensor with a graph, not dependent on this step's y, or given before. NonFiniteError.
    """
    if not isinstance(loss, Tensor):
        raise LossError(f"a loss must be a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise LossError(f"a loss must be a scalar, got shape {tuple(loss.shape)}; reduce it with .sum() or .mean()")
    if not outputs:
        raise LossError(
            "there is no step that can take a loss: call step() first, and give its losses before sync(), reset() "
            "or influence()"
        )
    if loss.device != outputs[0].device:
        raise LossError(f"the loss is on {loss.device}, y on {outputs[0].device}")
    if given and any(ref() is loss for ref in given):
        raise LossError(f"this loss was already given at step {step}; compute it anew if it is to count twice")
    reached = reached_leaves(loss) if loss.requires_grad else {}
    if reached.keys().isdisjoint(map(id, outputs)):
        raise LossError(
            f"the loss does not depend on the y of step {step}; compute it from what the last step() returned, "
            "without detaching it"
        )
    check_finite("the loss", loss, step)
    return list(reached.values())


class Open:
    """Whether a step still takes losses. Shared by the step and the hooks on its outputs, and nothing else."""

    __slots__ = ("now",)

    def __init__(self) -> None:
        self.now = True


def refuse_when_closed(leaf: Tensor, step: int, open_: Open | None = None) -> None:
    """Make a backward pass into ``leaf`` fail once its step takes no more losses, where it would be lost in silence.

    Args:
        open_: whether it does; None if no more.
    """

    def hook(gradient: Tensor) -> None:
        if open_ is None or not open_.now:
            raise LossError(
                f"a loss reaches the y of step {step}, whose block has closed; give losses before the block closes"
            )

    leaf.register_hook(hook)
