"""What full real-time recurrent learning costs: ``rtrl.learners.DenseRTRL``.

A step and sample, with P parameters, a state of H, and F, V and E the multiply-adds of one sample's forward pass and of
its backward passes from y and from one entry of the next state:

    F + V + H·E           the Jacobians, row by row
    H·P                   the gradient δ S
    H·H·P                 the influence J S + B

and the step itself is a forward pass of the batch. All of it is exact for steps of one kind.
"""

from rtrl.costs.profile import Profile
from rtrl.costs.result import Choice


def dense_rtrl(profile: Profile, steps: int) -> Choice:
    """``DenseRTRL``: what it holds does not grow with the number of steps.

    Held: B·H·P numbers of influence, the newest step, the gradient. At its peak the influence is there four times: the
    old one, its product with J, the immediate Jacobian, and the sum.
    """
    size, full = profile.batch_size, profile.state_size
    row, lone = full * profile.parameter_size, profile.lone
    linearising = lone.forward + lone.from_output + full * lone.from_entry
    macs = profile.forward(1) + profile.forward(steps) + steps * size * (linearising + row + full * row)
    influence = size * row * profile.itemsize
    step = profile.x_bytes + profile.state_bytes + profile.output_bytes + profile.replays * profile.choice_bytes
    gradient = profile.parameter_bytes if steps > 1 else 0
    held = {"influence": influence, "steps": step, "gradient": gradient, "state": profile.state_bytes}
    working = 3 * influence + size * full * full * profile.itemsize + profile.copy_bytes + 2 * profile.parameter_bytes
    return Choice("DenseRTRL", True, macs, steps, held, sum(held.values()) + working, estimated=not profile.steady)
