"""Whether a cell keeps the contract at a generic point, once for each kind of step.

A first state of zeros or a gate that starts at zero hides what a cell does: derivatives that are zero by chance say
nothing. So the cell is run on a disturbed copy of its state and parameters, where what can differ from zero does.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rtrl._engine import checks
from rtrl._engine.taps import Tap, TapRecorder
from rtrl._utils import index_sets, pytrees
from rtrl._utils.functional_call import functional_call
from rtrl.cells.protocol import OTHER_CHOICES, Sparsity, call_cell, same_choices
from rtrl.errors import CellError, RTRLError


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
    """Run the cell once on copies; refuse it if it draws random numbers or changes its input, state, buffers or
    parameters.

    Raises:
        CellError: naming what the cell did. Its buffers and parameters, and the CPU's generator, have been restored.
    """
    x, h = pytrees.map_tensors(torch.clone, x), h.clone()
    held = [*cell.parameters(), *cell.buffers()]
    saved = [value.detach().clone() for value in held]
    rng_state = torch.get_rng_state()
    watched = {"x": pytrees.tensors(x), "the state h": [h], "a parameter or buffer of its own": held}
    versions = {what: [t._version for t in tensors] for what, tensors in watched.items()}
    try:
        with _NoRandomness():  # type: ignore[no-untyped-call]
            call_cell(cell, x, h, replay)
        for what, tensors in watched.items():
            if [t._version for t in tensors] != versions[what]:
                raise CellError(
                    f"the cell changes {what} in place; a cell must be a pure function of (x, h, parameters)"
                )
        if [id(t) for t in held] != [id(t) for t in (*cell.parameters(), *cell.buffers())]:
            raise CellError(
                "the cell replaces a parameter or buffer of its own; a cell must be a pure function of (x, h, "
                "parameters)"
            )
    except CellError:
        for value, kept in zip(held, saved, strict=True):
            if not torch.equal(value, kept):
                value.copy_(kept)
        names = dict(cell.named_buffers())
        for name, buffer in zip(names, held[len(held) - len(names) :], strict=False):
            owner, _, leaf = name.rpartition(".")
            cell.get_submodule(owner)._buffers[leaf] = buffer
        torch.set_rng_state(rng_state)
        raise


@dataclass(frozen=True, slots=True)
class StepKind:
    """N samples of one kind of step: the same shapes and widths of sparsity.

    Attributes:
        x: (N, ...), a tree. h: (N, n, ...).
        replay: the choices to make, if the cell takes them. sparsity: what it declared.
        step: the number of the first step, for messages.
    """

    x: Any
    h: Tensor
    replay: Sparsity | None
    sparsity: Sparsity
    step: int

    def written(self, h_next: Tensor) -> Tensor:
        """The written rows of a next state, (N, w·width)."""
        return index_sets.gather(h_next.reshape(*h_next.shape[:2], self.h[0, 0].numel()), self.sparsity.writes).flatten(
            1
        )

    def sample(self, i: int) -> "StepKind":
        """Sample i alone."""
        x, h, replay, sparsity = pytrees.map_tensors(
            lambda leaf: leaf[i : i + 1], (self.x, self.h, self.replay, self.sparsity)
        )
        return StepKind(x, h, replay, sparsity, self.step)

    def call(self, cell: nn.Module, theta: Mapping[str, Tensor]) -> tuple[Any, Tensor, Sparsity]:
        """Run the cell with other parameters."""

        def substituted(*args: Any, **kwargs: Any) -> Any:
            return functional_call(cell, dict(theta), args, kwargs)

        return call_cell(substituted, self.x, self.h, self.replay)


def taps_mixing_samples(
    cell: nn.Module, parameters: Mapping[str, nn.Parameter], kind: StepKind, general: Iterable[str]
) -> set[str]:
    """The parameters with a tap whose dimension 0 does not run over the samples, found at a generic point.

    Args:
        parameters: name → trainable parameter. kind: a batch of N samples.
        general: parameters that have no taps anyway.

    Raises:
        CellError: a sample computes something else alone than in the batch, or depends on another one.
        SparsityError: a row that is not declared as written changes.

    Cost: three forward passes and ``2·⌈log2 N⌉`` backward passes over the batch.
    """
    batch = kind.h.shape[0]
    generator = torch.Generator().manual_seed(0)  # of its own: the user's random numbers stay as they are

    def disturbed(value: Tensor) -> Tensor:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64, device="cpu").to(value)
        return value.detach() + 0.1 * noise * (1 + value.detach().abs()) if value.is_floating_point() else value

    def point(move: Callable[[Tensor], Tensor]) -> tuple[dict[str, Tensor], StepKind]:
        theta = {name: move(p).requires_grad_(name in parameters) for name, p in cell.named_parameters()}
        return theta, replace(kind, h=move(kind.h).requires_grad_())

    theta, at = point(disturbed)
    try:
        taps, heads, h_next = _run(cell, parameters, theta, at, general)
    except RTRLError:
        raise
    except RuntimeError:  # the disturbed point may lie outside the cell's domain
        theta, at = point(lambda value: value.detach().clone())
        taps, heads, h_next = _run(cell, parameters, theta, at, general)
    checks.check_copied(at.h.detach(), h_next.detach(), kind.sparsity.writes, kind.step)
    if batch == 1:
        return set()
    for i in (0, batch - 1):
        lone = at.sample(i)
        with torch.no_grad():
            alone = lone.written(lone.call(cell, theta)[1])
        if not checks.nearly_equal(alone, heads[0][i : i + 1].detach()):
            raise CellError(
                f"step {kind.step}: the cell mixes samples: one computes something else alone than in a batch"
            )

    live = [head for head in heads if head.requires_grad and head.numel()]
    mixing: set[str] = set()
    for chosen in _separating_subsets(batch, kind.h.device):
        weights = []
        for head in live:
            weight = torch.linspace(1.0, 2.0, head[0].numel(), dtype=head.dtype, device=head.device).reshape(
                head[0].shape
            )
            weights.append(weight * chosen.reshape(-1, *[1] * (head.ndim - 1)).to(head.dtype))
        inputs = [at.h, *(tap.output for tap in taps)]
        grads = torch.autograd.grad(live, inputs, weights, retain_graph=True, allow_unused=True) if live else ()
        for i, grad in enumerate(grads):
            if grad is None or not grad.numel():
                continue
            stray = grad.reshape(batch, -1)[~chosen]
            if bool((torch.isfinite(stray) & (stray != 0)).any()):
                if i == 0:
                    raise CellError(
                        f"step {kind.step}: the cell mixes samples: the next state or y of one depends on the state of "
                        "another"
                    )
                mixing.add(taps[i - 1].name)
    return mixing


def _run(
    cell: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    theta: Mapping[str, Tensor],
    at: StepKind,
    general: Iterable[str],
) -> tuple[list[Tap], list[Tensor], Tensor]:
    recorder = TapRecorder({name: theta[name] for name in parameters}, at.h.shape[0], general, copy=True)
    with recorder:
        y, h_next, again = at.call(cell, theta)
    if not same_choices(again, at.sparsity):
        raise CellError(f"step {at.step}: {OTHER_CHOICES}")
    outputs = [leaf for leaf in pytrees.tensors(y) if leaf.is_floating_point()]
    return recorder.taps, [at.written(h_next), *outputs], h_next


def _separating_subsets(batch: int, device: torch.device) -> list[Tensor]:
    """Boolean masks (N,) such that for any two samples some mask holds the one and not the other."""
    number = torch.arange(batch, device=device)
    bits = [(number >> bit & 1).bool() for bit in range((batch - 1).bit_length())]
    return [*bits, *(~mask for mask in bits)]
