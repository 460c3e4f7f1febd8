"""Laws of learners that carry an approximate influence forward: by a mask, or by any recursion that the user gives."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import oracles
from rtrl._utils.real_pairs import as_real, real_numbers
from rtrl.errors import ConfigError
from rtrl.testing.laws import Gradients, Law
from rtrl.testing.linearized_steps import LinearizedStep, linearized
from rtrl.testing.streams import Stream


@dataclass(frozen=True, slots=True)
class RecursionStep:
    """What a recursion may use at one step, for one parameter of P entries.

    Attributes:
        t: the number of the step.
        name: of the parameter.
        learner: the learner after the stream, for constants that it holds; None for a function of the stream.
        x: the input of the step.
        h: the state (B, ...) before the step.
        h_next: the state after it.
        dynamics: the dynamics Jacobian J (B, H, H), by autograd of the cell.
        immediate: the immediate Jacobian B (B, H, P).
    """

    t: int
    name: str
    learner: Any
    x: Tensor
    h: Tensor
    h_next: Tensor
    dynamics: Tensor
    immediate: Tensor


Carry = Callable[[RecursionStep, Tensor], Tensor]


class _ByRecursion(Law):
    """A law whose influence follows a recursion; the adjoint is exact."""

    covers_influence = True
    before_loss: bool

    @abstractmethod
    def _carried(self, step: RecursionStep, trace: Tensor) -> Tensor:
        """The trace after the step."""

    def _met(self, step: RecursionStep, trace: Tensor) -> Tensor:
        """The influence that a trace stands for."""
        return trace

    def variant(self) -> "Law":
        """The same law with the other ``before_loss``."""
        return replace(self, before_loss=not self.before_loss)  # type: ignore[type-var]

    def reference(self, stream: Stream, learner: Any) -> Gradients:
        """Return the gradients of the recursion on the ``stream``, with what the ``learner`` holds after it."""
        return self._run(stream, learner)[0]

    def reference_influence(self, stream: Stream, learner: Any) -> Gradients:
        """Return the influences of the recursion on the ``stream``, with what the ``learner`` holds after it."""
        return self._run(stream, learner)[1]

    def _run(self, stream: Stream, learner: Any) -> tuple[Gradients, Gradients]:
        whole = linearized(stream)
        traces = whole.by_name(whole.first_influence)
        influences = dict(traces)
        direct = torch.stack([step.direct for step in whole.steps]).sum(dim=0)
        gradient = whole.by_name(direct)
        for t, linear in enumerate(whole.steps):
            fresh = whole.by_name(linear.fresh_influence)
            immediate = whole.by_name(linear.immediate)
            for name, trace in traces.items():
                if linear.fresh is not None:
                    trace = torch.where(linear.fresh.reshape(-1, 1, 1), fresh[name], trace)
                step = _step(t, name, learner, linear, immediate[name])
                carried = self._carried(step, trace)
                if not isinstance(carried, Tensor) or carried.shape != trace.shape:
                    form = tuple(carried.shape) if isinstance(carried, Tensor) else type(carried).__name__
                    raise ConfigError(f"carry must return a trace {tuple(trace.shape)} of {name!r}, got {form}")
                met, influences[name] = self._met(step, trace), self._met(step, carried)
                through = torch.einsum("bh,bhp->p", linear.adjoint, met)
                if self.before_loss:
                    lost = influences[name] - (linear.dynamics @ met + immediate[name])
                    through = through + torch.einsum("bh,bhp->p", linear.new_adjoint, lost)
                gradient[name] = gradient[name] + through.reshape(gradient[name].shape)
                traces[name] = carried
        return gradient, influences


def _step(t: int, name: str, learner: Any, linear: LinearizedStep, immediate: Tensor) -> RecursionStep:
    return RecursionStep(t, name, learner, linear.x, linear.h, linear.h_next, linear.dynamics, immediate)


@dataclass(frozen=True)
class Recursion(_ByRecursion):
    """The influence follows a recursion ``S ← carry(step, S)`` in place of ``J S + B``; the adjoint is exact.

    Equation:
        S_{t+1} = carry(J_t, B_t, …, S_t);  g = Σ_t ( ∂ℓ_t/∂θ + δ_t S_t ), where δ_t and ∂ℓ_t/∂θ take the step's own
        graph as it is: a loss that reads h_{t+1} meets J_t S_t + B_t. With ``before_loss``, it meets S_{t+1} there:
        g gets Σ_t a_t (S_{t+1} − J_t S_t − B_t) besides, where a_t = ∂ℓ_t/∂h_{t+1}.

    Args:
        carry: ``carry(step, trace)`` returns the trace (B, H, P) of one parameter after a step, from the trace before;
            ``step`` is a ``RecursionStep``. The trace is zero at the start of a sample, and ∂h₀/∂θ for a learned h₀.
        influence: ``influence(step, trace)`` returns the influence (B, H, P) that a trace stands for; the trace itself
            by default.
        before_loss: whether the trace is carried before the loss of the step meets it, as most papers write it: the
            loss reads the new state and meets the new influence. It makes a difference only where y is computed from
            the h_next that the cell returns.

    Raises:
        ConfigError: an argument is of the wrong kind, or ``carry`` returns a tensor of another form.

    Example:
        >>> import rtrl
        >>> from rtrl.learners import RFLO
        >>> from rtrl.testing import LearnerSpec, check_learner
        >>> law = Recursion(lambda step, trace: 0.7 * trace + step.immediate)
        >>> spec = LearnerSpec(lambda cell, batch: RFLO(cell, batch, leak=0.3), law=law, sparse=False)
        >>> check_learner(spec, checks=["dense cell", "influence"]).passed
        True
    """

    carry: Carry = field(repr=False)
    influence: Carry | None = field(default=None, repr=False)
    before_loss: bool = False

    def __post_init__(self) -> None:
        for what, function in (("carry", self.carry), ("influence", self.influence)):
            if not callable(function) and (what == "carry" or function is not None):
                raise ConfigError(f"{what} must be a function {what}(step, trace), got {function!r}")
        _check_flag(self.before_loss)

    def _carried(self, step: RecursionStep, trace: Tensor) -> Tensor:
        return self.carry(step, trace)

    def _met(self, step: RecursionStep, trace: Tensor) -> Tensor:
        return trace if self.influence is None else self.influence(step, trace)


def _mask_of_learner(learner: Any, name: str) -> Tensor:
    mask: Tensor = learner.mask(name)
    return mask


@dataclass(frozen=True)
class Masked(_ByRecursion):
    """The influence is zero outside a mask, and inside it follows the masked recursion ``S ← M ∘ (J S + B)``.

    Equation:
        S_{t+1} = M ∘ (J_t S_t + B_t);  g = Σ_t ( ∂ℓ_t/∂θ + δ_t S_t ), where a loss that reads h_{t+1} meets
        J_t S_t + B_t. With ``before_loss``, as in the paper on SnAp, it meets the masked S_{t+1} there: g loses
        Σ_t a_t ((1 − M) ∘ (J_t S_t + B_t)), where a_t = ∂ℓ_t/∂h_{t+1}.

    Args:
        mask: ``mask(learner, name)`` returns M, Boolean (H, P) in the order of the flattened state and parameter, after
            the stream; ``learner.mask(name)`` by default. It must not change along the stream, except at entries that
            were zero before.
        before_loss: whether the new influence is masked before the loss of the step meets it. It makes a difference
            only where y is computed from the h_next that the cell returns.

    Raises:
        ConfigError: an argument is of the wrong kind.

    Source:
        Menick et al. (2021), "Practical Real Time Recurrent Learning with a Sparse Approximation", ICLR, section 3:
        ``before_loss=True``.
    """

    mask: Callable[[Any, str], Tensor] = field(default=_mask_of_learner, repr=False)
    before_loss: bool = False

    def __post_init__(self) -> None:
        if not callable(self.mask):
            raise ConfigError(f"mask must be a function mask(learner, name), got {self.mask!r}")
        _check_flag(self.before_loss)

    def _carried(self, step: RecursionStep, trace: Tensor) -> Tensor:
        mask = self.mask(step.learner, step.name)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != trace.shape[1:]:
            form = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ConfigError(f"the mask of {step.name!r} must be Boolean {tuple(trace.shape[1:])}, got {form}")
        return (step.dynamics @ trace + step.immediate) * mask

    def _run(self, stream: Stream, learner: Any) -> tuple[Gradients, Gradients]:
        if self.before_loss:
            return super()._run(stream, learner)
        names = [name for name, p in stream.cell.named_parameters() if p.requires_grad]
        gradients, influences = oracles.dense_rtrl(
            stream.cell,
            stream.xs,
            stream.loss,
            resets=stream.resets,
            offsets=stream.offsets,
            mask={name: self.mask(learner, name) for name in names},
            return_influence=True,
        )
        return gradients, influences[-1]


@dataclass(frozen=True)
class LocalToLayers(Law):
    """The influence of a layer's parameters stays with the state of that layer; the adjoint is exact.

    Equation:
        S_{t+1} = M ∘ (J_t S_t + B_t) and S_0 = M ∘ ∂h_0/∂θ; g = Σ_t ( ∂ℓ_t/∂θ + δ_t S_t ), where M keeps, of each
        parameter, the state entries of its own layer.

    Args:
        layers: the beginning of the names of a layer's parameters → the flat entries of a sample's state that are that
            layer's. A parameter of no layer has no influence.

    Raises:
        ConfigError: ``layers`` is not a mapping, or names entries that the state has not.

    Source:
        Zucchet et al. (2023), "Online learning of long-range dependencies", NeurIPS, section 3.2.
    """

    layers: Mapping[str, Sequence[int]] = field(repr=False)
    covers_influence = True

    def __post_init__(self) -> None:
        if not isinstance(self.layers, Mapping):
            raise ConfigError(f"layers must map beginnings of names to state entries, got {self.layers!r}")

    def reference(self, stream: Stream, learner: Any) -> Gradients:
        """Return the gradients of the recursion on the ``stream``, for any ``learner``."""
        return self._run(stream)[0]

    def reference_influence(self, stream: Stream, learner: Any) -> Gradients:
        """Return the influences of the recursion on the ``stream``, for any ``learner``."""
        return self._run(stream)[1][-1]

    def _run(self, stream: Stream) -> tuple[Gradients, list[Gradients]]:
        size = as_real(stream.cell.init_state(1)).numel()  # type: ignore[operator]
        masks = {}
        for name, p in stream.cell.named_parameters():
            masks[name] = torch.zeros(size, real_numbers(p), dtype=torch.bool)
            for prefix, entries in self.layers.items():
                if any(not 0 <= entry < size for entry in entries):
                    raise ConfigError(f"layers[{prefix!r}] must lie in 0 … {size - 1}, got {list(entries)}")
                if name.startswith(prefix):
                    masks[name][list(entries)] = True
        return oracles.dense_rtrl(
            stream.cell,
            stream.xs,
            stream.loss,
            resets=stream.resets,
            offsets=stream.offsets,
            mask={name: mask for name, mask in masks.items() if stream.cell.get_parameter(name).requires_grad},
            return_influence=True,
        )


def _check_flag(before_loss: object) -> None:
    if not isinstance(before_loss, bool):
        raise ConfigError(f"before_loss must be True or False, got {before_loss!r}")
