"""Sparse updates were said to be 2.72 × faster than full updates on a mixture with d_model 64, 8 slots, 16 experts.

**How it is measured.** Three learners take the same 50 steps (16 in the quick form) of the same cell (config *speed*:
H = 512, 330 thousand parameters), one step at a time:

- *sparse*: ``BlockRTRL(block=1, window=32)`` with what the cell declares: two of eight slots, two of sixteen experts;
- *lazy=False*: the same sparse Jacobians, but every expert is advanced at every step;
- *full*: the same learner on the same cell with nothing declared, which is textbook RTRL: the whole influence through
  the whole Jacobian, H²·P multiply-adds a step, and that count is checked.

First the gradients of all three are compared with BPTT, exactly (float64, 1e-10) on a sibling with smaller slots, and
once more roughly in float32 at the size that is counted; one that differs voids the claim. Then multiply-adds are
counted as they are dispatched, and the sides are timed in turns in one process on one thread; the median of the
ratios of neighbours stands beside the count. The verdict rests on the counts.

**Why that is fair.** “Full updates” can mean two things, and both are reported: full RTRL, and merely not letting
experts sleep. All sides are the same code, so that nothing but sparsity differs, and blocks, which would help the
sparse side more, are left out of the verdict (a row of the full form shows them).

**What it leaves open.** The stream is drawn at random and the cell not trained; a trained router may use few experts
and let the others sleep for longer. How the second ratio depends on the number of experts is counted at a small
d_model.
"""

from rtrl.verification.claim import Claim, Finding, Progress, Settings
from rtrl.verification.harness import speed
from rtrl.verification.harness.problems import SPEED

CLAIMED = 2.72
QUICK = speed.Sizes(SPEED, steps=16, chunk=2, experts=(16, 128), sleep_steps=48, rounds=2)
FULL = speed.Sizes(SPEED, steps=50, chunk=16, rounds=7, experts=(16, 32, 64, 128, 256), sleep_steps=384)


def measure(settings: Settings, progress: Progress, sizes: speed.Sizes | None = None) -> Finding:
    """The ratios; ``sizes`` to run less."""
    return speed.measure(sizes or (FULL if settings.full else QUICK), CLAIMED, settings, progress)


CLAIM = Claim("anbn-speed", "2.72 × faster than full updates (d_model 64, 8 slots, 16 experts, 50 steps)", measure)
