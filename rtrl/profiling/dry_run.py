"""Run code on tensors that have shapes and no numbers, and count its multiply-adds and bytes: exact at any size."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter, Rule, _classify

_META = torch.device("meta")


class _Form:
    """Shape, strides, offset and dtype of a tensor without numbers; one object for all that are alike.

    Attributes:
        truth: of Booleans, the value that all of them are taken to have.
    """

    __slots__ = ("dtype", "offset", "shape", "stride", "truth")

    def __init__(self, shape: torch.Size, stride: tuple[int, ...], offset: Any, dtype: torch.dtype, truth: bool):
        self.shape, self.stride, self.offset, self.dtype, self.truth = shape, stride, offset, dtype, truth

    def meta(self) -> Tensor:
        """A tensor of this form on the meta device."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)) + 1
        return torch.empty(self.offset + max(last, 0), dtype=self.dtype, device=_META).as_strided(
            self.shape, self.stride, self.offset
        )


class _Storage:
    """Memory that would be there; ``live`` counts it as long as this object exists."""

    __slots__ = ("live", "n_bytes")

    def __init__(self, live: LiveBytes | None, n_bytes: int) -> None:
        self.live, self.n_bytes = live, n_bytes
        if live is not None:
            live.add(n_bytes)

    def __del__(self) -> None:
        if self.live is not None:
            self.live.add(-self.n_bytes)


class ShapeTensor(Tensor):
    """A tensor with shape, strides, dtype and device, and no numbers; where code reads them, they are all 0.

    It takes part in autograd. Operations on it run inside a ``DryRun`` alone.
    """

    form: _Form
    storage_: _Storage

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def make(form: _Form, device: torch.device, storage: _Storage) -> "ShapeTensor":
        """Return a tensor of a ``form`` on a ``device``, with memory that is counted in ``storage``."""
        made: ShapeTensor = Tensor._make_wrapper_subclass(
            ShapeTensor, form.shape, form.stride, form.offset, dtype=form.dtype, device=device
        )
        made.form, made.storage_ = form, storage
        return made

    def tolist(self) -> Any:
        """Return the numbers as nested lists: all are 0."""
        nested: Any = self.form.truth if self.dtype == torch.bool else 0.0 if self.dtype.is_floating_point else 0
        for size in reversed(self.shape):
            nested = [nested] * size
        return nested

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ShapeTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return NotImplemented  # outside of a ``DryRun``


class DryRun(MacCounter):
    """Inside ``with``, count multiply-adds as ``MacCounter`` does and bytes as ``LiveBytes`` does, without computing.

    What is computed from a ``ShapeTensor`` is one, too, and so is each new floating-point tensor. All other tensors,
    index sets above all, are real. The shapes of each operation's results are found once, on PyTorch's meta device, and
    remembered.

    Args:
        rules: as for ``MacCounter``.

    Attributes:
        live: the bytes of all storages allocated inside ``with``, ``now`` and at the ``peak``.
        peaks: operation → the most bytes alive at once after a call of it.

    Raises:
        NotImplementedError: an operation whose result depends on numbers that are not there.
    """

    def __init__(self, rules: Mapping[str, Rule] | None = None) -> None:
        super().__init__(rules)
        self.live = LiveBytes()
        self.peaks: dict[str, int] = {}
        self._forms: dict[Any, _Form] = {}
        self._results: dict[Any, tuple[Any, int]] = {}
        self._macs = 0

    @property
    def macs(self) -> int:
        """The multiply-adds of all contractions so far."""
        return self._macs + self.by_op.total()

    def begin(self, live: LiveBytes) -> None:
        """Count bytes from 0 on, in ``live``; what was allocated before no longer counts."""
        self.live, self.peaks = live, {}

    def without_numbers(self, value: Tensor) -> Tensor:
        """Return a tensor of the form of ``value`` without numbers. Its memory does not count."""
        storage = _Storage(None, value.untyped_storage().nbytes())
        return ShapeTensor.make(self._form(value), value.device, storage)

    def remove_numbers(self, module: nn.Module) -> None:
        """Put tensors without numbers in place of the parameters and floating-point buffers of a ``module``."""
        made: dict[int, Tensor] = {}  # a tensor that two modules share stays shared
        with self:
            tables: list[dict[str, Any]] = [t for part in module.modules() for t in (part._parameters, part._buffers)]
            for held in tables:
                for name, value in held.items():
                    if value is None or not value.is_floating_point():
                        continue
                    if id(value) not in made:
                        empty = self.without_numbers(value.detach())
                        parameter = isinstance(value, nn.Parameter)
                        made[id(value)] = nn.Parameter(empty, value.requires_grad) if parameter else empty
                    held[name] = made[id(value)]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if ShapeTensor in types:
            return self._dry(func, args, kwargs)
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point and next(_tensors(args), None) is None:  # a new tensor
            return self._dry(func, args, kwargs)
        self.live.takes(args)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        self.live.makes(out)
        return out

    # ------------------------------------------------------------------ operations without numbers

    def _dry(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = _name(func)
        if name in _READ:
            return _READ[name](args)
        if name in _INDEXED:
            args = (args[0], [i for index in args[1] for i in _as_numbers(index)], *args[2:])
        tensors: list[Tensor] = []
        key = func, self._key(args, tensors), self._key(kwargs.items(), tensors) if kwargs else None
        found = self._results.get(key)
        if found is None:
            found = self._results[key] = self._find(func, name, args, kwargs, tensors)
        results, macs = found
        if macs:
            self._macs += macs
        made = self._made(results, tensors, kwargs)
        if self.live.now > self.peaks.get(name, 0):
            self.peaks[name] = self.live.now
        return made

    def _key(self, values: Any, tensors: list[Tensor]) -> tuple[Any, ...]:
        """What the form of an operation's results depends on; tensors among ``values`` are appended to ``tensors``."""
        key: list[Any] = []
        for value in values:
            kind = type(value)
            if kind is ShapeTensor:
                tensors.append(value)
                key.append(value.form)
            elif kind is tuple or kind is list:
                key.append(self._key(value, tensors))
            elif kind is float or kind is torch.Generator:  # no form depends on it
                key.append(kind)
            elif isinstance(value, Tensor):
                self.live.takes((value,))
                tensors.append(value)
                key.append(self._form(value))
            else:
                key.append(value)
        return tuple(key)

    def _form(self, value: Tensor, truth: bool = False) -> _Form:
        parts: Any = (value.shape, value.stride(), value.storage_offset(), value.dtype, truth)
        found = self._forms.get(parts)
        if found is None:
            found = self._forms[parts] = _Form(*parts)
        return found

    def _find(self, func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[Any, int]:
        """The form of an operation's results, and its multiply-adds."""
        self._check_known(func)
        if "out" in kwargs:
            place = next(i for i, tensor in enumerate(tensors) if tensor is kwargs["out"])
            return place, self._counted(func, args, kwargs, kwargs["out"])
        if tensors and isinstance(args[0], Tensor) and _is_in_place(func):
            return 0, self._counted(func, args, kwargs, args[0])
        if tensors and torch.Tag.pointwise in func.tags and not kwargs.keys() - _SCALARS:
            out, truth = _elementwise(func, args, kwargs)
            form = self._form(out, truth)
            return (form, None, out.untyped_storage().nbytes()), self._counted(func, args, kwargs, out)
        truth = all(t.form.truth for t in tensors if isinstance(t, ShapeTensor) and t.dtype == torch.bool)
        metas = [(t.form if isinstance(t, ShapeTensor) else self._form(t)).meta() for t in tensors]
        left = iter(metas)

        def on_meta(value: Any) -> Any:
            if isinstance(value, Tensor):
                return next(left)
            if isinstance(value, list | tuple):
                return type(value)(on_meta(part) for part in value)
            if isinstance(value, torch.device):
                return _META
            return None if isinstance(value, torch.Generator) else value

        meta_args = on_meta(args)
        meta_kwargs = {key: on_meta(value) for key, value in kwargs.items()}
        if not tensors:
            meta_kwargs["device"] = _META
        places = {meta.untyped_storage()._cdata: i for i, meta in enumerate(metas)}

        def form_of(value: Any) -> Any:
            if isinstance(value, Tensor):
                for i, meta in enumerate(metas):
                    if value is meta:
                        return i
                form = self._form(value, truth and value.dtype == torch.bool)
                storage = value.untyped_storage()
                return form, places.get(storage._cdata), storage.nbytes()
            return [form_of(part) for part in value] if isinstance(value, list | tuple) else None

        find = _FORMS.get(name, func)
        out = find(*meta_args, **meta_kwargs)
        return form_of(out), self._counted(func, meta_args, meta_kwargs, out)

    def _counted(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        before = self.by_op.total()
        self._count(func, args, kwargs, out)
        macs = self.by_op.total() - before
        self.by_op[_classify(func)[0]] -= macs
        return macs

    def _made(self, results: Any, tensors: list[Tensor], kwargs: Any) -> Any:
        kind = type(results)
        if kind is int:
            return tensors[results]
        if kind is tuple:
            form, place, n_bytes = results
            base = tensors[place or 0] if tensors else None
            device = torch.device(kwargs.get("device") or "cpu") if base is None else base.device
            if place is None:
                return ShapeTensor.make(form, device, _Storage(self.live, n_bytes))
            shared = base.storage_ if isinstance(base, ShapeTensor) else _Storage(None, 0)
            return ShapeTensor.make(form, device, shared)
        return results and [self._made(part, tensors, kwargs) for part in results]


@cache
def _name(func: Any) -> str:
    return str(func.overloadpacket)


_SCALARS = {"alpha", "value", "beta"}


def _is_in_place(func: Any) -> bool:
    """Whether an operation returns its first argument, with other numbers in the same form."""
    first = func._schema.arguments[0].alias_info
    returned = [value.alias_info for value in func._schema.returns]
    written = first is not None and first.is_write and len(returned) == 1 and returned[0] is not None
    return written and torch.Tag.inplace_view not in func.tags


def _elementwise(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, bool]:
    """The form of an elementwise operation's result, on the meta device, and its value if it is Boolean: dtype, order
    of strides and value as of zeros with 1 or 2 entries per dimension."""
    tensors = list(_tensors(args))

    def small(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [min(size, 2) for size in value.shape]
        strides, step = [0] * value.ndim, 1
        for dim in sorted(range(value.ndim), key=lambda dim: (value.stride(dim), -dim)):
            if value.stride(dim) or sizes[dim] < 2:
                strides[dim] = step
                step *= max(sizes[dim], 1)
        filling = value.form.truth if isinstance(value, ShapeTensor) else False
        return torch.full((max(step, 1),), filling, dtype=value.dtype).as_strided(sizes, strides)

    out = func(*[small(arg) for arg in args], **kwargs)
    shape = torch.broadcast_shapes(*[tensor.shape for tensor in tensors])
    strides, step = [0] * len(shape), 1
    for dim in sorted(range(len(shape)), key=lambda dim: (out.stride(dim), -dim)):
        strides[dim] = step
        step *= max(shape[dim], 1)
    truth = out.dtype == torch.bool and bool(out.all())
    return torch.empty_strided(shape, strides, dtype=out.dtype, device=_META), truth


_INDEXED = {"aten.index", "aten.index_put", "aten.index_put_", "aten._unsafe_index", "aten._index_put_impl_"}


def _as_numbers(index: Tensor | None) -> Iterator[Tensor | None]:
    """A real Boolean mask as index tensors, whose shape is known."""
    if index is None or isinstance(index, ShapeTensor) or index.dtype != torch.bool:
        yield index
    else:
        yield from index.nonzero(as_tuple=True)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _scalar(args: Any) -> Any:
    value = args[0]
    return value.form.truth if value.dtype == torch.bool else 0.0 if value.dtype.is_floating_point else 0


def _stacked(tensors: list[Tensor], dim: int = 0) -> Tensor:
    shape = list(tensors[0].shape)
    shape.insert(dim + len(shape) + 1 if dim < 0 else dim, len(tensors))
    return tensors[0].new_empty(shape)


def _joined(tensors: list[Tensor], dim: int = 0) -> Tensor:
    parts = [tensor for tensor in tensors if tensor.shape != (0,)] or tensors
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    dtype = reduce(torch.promote_types, [part.dtype for part in tensors])
    return parts[0].new_empty(shape, dtype=dtype)


def _new(size: list[int], dtype: torch.dtype, **_: Any) -> Tensor:
    return torch.empty(size, dtype=dtype, device=_META)


# PyTorch finds these forms by code whose import alone takes a second.
_FORMS: dict[str, Callable[..., Tensor]] = {
    "aten._softmax_backward_data": lambda gradient, *_: torch.empty_like(gradient),
    "aten.addmm": lambda bias, first, second, **_: first @ second,
    "aten.baddbmm": lambda bias, first, second, **_: first @ second,
    "aten.all": lambda value, *where: value.sum(*where, dtype=torch.bool),
    "aten.any": lambda value, *where: value.sum(*where, dtype=torch.bool),
    "aten.cat": _joined,
    "aten.count_nonzero": lambda value, *where: value.sum(*where, dtype=torch.int64),
    "aten.dot": lambda first, second: first.new_empty(()),
    "aten.eye": lambda *sizes, **options: torch.empty(sizes[0], sizes[-1], **options),
    "aten.mean": lambda value, *where, **options: value.sum(*where, **options),
    "aten.rand": _new,
    "aten.randn": _new,
    "aten.stack": _stacked,
}


def _is_same(args: Any) -> bool:
    """Whether two tensors without numbers would be one and the same."""
    first, second = args
    return first.storage_ is second.storage_ and first.form is second.form


_READ: dict[str, Callable[[Any], Any]] = {
    "aten._local_scalar_dense": _scalar,
    "aten.equal": lambda args: True,
    "aten.is_set_to": _is_same,
}
