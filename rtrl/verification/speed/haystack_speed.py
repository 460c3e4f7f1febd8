"""Sparse updates were said to be 1.51 × faster than full updates on the mixture of the haystack task.

**How it is measured.** As *anbn-speed*, with config *haystack*: d_model 32, 4 slots, 8 experts, H = 128. Three
learners take the same steps one at a time: sparse, ``lazy=False`` (no expert sleeps), and full RTRL (the same learner
with nothing declared). Their gradients are compared with BPTT before anything is counted; the verdict rests on
multiply-adds, with times, taken in turns on one thread, beside them.

**Why that is fair.** Both meanings of “full updates” are reported, and all sides are the same code.

**What it leaves open.** Half of the slots and a quarter of the experts are used at every step: there is little to
save here, and on so small a cell a step's time is mostly what is launched, which sparsity does not lessen.
"""

from rtrl.verification.claim import Claim, Finding, Progress, Settings
from rtrl.verification.harness import speed
from rtrl.verification.harness.problems import HAYSTACK

CLAIMED = 1.51
QUICK = speed.Sizes(HAYSTACK, steps=16, chunk=4, experts=(8, 64), sleep_steps=48)
FULL = speed.Sizes(HAYSTACK, steps=128, chunk=16, rounds=7, experts=(8, 16, 32, 64, 128), sleep_steps=384)


def measure(settings: Settings, progress: Progress, sizes: speed.Sizes | None = None) -> Finding:
    """The ratios; ``sizes`` to run less."""
    return speed.measure(sizes or (FULL if settings.full else QUICK), CLAIMED, settings, progress)


CLAIM = Claim("haystack-speed", "1.51 × faster than full updates (d_model 32, 4 slots, 8 experts)", measure)
