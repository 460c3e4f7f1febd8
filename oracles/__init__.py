"""Reference gradients, each from its own derivation, naive enough to be read against the equations.

`bptt` unrolls autograd; `dense_rtrl` carries the full influence forward; `finite_difference` and
`directional_difference` run forward passes only; `ordered_product` multiplies Jacobians one by one;
`moe` is the mixture cell in NumPy loops. Nothing here imports the code that is checked against it.
"""

from oracles import moe
from oracles.bptt import bptt
from oracles.dense_rtrl import dense_rtrl
from oracles.finite_difference import directional_difference, finite_difference
from oracles.ordered_product import ordered_product

__all__ = ["bptt", "dense_rtrl", "directional_difference", "finite_difference", "moe", "ordered_product"]
