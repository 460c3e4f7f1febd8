"""Count multiply-adds: the same on every machine and at every load, so that claims about cost can be checked.

``torch.utils.flop_counter`` counts nothing for matrix-vector, outer, elementwise and sparse products, and ignores
operations that it does not know, so that a cost moved into one of those would look like a saving. Here every operation
is in one of three classes, or is refused.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from rtrl.errors import ConfigError, UnknownOperationError

Rule = Callable[[tuple[Any, ...], Mapping[str, Any], Any], int]
"""``rule(args, kwargs, out)`` → the multiply-adds of one call, its arguments in the order of the operation's schema."""


class MacCounter(TorchDispatchMode):
    """Count the multiply-adds of all tensor operations inside ``with``, in forward and backward passes and ``vmap``.

    The counter sees the operations that are launched, after autograd, batching rules and decompositions. Every
    operation is in one class:

    * Contractions (``mm``, ``bmm``, ``addmm``, ``mv``, ``dot`` …, which ``linear``, ``matmul`` and ``einsum`` become)
      count their exact multiply-adds, one for each scalar product. A bias counts nothing; a sparse factor counts the
      numbers that it stores. A ``mul`` larger than both factors is an outer product, a contraction of length one.
    * Elementwise arithmetic counts one for each element of its result (a ``softmax`` too), and a reduction or
      accumulating scatter one for each element of its input. These have a sum of their own, ``elementwise``.
    * Moving, filling, drawing, comparing, selecting, sorting and counting of values counts nothing.
    * Any other operation, such as a convolution, is refused with ``UnknownOperationError``.

    Counts follow from shapes and indices, so they do not depend on the device or the number of threads. Complex and
    integer elements count like real ones. A counter entered twice counts once; two nested counters both count
    everything.

    Args:
        rules: ``"namespace.name"`` → ``rule(args, kwargs, out)``, as ``register`` takes them.

    Attributes:
        by_op: operation → multiply-adds of its contractions.
        elementwise_by_op: operation → elements of its other calls.

    Raises:
        ConfigError: a name in ``rules`` is malformed.

    Example:
        >>> import torch
        >>> with MacCounter() as counter:
        ...     y = torch.tanh(torch.ones(5, 2, 3) @ torch.ones(3, 4))
        >>> counter.macs, counter.elementwise, dict(counter.by_op)
        (120, 40, {'aten.mm': 120})
    """

    def __init__(self, rules: Mapping[str, Rule] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_op: Counter[str] = Counter()
        self.elementwise_by_op: Counter[str] = Counter()
        self._rules: dict[str, Rule] = {}
        self._entered: list[bool] = []  # for each ``with``, innermost last: whether it pushed the mode
        for name, rule in (rules or {}).items():
            self.register(name, rule)

    @property
    def macs(self) -> int:
        """The multiply-adds of all contractions so far."""
        return self.by_op.total()

    @property
    def elementwise(self) -> int:
        """The elements of all elementwise operations and reductions so far."""
        return self.elementwise_by_op.total()

    def register(self, name: str, rule: Rule) -> None:
        """Count an operation by this rule, in ``macs``, from now on.

        Args:
            name: ``"namespace.name"``, as in the error that refused it; it stands for all overloads, and the in-place
                form.
            rule: ``rule(args, kwargs, out)`` → multiply-adds of one call; ``lambda *_: 0`` if it does no arithmetic.

        Raises:
            ConfigError: the name does not have this form.
        """
        parts = name.split(".") if isinstance(name, str) else []
        if len(parts) != 2 or not all(part.isidentifier() for part in parts):
            raise ConfigError(f"an operation is named 'namespace.name', such as 'aten.mm', got {name!r}")
        self._rules[_out_of_place(name)] = rule

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # newer versions of PyTorch would wrap every dispatch in ``torch._dynamo``, whose import alone takes seconds
        return False

    def __enter__(self) -> "MacCounter":
        fresh = self not in _get_current_dispatch_mode_stack()
        self._entered.append(fresh)
        if fresh:
            super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *raised: Any) -> None:
        if self._entered.pop():
            super().__exit__(*raised)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, kind, _ = _classify(func)
        # Inference mode dispatches whole compositions, such as ``linear``: count their parts.
        if kind == "unknown" and name not in self._rules and isinstance(func, torch._ops.OpOverload):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        self._check_known(func)
        out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _check_known(self, func: Any) -> None:
        name, kind, _ = _classify(func)
        if kind == "unknown" and name not in self._rules:
            raise UnknownOperationError(
                f"no count of multiply-adds is known for {func}; if one call does n of them, call "
                f"counter.register({name!r}, lambda args, kwargs, out: n)"
            )

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Add what a call that was made takes."""
        name, kind, rule = _classify(func)
        if name in self._rules:
            kind, rule = "contraction", self._rules[name]
        if kind != "move":
            outer = name == "aten.mul" and name not in self._rules and _is_outer(args, out)
            counts = self.by_op if kind == "contraction" or outer else self.elementwise_by_op
            counts[name] += rule(args, kwargs, out)


def _stored(tensor: Tensor) -> int:
    """How many numbers a tensor holds: all its elements, or those that a sparse layout stores."""
    if tensor.layout is torch.strided:
        return tensor.numel()
    return (tensor._values() if tensor.layout is torch.sparse_coo else tensor.values()).numel()


def _contraction(first: int) -> Rule:
    """``args[first] @ args[first + 1]``: matrices, batches of matrices, or vectors."""

    def count(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
        a, b = args[first], args[first + 1]
        if b.layout is torch.strided:
            return _stored(a) * (b.shape[-1] if b.ndim > 1 else 1)
        if a.layout is torch.strided:
            return int(a.shape[-2]) * _stored(b)
        raise UnknownOperationError(
            "the multiply-adds of a sparse times a sparse matrix depend on where their entries are; register a rule"
        )

    return count


def _outer(first: int) -> Rule:
    return lambda args, kwargs, out: args[first].numel() * args[first + 1].numel()


def _nothing(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    return 0


def _results(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """One for each element of the largest result."""
    return max((_stored(t) for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), default=0)


def _inputs(place: int) -> Rule:
    """One for each element of the argument at ``place``."""
    return lambda args, kwargs, out: _stored(args[place]) if isinstance(args[place], Tensor) else 0


def _lists(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """One for each element of the tensors in the list that comes first."""
    return sum(_stored(t) for t in args[0])


def _put(args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """``index_put`` adds if it accumulates, and moves if not."""
    return _stored(args[2]) if len(args) > 3 and args[3] else 0


def _is_outer(args: tuple[Any, ...], out: Tensor) -> bool:
    factors = [t for t in args[:2] if isinstance(t, Tensor)]
    return len(factors) == 2 and all(_stored(t) < _stored(out) for t in factors)


def _aten(rule: Rule, names: str) -> dict[str, Rule]:
    return {f"aten.{name}": rule for name in names.split()}


_CONTRACTIONS = {
    **_aten(_contraction(0), "mm bmm mv dot vdot"),
    **_aten(_contraction(1), "addmm addbmm baddbmm addmv _sparse_addmm"),
    **_aten(_outer(1), "addr"),
}

# Operations that PyTorch tags as pointwise count their results, too, unless they are in another table.
_ELEMENTS = {
    **_aten(
        _results,
        """_softmax _softmax_backward_data _log_softmax _log_softmax_backward_data floor_divide native_dropout
        native_dropout_backward native_layer_norm native_layer_norm_backward _fused_rms_norm _fused_rms_norm_backward
        softplus_backward hardtanh_backward elu_backward glu glu_backward log_sigmoid_forward log_sigmoid_backward
        leaky_relu_backward hardshrink mse_loss_backward smooth_l1_loss_backward huber_loss_backward nll_loss_backward
        binary_cross_entropy_backward _thnn_fused_gru_cell _thnn_fused_lstm_cell""",
    ),
    **_aten(
        _inputs(0),
        """sum nansum mean prod cumsum cumprod var std var_mean std_mean logsumexp logcumsumexp norm linalg_vector_norm
        dist trace embedding_dense_backward mse_loss smooth_l1_loss huber_loss nll_loss_forward binary_cross_entropy
        binary_cross_entropy_with_logits""",
    ),
    **_aten(_inputs(3), "index_add scatter_add index_reduce"),
    **_aten(_lists, "_foreach_add _foreach_norm"),
    **_aten(_put, "index_put _unsafe_index_put _index_put_impl"),
}

_MOVES = _aten(
    _nothing,
    # copies, changes of shape
    """clone copy _to_copy _unsafe_view _reshape_copy cat stack repeat roll flip tril triu constant_pad_nd
    unfold_backward resize set unsafe_split unsafe_split_with_sizes unsafe_chunk select_backward slice_backward
    diagonal_backward select_scatter slice_scatter diagonal_scatter diag_embed _conj_physical is_pinned _pin_memory """
    # look-ups, writes that do not add
    """gather index index_select take embedding scatter index_copy index_fill masked_fill masked_select masked_scatter
    where _local_scalar_dense repeat_interleave """
    # new tensors, drawn or not
    """empty empty_like empty_strided new_empty new_empty_strided zeros zeros_like new_zeros ones ones_like new_ones
    full full_like new_full zero fill eye arange linspace scalar_tensor tril_indices triu_indices rand rand_like randn
    randn_like randint randint_like randperm normal uniform random bernoulli exponential geometric log_normal cauchy
    multinomial poisson """
    # comparing, choosing, sorting, counting
    """eq ne lt le gt ge equal isin isnan isinf isposinf isneginf logical_and logical_or logical_xor logical_not
    bitwise_and bitwise_or bitwise_xor bitwise_not all any max min amax amin aminmax argmax argmin sort topk
    searchsorted bucketize unique_dim _unique2 unique_consecutive count_nonzero nonzero nonzero_static bincount
    is_same_size is_set_to """
    # between layouts
    """_to_sparse _to_sparse_csr _to_sparse_csc _to_dense _coalesce _nnz is_coalesced _sparse_coo_tensor_unsafe
    _sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors _sparse_compressed_tensor_unsafe""",
)


@cache
def _classify(func: Any) -> tuple[str, str, Rule]:
    """The name of an operation, without overload and in-place mark; its class; its rule."""
    if not isinstance(func, torch._ops.OpOverload):
        return str(func), "unknown", _nothing
    name = _out_of_place(str(func.overloadpacket))
    for kind, rules in (("contraction", _CONTRACTIONS), ("elementwise", _ELEMENTS), ("move", _MOVES)):
        if name in rules:
            return name, kind, rules[name]
    if func.is_view or torch.Tag.inplace_view in func.tags or func.namespace == "profiler":
        return name, "move", _nothing
    # The overload that writes to ``out=`` does not carry the tag itself, nor do all that work in place.
    packets = func.overloadpacket, getattr(torch.ops.aten, name.removeprefix("aten."), func.overloadpacket)
    overloads = [getattr(packet, overload) for packet in packets for overload in packet.overloads()]
    if any(torch.Tag.pointwise in overload.tags for overload in overloads):
        return name, "elementwise", _results
    return name, "unknown", _nothing


def _out_of_place(name: str) -> str:
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name
