"""How stable are the gradients? Left open by the earlier work: products of Jacobians over the span, and rounding.

**How it is measured.** A byte model (256 inputs and outputs, H = 32; as in *gradient-equivalence*) reads real text,
fresh, and once more after some hundred updates by Adam. At each step the dynamics Jacobian is taken in full, and of
the products over the last n steps, n = 1 … 256, the spectral norm and the condition number in float64. Then the
learner runs over the same text in float32 and in float64, the float32 run making the choices of the other: the
relative error of its gradient and of the largest influence is told over the number of steps.

*Holds* means: no product's norm exceeds 100, so nothing explodes; and after the whole span the float32 gradient is
within 10⁻³ of the float64 one.

**Why that is fair.** Choices are laid down for float32, since a near tie that falls otherwise is another function,
not an error of rounding. The condition number is told (nothing where it is beyond 10¹⁵ and float64 cannot), but no
bar is set: the engine never inverts a product, and a gated write that forgets a slot makes it infinite by design.

**What it leaves open.** One cell, one text, a few updates. A cell whose Jacobians grow makes every exact method's
gradients grow, BPTT's too.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.tasks import ByteStream
from rtrl.verification.claim import Claim, Finding, Plot, Progress, Series, Settings, Table, Verdict
from rtrl.verification.harness.compare import compare_gradients
from rtrl.verification.harness.models import byte_model
from rtrl.verification.harness.threads import one_thread

NORM, ROUNDING = 100.0, 1e-3
TINY = 1e-15
"""A singular value below this share of the largest one is rounding: the condition number is beyond float64."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The span, how many updates the trained model has had, the moments at which errors are taken, and the learner's
    sizes."""

    span: int = 256
    updates: int = 60
    moments: tuple[int, ...] = (4, 16, 64, 256)
    block: int = 16
    window: int = 16
    rate: float = 5e-3


QUICK = Sizes()
FULL = Sizes(span=2048, updates=1000, moments=(4, 16, 64, 256, 1024, 2048))


@dataclass(frozen=True, slots=True)
class Conditioned:
    """Of one model: by number of steps the largest spectral norm and the median condition number of products, and by
    moment the relative float32 errors of gradient and influence."""

    norms: dict[int, float]
    conditions: dict[int, float]
    gradient: dict[int, float]
    influence: dict[int, float]


def jacobians(cell: RecurrentMoE, text: Tensor) -> tuple[list[Tensor], list[Sparsity]]:
    """The dynamics Jacobians (H, H) of one sample, and the choices made."""
    h, found, choices = cell.init_state(1), [], []
    for x in text:
        with torch.no_grad():
            _, h_next, used = cell(x, h)

        def step(flat: Tensor, x: Tensor = x, used: Sparsity = used, shape: torch.Size = h.shape) -> Tensor:
            after: Tensor = cell(x, flat.view(shape), used)[1].flatten()
            return after

        found.append(torch.func.jacrev(step)(h.flatten()).detach())
        choices.append(used)
        h = h_next
    return found, choices


def products(steps: list[Tensor], length: int) -> tuple[float, float]:
    """The largest spectral norm and the median condition number of products over consecutive stretches of a length."""
    norms, conditions = [], []
    for start in range(0, len(steps) - length + 1, length):
        product = steps[start]
        for jacobian in steps[start + 1 : start + length]:
            product = jacobian @ product
        values = torch.linalg.svdvals(product)
        norms.append(float(values[0]))
        conditions.append(float(values[0] / values[-1]) if values[-1] > TINY * values[0] else math.inf)
    return max(norms), sorted(conditions)[len(conditions) // 2]


def _run(
    cell: RecurrentMoE, text: Tensor, targets: Tensor, choices: list[Sparsity], sizes: Sizes
) -> dict[int, tuple[dict[str, Tensor | None], Tensor]]:
    """Gradient and the influence of the candidate's weight, after each moment."""
    own = copy.deepcopy(cell)
    own.zero_grad()
    learner = BlockRTRL(own, 1, block=sizes.block, window=sizes.window)
    found = {}
    for t, (x, target, used) in enumerate(zip(text, targets, choices, strict=True), 1):
        learner.backward(F.cross_entropy(learner.step(x, replay=used), target))
        if t in sizes.moments:
            learner.sync()
            gradient = {n: None if p.grad is None else p.grad.clone() for n, p in own.named_parameters()}
            found[t] = gradient, learner.influence("candidate.weight")
    return found


def measured(cell: RecurrentMoE, text: Tensor, targets: Tensor, sizes: Sizes) -> Conditioned:
    """All of one model."""
    steps, choices = jacobians(cell, text)
    lengths = [2**i for i in range(int(math.log2(len(text))) + 1)]
    pairs = {n: products(steps, n) for n in lengths}
    exact = _run(cell, text, targets, choices, sizes)
    rounded = _run(copy.deepcopy(cell).float(), text.float(), targets, choices, sizes)
    gradient, influence = {}, {}
    for t, (g, s) in exact.items():
        g32, s32 = rounded[t]
        gradient[t] = compare_gradients(g32, {n: v for n, v in g.items() if v is not None}, (), ROUNDING).error
        influence[t] = float((s32.double() - s).abs().max() / s.abs().max())
    return Conditioned(
        {n: a for n, (a, _) in pairs.items()}, {n: b for n, (_, b) in pairs.items()}, gradient, influence
    )


def train(cell: RecurrentMoE, text: Tensor, targets: Tensor, sizes: Sizes) -> None:
    """Some updates by Adam, exact gradients after every block."""
    learner = BlockRTRL(cell, 1, block=sizes.block, window=sizes.window)
    optimizer = torch.optim.Adam(cell.parameters(), lr=sizes.rate)
    for t in range(sizes.updates * sizes.block):
        learner.backward(F.cross_entropy(learner.step(text[t % len(text)]), targets[t % len(text)]))
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()


def judge(norms: dict[str, float], errors: dict[str, float]) -> tuple[Verdict, str]:
    """The verdict from the largest norm and the float32 error at the end, by model; NaN does not hold."""
    bad = [name for name in norms if not (norms[name] <= NORM and errors[name] <= ROUNDING)]
    if not bad:
        return "holds", ""
    told = "; ".join(f"{name}: norm {norms[name]:.3g}, float32 error {errors[name]:.1e}" for name in bad)
    return ("does not hold" if len(bad) == len(norms) else "holds when"), told + (
        "" if len(bad) == len(norms) else "; the other model keeps within both"
    )


def measure(settings: Settings, progress: Progress, sizes: Sizes | None = None) -> Finding:
    """Both models; ``sizes`` to run less."""
    with one_thread():
        return _measure(settings, progress, sizes or (FULL if settings.full else QUICK))


def _measure(settings: Settings, progress: Progress, sizes: Sizes) -> Finding:
    sizes = replace(sizes, moments=tuple(t for t in sizes.moments if t <= sizes.span))
    stream = ByteStream(None, 1, steps=sizes.span, dtype=torch.float64)
    text, targets = stream.first(sizes.span)
    cell = byte_model(settings.seed, torch.device("cpu"))
    progress("a fresh model", 0, 3)
    found = {"fresh": measured(cell, text, targets, sizes)}
    progress("training", 1, 3)
    train(cell, text, targets, sizes)
    progress("a trained model", 2, 3)
    found["trained"] = measured(cell, text, targets, sizes)
    norms = {name: max(each.norms.values()) for name, each in found.items()}
    errors = {name: each.gradient[max(each.gradient)] for name, each in found.items()}
    verdict, condition = judge(norms, errors)
    lengths = sorted(found["fresh"].norms)
    at, moments = [float(n) for n in lengths], [float(t) for t in sizes.moments]
    return Finding(
        f"norms of products {norms['fresh']:.3g} at most fresh, {norms['trained']:.3g} trained; float32 gradient off "
        f"by {errors['fresh']:.1e} and {errors['trained']:.1e} after {max(sizes.moments)} steps",
        f"norm ≤ {NORM:g}, error ≤ {ROUNDING:g}",
        verdict,
        condition,
        [],
        [
            Table(
                "Products of Jacobians over n steps",
                ["n", "norm, fresh", "norm, trained", "condition, fresh (median)", "condition, trained (median)"],
                [[n, *(found[m].norms[n] for m in found), *(found[m].conditions[n] for m in found)] for n in lengths],
            ),
            Table(
                "Relative error of float32",
                ["steps", "gradient, fresh", "gradient, trained", "influence, fresh", "influence, trained"],
                [
                    [t, *(found[m].gradient[t] for m in found), *(found[m].influence[t] for m in found)]
                    for t in sizes.moments
                ],
            ),
        ],
        [
            Plot(
                "Largest spectral norm of Jacobian products",
                "steps in the product",
                "norm",
                [Series(name, at, list(each.norms.values())) for name, each in found.items()],
                log_x=True,
                log_y=True,
            ),
            Plot(
                "Condition number of Jacobian products, median",
                "steps in the product",
                "condition number",
                [Series(name, at, list(each.conditions.values())) for name, each in found.items()],
                log_x=True,
                log_y=True,
            ),
            Plot(
                "Error of float32 against float64",
                "steps",
                "relative error",
                [Series(f"gradient, {name}", moments, list(each.gradient.values())) for name, each in found.items()]
                + [
                    Series(f"influence, {name}", moments, list(each.influence.values())) for name, each in found.items()
                ],
                log_x=True,
                log_y=True,
            ),
        ],
        {"norms": norms, "errors": errors},
    )


CLAIM = Claim("conditioning", "gradients are stable over the span (left open)", measure)
