"""RTRL of PyTorch's tanh and GRU cells in jitted JAX, as one would write it: a plain ``lax.scan``.

The state, the influence as a pytree with a leaf per parameter, and the gradient are carried; ``jax.jacrev`` gives the
dynamics Jacobian and the immediate one. Importing this module does not import JAX.
"""

import importlib
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

available = importlib.util.find_spec("jax") is not None


class JaxRTRL:
    """RTRL over a sequence of one sample with a squared error at every step, compiled at once.

    Args:
        parameters: those of ``nn.RNNCell`` or ``nn.GRUCell``, by their names there.
        xs: inputs (T, d_in).
        targets: of the state after each step, (T, H).
    """

    def __init__(self, parameters: Mapping[str, Tensor], xs: Tensor, targets: Tensor) -> None:
        self._jax, self._jnp = importlib.import_module("jax"), importlib.import_module("jax.numpy")
        theta = {name: self._jnp.asarray(p.detach().numpy()) for name, p in parameters.items()}
        inputs = (self._jnp.asarray(xs.numpy()), self._jnp.asarray(targets.numpy()))
        h = self._jnp.zeros(targets.shape[1], inputs[0].dtype)
        self.steps, self._arguments, self._gradient = len(xs), (theta, h, *inputs), None
        self._function = self._jax.jit(self._rtrl).lower(*self._arguments).compile()

    def advance(self) -> int:
        """Run over the sequence, from a state of zeros; return the number of steps."""
        self._gradient = self._jax.block_until_ready(self._function(*self._arguments))
        return self.steps

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of the last run."""
        assert self._gradient is not None
        return {name: torch.tensor(value.tolist()) for name, value in self._gradient.items()}

    def _cell(self, theta: Any, x: Any, h: Any) -> Any:
        """Return the next state."""
        jax, jnp = self._jax, self._jnp
        from_x = theta["weight_ih"] @ x + theta["bias_ih"]
        from_h = theta["weight_hh"] @ h + theta["bias_hh"]
        if from_x.size == h.size:
            return jnp.tanh(from_x + from_h)
        (reset_x, update_x, new_x), (reset_h, update_h, new_h) = (jnp.split(part, 3) for part in (from_x, from_h))
        update = jax.nn.sigmoid(update_x + update_h)
        new = jnp.tanh(new_x + jax.nn.sigmoid(reset_x + reset_h) * new_h)
        return (1 - update) * new + update * h

    def _loss(self, theta: Any, x: Any, h: Any, target: Any) -> Any:
        return ((self._cell(theta, x, h) - target) ** 2).sum()

    def _rtrl(self, theta: Any, h: Any, xs: Any, targets: Any) -> Any:
        """Return dL/dθ by S ← J S + B and Σ (∂ℓ/∂θ + δ S)."""
        jax, jnp = self._jax, self._jnp

        def step(carry: Any, now: Any) -> Any:
            (h, influence, gradient), (x, target) = carry, now
            direct, adjoint = jax.grad(self._loss, (0, 2))(theta, x, h, target)
            immediate, dynamics = jax.jacrev(self._cell, (0, 2))(theta, x, h)
            gradient = jax.tree.map(lambda g, d, s: g + d + jnp.tensordot(adjoint, s, 1), gradient, direct, influence)
            influence = jax.tree.map(lambda s, b: jnp.tensordot(dynamics, s, 1) + b, influence, immediate)
            return (self._cell(theta, x, h), influence, gradient), None

        nothing = jax.tree.map(lambda p: jnp.zeros((h.size, *p.shape), p.dtype), theta)
        (_, _, gradient), _ = jax.lax.scan(step, (h, nothing, jax.tree.map(jnp.zeros_like, theta)), (xs, targets))
        return gradient
