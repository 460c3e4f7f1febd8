"""Make a ``LearnerSpec`` of a learner that is written as pure functions on arrays."""

import functools
import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rtrl._utils import pytrees
from rtrl.errors import ConfigError, LossError
from rtrl.testing.driver import trainable
from rtrl.testing.spec import LearnerSpec

Parameters = dict[str, Any]


@dataclass(frozen=True)
class _Arrays:
    """A library of arrays."""

    from_numpy: Callable[[np.ndarray[Any, Any]], Any]
    in_float64: Callable[[], AbstractContextManager[Any]]

    def of(self, value: Tensor) -> Any:
        """A tensor as an array that shares no memory with it."""
        return self.from_numpy(value.detach().cpu().numpy().copy())

    def tree(self, tree: Any) -> Any:
        """A tree of tensors as one of arrays."""
        return pytrees.map_tensors(self.of, tree)


@dataclass(frozen=True)
class _Functions:
    """The functions of a learner, as ``numpy_learner`` takes them."""

    arrays: _Arrays
    init: Callable[..., Any]
    step: Callable[..., Any]
    backward: Callable[..., Any]
    gradients: Callable[..., Any]
    reset: Callable[..., Any] | None
    parameters: Callable[[Parameters], Any]


class _PureLearner:
    """A learner that keeps the state of pure functions."""

    def __init__(self, functions: _Functions, cell: nn.Module, batch_size: int) -> None:
        self.cell, self._functions = cell, functions
        self._leaves: list[Tensor] = []
        if functions.reset is not None:
            self.reset = self._reset
        with functions.arrays.in_float64():
            self._state = functions.init(self._parameters(), batch_size)

    def _parameters(self) -> Any:
        """The parameters as they are now, in the form that the functions take."""
        arrays = {name: self._functions.arrays.of(p) for name, p in self.cell.named_parameters()}
        return self._functions.parameters(arrays)

    def step(self, x: Any) -> Any:
        """Take a step, and return y as leaves of PyTorch."""
        with self._functions.arrays.in_float64():
            found = self._functions.step(self._parameters(), self._state, self._functions.arrays.tree(x))
        if not isinstance(found, tuple) or len(found) != 2:
            raise ConfigError(f"step(params, state, x) must return (state, y), got {type(found).__name__}")
        self._state, y = found
        leaves, build = pytrees.flatten(y)
        tensors = [torch.from_numpy(np.array(leaf)) for leaf in leaves]
        self._leaves = [leaf.requires_grad_(leaf.is_floating_point()) for leaf in tensors]
        self._build = build
        return build(list(self._leaves))

    def backward(self, loss: Tensor) -> None:
        """Hand the derivatives of a loss of the last y to the learner's ``backward``."""
        asked = [leaf for leaf in self._leaves if leaf.requires_grad]
        try:
            found = torch.autograd.grad(loss, asked, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            raise LossError(f"the loss cannot be differentiated by the y of the last step: {error}") from error
        grads = iter(found)
        by_y = [next(grads) if leaf.requires_grad else torch.zeros_like(leaf) for leaf in self._leaves]
        with self._functions.arrays.in_float64():
            by_y_arrays = self._build([self._functions.arrays.of(grad) for grad in by_y])
            self._state = self._functions.backward(self._parameters(), self._state, by_y_arrays)

    def sync(self) -> None:
        """Add what the learner delivers to ``.grad``."""
        with self._functions.arrays.in_float64():
            found = self._functions.gradients(self._parameters(), self._state)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ConfigError(
                f"gradients(params, state) must return (gradients, state), got {type(found).__name__}; the state that "
                "it returns has delivered them"
            )
        delivered, self._state = found
        by_name = _flat(delivered)
        parameters = trainable(self.cell)
        frozen = {name for name, _ in self.cell.named_parameters()} - parameters.keys()
        unknown = sorted(by_name.keys() - parameters.keys() - frozen)
        if unknown:
            raise ConfigError(f"there is a gradient of {', '.join(unknown)}; the cell has {', '.join(parameters)}")
        for name, p in parameters.items():
            if name not in by_name:
                continue
            grad = torch.from_numpy(np.array(by_name[name]))
            if grad.shape != p.shape:
                raise ConfigError(f"the gradient of {name!r} must be {tuple(p.shape)}, got {tuple(grad.shape)}")
            grad = grad if grad.dtype == p.dtype else grad.to(p.dtype)
            p.grad = grad if p.grad is None else p.grad + grad

    def _reset(self, samples: Tensor) -> None:
        assert self._functions.reset is not None
        with self._functions.arrays.in_float64():
            chosen = self._functions.arrays.of(samples)
            self._state = self._functions.reset(self._parameters(), self._state, chosen)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings, their keys joined by dots."""
    if not isinstance(tree, Mapping):
        return {prefix.removesuffix("."): tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.")
    return found


def _as_they_are(parameters: Parameters) -> Any:
    return parameters


def numpy_learner(
    *,
    init: Callable[..., Any],
    step: Callable[..., Any],
    backward: Callable[..., Any],
    gradients: Callable[..., Any],
    reset: Callable[..., Any] | None = None,
    parameters: Callable[[Parameters], Any] = _as_they_are,
    **promises: Any,
) -> LearnerSpec:
    """Make a spec of a learner that is written as pure functions on NumPy's arrays.

    The checks run the learner beside a PyTorch cell that computes the same: ``streams=`` brings streams of it. Its
    parameters are the learner's. All arrays are in float64.

    Args:
        init: ``init(params, batch_size)`` returns the learner's first state, of any form: of the cell, the influence
            and the gradient so far.
        step: ``step(params, state, x)`` returns the next state and y, an array or a tree of arrays with the batch as
            dimension 0.
        backward: ``backward(params, state, dy)`` returns the state after a loss of the last y; ``dy`` has its
            derivatives by y, in y's form. A step may have no loss, or several.
        gradients: ``gradients(params, state)`` returns the gradients since the last call, and the state that has
            delivered them. Gradients are mappings from the cell's names of parameters to arrays; nested mappings are
            joined by dots: ``{"head": {"bias": …}}``.
        reset: ``reset(params, state, samples)`` returns the state after the chosen samples, Boolean (B,), have started
            again; without it, resets are not checked.
        parameters: turns the arrays by the cell's names into the ``params`` of the functions; by default they are
            this mapping.
        **promises: of the ``LearnerSpec``, such as ``streams``, ``law``, ``name`` and ``sparse``; cells that declare
            a ``Sparsity`` are left out by default.

    Returns:
        The spec, for ``check_learner`` and ``parametrize_with_checks``.

    Raises:
        ConfigError: an argument is not a function, or a promise is of the wrong kind.
    """
    return _spec(
        _Arrays(lambda array: array, nullcontext), init, step, backward, gradients, reset, parameters, promises
    )


def jax_learner(
    *,
    init: Callable[..., Any],
    step: Callable[..., Any],
    backward: Callable[..., Any],
    gradients: Callable[..., Any],
    reset: Callable[..., Any] | None = None,
    parameters: Callable[[Parameters], Any] = _as_they_are,
    **promises: Any,
) -> LearnerSpec:
    """Make a spec of a learner that is written as pure functions on JAX's arrays.

    The functions run in float64 under any setting of JAX, which is left as it is. They may be jitted.

    Args:
        init: as of ``numpy_learner``.
        step: as of ``numpy_learner``.
        backward: as of ``numpy_learner``.
        gradients: as of ``numpy_learner``.
        reset: as of ``numpy_learner``.
        parameters: as of ``numpy_learner``.
        **promises: as of ``numpy_learner``.

    Returns:
        The spec, for ``check_learner`` and ``parametrize_with_checks``.

    Raises:
        ConfigError: an argument is not a function, a promise is of the wrong kind, or JAX is not installed.
    """
    try:
        jax, jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
    except ImportError as error:
        raise ConfigError(f"jax_learner needs JAX ({error}); pip install 'rtrl[jax]'") from error
    old = None if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")
    arrays = _Arrays(jnp.asarray, functools.partial((old or jax).enable_x64, True))
    return _spec(arrays, init, step, backward, gradients, reset, parameters, promises)


def _spec(
    arrays: _Arrays, init: Any, step: Any, backward: Any, gradients: Any, reset: Any, parameters: Any, promises: Any
) -> LearnerSpec:
    needed = {"init": init, "step": step, "backward": backward, "gradients": gradients, "parameters": parameters}
    for what, function in needed.items() if reset is None else [*needed.items(), ("reset", reset)]:
        if not callable(function):
            raise ConfigError(f"{what} must be a function, got {type(function).__name__}")
    functions = _Functions(arrays, init, step, backward, gradients, reset, parameters)
    inner = getattr(step, "__wrapped__", step)
    options = {"name": f"learner of {getattr(inner, '__name__', type(inner).__name__)}", "sparse": False, **promises}
    return LearnerSpec(functools.partial(_PureLearner, functions), **options)
