"""Taps: linear uses of parameters, whose immediate Jacobians are outer products of two factors.

For ``z = W u`` the derivative of anything with respect to W is ``∂/∂z ⊗ u``. While a cell runs under ``TapRecorder``,
every such use of a watched parameter is cut out of autograd's graph and its two ends are kept, so that no (state ×
parameters) matrix is written per step. A use that no rule covers stays in the graph: its parameter is *untapped*.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rtrl.cells.grouped_linear import frozen_grouped_linear, grouped_linear

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Tap:
    """One use of one parameter: ``out = z + …`` with ``z[n, k, l] = W_{index[n, k]} @ inputs[n, k, l]``.

    Attributes:
        name: the parameter.
        index: LongTensor (N, K), the slices of the parameter's first dimension that were used; None: K = 1, the whole
            parameter.
        inputs: (N, K or 1, L, I), or None for ones with I = 1 (a bias, or a slice used as it is).
        output: the tensor z in the graph, of any shape that views as (N, K, L, O).
        shape: (K, L, O).
        transposed: the parameter is stored as (I, O), not (O, I).
        factor: (N, L, O), if ``z[n, 0, l] = θ ⊙ factor[n, l]`` for a parameter θ of O elements; else None.
    """

    name: str
    index: Tensor | None
    inputs: Tensor | None
    output: Tensor
    shape: tuple[int, int, int]
    transposed: bool = False
    factor: Tensor | None = None


class Valve:
    """Lets gradients pass from the recorded outputs to what they are computed from, or stops them there."""

    def __init__(self) -> None:
        self.is_open = True

    @contextmanager
    def shut(self) -> Iterator[None]:
        """Stop gradients while entered: those of a head are then its partial derivatives, every z held fixed."""
        self.is_open = False
        try:
            yield
        finally:
            self.is_open = True


class _Gate(torch.autograd.Function):
    """A copy, whose backward pass goes through a valve."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, valve: Valve) -> Tensor:
        ctx.valve = valve
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        return (grad if ctx.valve.is_open else None), None


class TapRecorder(TorchFunctionMode):
    """Records a tap for every linear use of the watched parameters while it is entered.

    Args:
        parameters: name → parameter; uses of a complex one are not recorded.
        batch: the number N of samples; a use counts only if dimension 0 of its input runs over them (or over all their
            tokens).
        untapped: names of parameters whose uses are not recorded.
        copy: return copies of recorded outputs; needed where the cell changes them in place.
        gated: put a valve between each recorded output and what it is computed from.
        elementwise: record products of a parameter and what is as large, too.

    Attributes:
        by_output: the taps, those of one output z together: a weight and its bias.
        sources: the tensor that each output was computed from, with its graph; None for slices used as they are.
        valve: see ``gated``; None without.
        inner_gradient: whether the cell took a gradient by autograd. A tap cuts its parameter out of that gradient's
            graph, so that none may be recorded then.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        batch: int,
        untapped: Iterable[str] = (),
        *,
        copy: bool = False,
        gated: bool = False,
        elementwise: bool = False,
    ) -> None:
        super().__init__()
        self.elementwise = elementwise
        skipped = set(untapped)
        self._names = {id(p): name for name, p in parameters.items() if name not in skipped and not p.is_complex()}
        self.batch, self._copy = batch, copy
        self.by_output: list[list[Tap]] = []
        self.inner_gradient = False
        self.valve = Valve() if gated else None
        self._versions: list[int] = []
        self.sources: list[Tensor | None] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is None:
            self.inner_gradient |= func in _GRADIENTS
        # Inside torch.func, dimension 0 need not run over the samples, and nothing may be kept; in forward mode, the
        # tangent of an output depends on the parameter, too.
        elif torch.is_grad_enabled() and not (
            torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
        ):
            out = rule(self, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return func(*args, **kwargs)

    @property
    def taps(self) -> list[Tap]:
        """All taps."""
        return [tap for taps in self.by_output for tap in taps]

    @property
    def changed_in_place(self) -> bool:
        """Whether the cell overwrote a recorded output, so that its taps are wrong."""
        return any(
            taps[0].output._version != version for taps, version in zip(self.by_output, self._versions, strict=True)
        )

    def name(self, tensor: Any) -> str | None:
        """The name under which a tensor is watched, if it is."""
        return self._names.get(id(tensor)) if isinstance(tensor, Tensor) else None

    def record(
        self,
        out: Tensor,
        shape: tuple[int, int, int],
        uses: Iterable[tuple[str, Tensor | None]],
        index: Tensor | None = None,
        transposed: bool = False,
        source: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> Tensor:
        """Record ``out`` as the output of (parameter, inputs) pairs, computed from ``source``; returns the tensor that
        the cell continues with."""
        is_leaf = not out.requires_grad  # nothing before it carries a gradient
        if is_leaf:
            out = out.detach().requires_grad_()
        elif self.valve is not None:
            out = _Gate.apply(out, self.valve)  # type: ignore[no-untyped-call]
        self.sources.append(source)
        self.by_output.append([Tap(name, index, inputs, out, shape, transposed, factor) for name, inputs in uses])
        self._versions.append(out._version)
        return out.clone() if is_leaf or self._copy else out

    def tokens(self, leading: torch.Size) -> int | None:
        """Tokens per sample if these leading dimensions run over the samples first; None if they do not."""
        if leading and leading[0] == self.batch:
            return leading[1:].numel()
        if len(leading) == 1 and leading[0] % self.batch == 0:
            return leading[0] // self.batch
        return None


def record_taps(
    call: Callable[[], _T],
    parameters: Mapping[str, Tensor],
    batch: int,
    untapped: Iterable[str],
    *,
    copy: bool = False,
    gated: bool = False,
    elementwise: bool = False,
) -> tuple[_T, TapRecorder]:
    """Call a function under a ``TapRecorder``; without any tap if it takes a gradient by autograd.

    Returns:
        What the function returns, and the recorder.
    """
    recorder, result = TapRecorder(parameters, batch, untapped, copy=copy, gated=gated, elementwise=elementwise), None
    try:
        with recorder:
            result = call()
    except RuntimeError:
        if not recorder.inner_gradient:
            raise
    if recorder.inner_gradient:
        recorder = TapRecorder(parameters, batch, parameters, copy=copy)
        with recorder:
            result = call()
    return result, recorder  # type: ignore[return-value]


def _linear(recorder: TapRecorder, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    name, bias_name = recorder.name(weight), recorder.name(bias)
    tokens = recorder.tokens(input.shape[:-1])
    if name is None or tokens is None or weight.ndim != 2:
        return NotImplemented
    if bias is not None and bias_name is not None:
        if bias.shape != weight.shape[:1]:  # it is broadcast, so that its slices are not rows of z
            return NotImplemented
        bias = bias.detach()
    out = F.linear(input, weight.detach(), bias)
    inputs = input.detach().reshape(recorder.batch, 1, tokens, input.shape[-1])
    uses: list[tuple[str, Tensor | None]] = [(name, inputs)]
    if bias_name is not None:
        uses.append((bias_name, None))
    return recorder.record(out, (1, tokens, out.shape[-1]), uses, source=input)


def _matmul(recorder: TapRecorder, input: Tensor, other: Tensor) -> Any:
    name = recorder.name(other)
    if name is None or other.ndim != 2:
        return NotImplemented
    tokens = recorder.tokens(input.shape[:-1])
    if tokens is None:
        return NotImplemented
    out = torch.matmul(input, other.detach())
    inputs = input.detach().reshape(recorder.batch, 1, tokens, input.shape[-1])
    return recorder.record(out, (1, tokens, out.shape[-1]), [(name, inputs)], transposed=True, source=input)


def _grouped_linear(recorder: TapRecorder, inputs: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor) -> Any:
    name, bias_name = recorder.name(weight), recorder.name(bias)
    if name is None or recorder.tokens(inputs.shape[:1]) != 1:
        return NotImplemented
    if bias is None or bias_name is not None:
        out = frozen_grouped_linear(inputs, weight, bias, index)
    else:  # the bias is computed from something else
        out = frozen_grouped_linear(inputs, weight, None, index) + bias[index].unsqueeze(2)
    uses: list[tuple[str, Tensor | None]] = [(name, inputs.detach())]
    if bias_name is not None:
        uses.append((bias_name, None))
    return recorder.record(out, (out.shape[1], out.shape[2], out.shape[3]), uses, index, source=inputs)


def _embedding(
    recorder: TapRecorder,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    name = recorder.name(weight)
    tokens = recorder.tokens(input.shape)
    if (
        name is None
        or tokens is None
        or padding_idx is not None
        or max_norm is not None
        or scale_grad_by_freq
        or sparse
    ):
        return NotImplemented
    out = F.embedding(input, weight.detach())
    return recorder.record(out, (tokens, 1, out.shape[-1]), [(name, None)], input.reshape(recorder.batch, tokens))


def _product(recorder: TapRecorder, input: Any, other: Any, *, out: Tensor | None = None) -> Any:
    if not recorder.elementwise or out is not None:
        return NotImplemented
    name = recorder.name(other)
    if name is None:
        input, other, name = other, input, recorder.name(input)
    if name is None or recorder.name(input) is not None or not isinstance(input, Tensor):
        return NotImplemented
    product = torch.mul(input, other.detach())
    tokens = recorder.tokens(product.shape[: product.ndim - other.ndim])
    fits = input.ndim == product.ndim > other.ndim > 0 and product.shape[product.ndim - other.ndim :] == other.shape
    if not fits or tokens is None or product.dtype != other.dtype:
        return NotImplemented
    factor = input.detach().expand(product.shape).reshape(recorder.batch, tokens, other.numel())
    return recorder.record(product, (1, tokens, other.numel()), [(name, None)], source=input, factor=factor)


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    grouped_linear: _grouped_linear,
    F.embedding: _embedding,
    torch.mul: _product,
    Tensor.mul: _product,
    Tensor.__mul__: _product,
    Tensor.__rmul__: _product,
}
_GRADIENTS: set[Callable[..., Any]] = {torch.autograd.grad, torch.autograd.backward, Tensor.backward}


def segment_products(left: Tensor, right: Tensor | None, segment: Tensor, count: int) -> Tensor:
    """``out[s] = Σ_{i: segment[i] = s} left[i] · right[i]``, (count, U, O, I), as one padded batched product, of left
    (n, U, L, O), right (n, L, I) or None for ones with I = 1, and segment (n,) in 0 … count − 1.

    Cost: count · (largest segment) · U·L·O·I multiply-adds.
    """
    n, u, length, o = left.shape
    sizes = torch.bincount(segment, minlength=count)
    longest = int(sizes.max()) if count else 0
    order = segment.argsort(stable=True)
    inside = torch.arange(n, device=segment.device) - (sizes.cumsum(0) - sizes)[segment[order]]
    table = segment.new_full((count, longest), n)  # entry n is a row of zeros
    table[segment[order], inside] = order
    rows = torch.cat([left, left.new_zeros(1, u, length, o)])[table]  # (count, longest, U, L, O)
    rows = rows.permute(0, 2, 4, 1, 3).reshape(count, u * o, longest * length)
    if right is None:
        return rows.sum(dim=2).reshape(count, u, o, 1)
    cols = torch.cat([right, right.new_zeros(1, *right.shape[1:])])[table].reshape(
        count, longest * length, right.shape[2]
    )
    return torch.bmm(rows, cols).reshape(count, u, o, right.shape[2])
