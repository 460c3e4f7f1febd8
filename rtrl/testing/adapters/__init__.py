"""Learners that are not written in PyTorch, for ``check_learner``: pure functions on NumPy's or JAX's arrays."""

from rtrl.testing.adapters.pure_functions import jax_learner, numpy_learner

__all__ = ["jax_learner", "numpy_learner"]
