"""A tanh RNN and a GRU in jitted JAX, as one would write it: RTRL and BPTT as a plain ``lax.scan``.

The state, the influence as a pytree with a leaf a parameter, and the gradient are carried; ``jax.jacrev`` gives the
dynamics Jacobian and the immediate one. Importing this module does not import JAX; ``available`` says why not.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from problems import Problem
from torch import Tensor

available = importlib.util.find_spec("jax") is not None
REASON = "JAX is not installed: pip install 'rtrl[bench]'"


def float64() -> contextlib.AbstractContextManager[Any]:
    """Inside, JAX computes in float64."""
    import jax

    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    from jax.experimental import enable_x64  # what it was called before

    return enable_x64()


def cell(theta: dict[str, Any], x: Any, h: Any) -> Any:
    """The equations of ``torch.nn.RNNCell`` or ``torch.nn.GRUCell``, for one sample."""
    import jax
    import jax.numpy as jnp

    from_x = theta["cell.weight_ih"] @ x + theta["cell.bias_ih"]
    from_h = theta["cell.weight_hh"] @ h + theta["cell.bias_hh"]
    if from_x.size == h.size:
        return jnp.tanh(from_x + from_h)
    (reset_x, update_x, new_x), (reset_h, update_h, new_h) = (jnp.split(part, 3) for part in (from_x, from_h))
    update = jax.nn.sigmoid(update_x + update_h)
    new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
    return (1 - update) * new + update * h


def loss(theta: dict[str, Any], x: Any, h: Any, target: Any) -> Any:
    return ((cell(theta, x, h) - target) ** 2).sum()


def rtrl(theta: dict[str, Any], h: Any, xs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
    """The last state, and dL/dθ by S ← J S + B and Σ (∂ℓ/∂θ + δ S)."""
    import jax
    import jax.numpy as jnp

    def step(carry: tuple[Any, Any, Any], now: tuple[Any, Any]) -> tuple[tuple[Any, Any, Any], None]:
        (h, influence, gradient), (x, target) = carry, now
        direct, adjoint = jax.grad(loss, (0, 2))(theta, x, h, target)
        immediate, dynamics = jax.jacrev(cell, (0, 2))(theta, x, h)
        gradient = jax.tree.map(lambda g, d, s: g + d + jnp.tensordot(adjoint, s, 1), gradient, direct, influence)
        influence = jax.tree.map(lambda s, b: jnp.tensordot(dynamics, s, 1) + b, influence, immediate)
        return (cell(theta, x, h), influence, gradient), None

    nothing = jax.tree.map(lambda p: jnp.zeros((h.size, *p.shape), p.dtype), theta)
    first = (h, nothing, jax.tree.map(jnp.zeros_like, theta))
    (h, _, gradient), _ = jax.lax.scan(step, first, (xs, targets))
    return h, gradient


def bptt(theta: dict[str, Any], h: Any, xs: Any, targets: Any) -> tuple[Any, dict[str, Any]]:
    """The last state, and dL/dθ by reverse differentiation of the whole scan."""
    import jax

    def total(theta: dict[str, Any]) -> tuple[Any, Any]:
        def step(h: Any, now: tuple[Any, Any]) -> tuple[Any, Any]:
            x, target = now
            return cell(theta, x, h), loss(theta, x, h, target)

        last, losses = jax.lax.scan(step, h, (xs, targets))
        return losses.sum(), last

    gradient, last = jax.grad(total, has_aux=True)(theta)
    return last, gradient


class Scan:
    """``rtrl`` or ``bptt`` over the first ``steps`` steps of a problem, compiled; each ``advance`` runs all of them."""

    def __init__(self, function: Callable[..., Any], problem: Problem, steps: int) -> None:
        import jax
        import jax.numpy as jnp

        def array(tensor: Tensor) -> Any:
            return jnp.asarray(tensor.detach().numpy())

        theta = {name: array(p) for name, p in problem.cell.named_parameters()}
        xs, targets = (array(values[:steps, 0]) for values in (problem.xs, problem.targets))
        assert len(xs) == steps
        self.steps, self._arguments = steps, (theta, jnp.zeros(problem.hidden, xs.dtype), xs, targets)
        self._function = jax.jit(function).lower(*self._arguments).compile()
        self._last: Any = None

    def advance(self) -> int:
        import jax

        self._last = jax.block_until_ready(self._function(*self._arguments))
        return self.steps

    def gradients(self) -> dict[str, Tensor]:
        """Of one run over the steps."""
        return {name: torch.from_numpy(np.array(value)) for name, value in self._last[1].items()}
