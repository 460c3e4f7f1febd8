"""How stable are the gradients? Left open by the earlier work: products of Jacobians over the span, and rounding.

**How it is measured.** A byte model (256 inputs and outputs; as in *gradient-equivalence*) reads real text, fresh, and
once more after some hundred updates by Adam. At each step the dynamics Jacobian is taken in full, and of the products
over the last n steps, n = 1 … 256, the spectral norm and the condition number in float64. Then the learner runs over
the same text in float32 and in float64, the float32 run making the choices of the other: the relative error of its
gradient and of the largest influence is reported over the number of steps. The float64 gradient over the first steps is
compared with BPTT's by the oracle, to 1e-10, or the check fails.

*Holds* means: no product's norm exceeds 100, so nothing explodes; and after the whole span the float32 gradient is
within 10⁻³ of the float64 one.

**Why that is fair.** Choices are replayed for float32, since a near tie that falls otherwise is another function, not
an error of rounding. The condition number is reported (nothing where it is beyond 10¹⁵ and float64 cannot), but no bar
is set: the engine never inverts a product, and a gated write that forgets a slot makes it infinite by design.

**What it leaves open.** One cell, one text, a few updates; the quick run has `d_model` 8, the full one 32. A cell whose
Jacobians grow makes every exact method's gradients grow, BPTT's too.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import oracles
from rtrl.cells.moe import RecurrentMoE
from rtrl.cells.protocol import Sparsity
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.tasks import ByteStream
from rtrl.verification.claim import Judgement, Measurements, Settings, Shown, claim
from rtrl.verification.harness.compare import compare_gradients
from rtrl.verification.harness.problems import byte_model, check_gradients
from rtrl.verification.show import plot, table

NORM, ROUNDING = 100.0, 1e-3
CLAIMED_WIDTH = 32
TINY = 1e-15
"""A singular value below this share of the largest one is rounding: the condition number is beyond float64."""


@dataclass(frozen=True, slots=True)
class Config:
    """The span, how many updates the trained model has had, the steps after which errors are taken, the learner's
    sizes, the model's widths, and the checkpoint at which the gradient is compared with the oracle's."""

    span: int = 256
    updates: int = 40
    checkpoints: tuple[int, ...] = (4, 16, 64, 256)
    block: int = 16
    window: int = 16
    rate: float = 5e-3
    d_model: int = 8
    hidden: int = 8
    compared: int = 64


@dataclass(frozen=True, slots=True)
class Conditioned:
    """Of one model: by number of steps the largest spectral norm and the median condition number of products, and by
    checkpoint the relative float32 errors of gradient and influence."""

    norms: dict[int, float]
    conditions: dict[int, float]
    gradient: dict[int, float]
    influence: dict[int, float]


@dataclass(kw_only=True)
class Models(Measurements):
    """The fresh and the trained model, by name; P."""

    config: Config
    models: dict[str, Conditioned]
    parameters: int = 0

    @property
    def norms(self) -> dict[str, float]:
        """Model → the largest norm of a product."""
        return {name: max(model.norms.values()) for name, model in self.models.items()}

    @property
    def errors(self) -> dict[str, float]:
        """Model → the error of the float32 gradient after the whole span."""
        return {name: model.gradient[max(model.gradient)] for name, model in self.models.items()}


def jacobians(cell: RecurrentMoE, text: Tensor) -> tuple[list[Tensor], list[Sparsity]]:
    """Return the dynamics Jacobians (H, H) of one sample, and the choices made."""
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
    """Return the largest spectral norm and the median condition number of products over consecutive segments."""
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
    cell: RecurrentMoE, text: Tensor, targets: Tensor, choices: list[Sparsity], config: Config
) -> dict[int, tuple[dict[str, Tensor | None], Tensor]]:
    """Return the gradient and the influence of the candidate's weight at each checkpoint."""
    cell = copy.deepcopy(cell)
    cell.zero_grad()
    learner = BlockRTRL(cell, 1, block=config.block, window=config.window, audit="off")  # the oracle judges it
    found = {}
    for t, (x, target, used) in enumerate(zip(text, targets, choices, strict=True), 1):
        learner.backward(F.cross_entropy(learner.step(x, replay=used), target))
        if t in config.checkpoints:
            learner.sync()
            gradient = {n: None if p.grad is None else p.grad.clone() for n, p in cell.named_parameters()}
            found[t] = gradient, learner.influence("candidate.weight")
    return found


def measure_model(cell: RecurrentMoE, text: Tensor, targets: Tensor, config: Config) -> tuple[Conditioned, list[str]]:
    """Measure one model; also return the failure, if the learner's gradient is not the oracle's."""
    steps, choices = jacobians(cell, text)
    pairs = {n: products(steps, n) for n in [2**i for i in range(int(math.log2(len(text))) + 1)]}
    exact = _run(cell, text, targets, choices, config)
    rounded = _run(copy.deepcopy(cell).float(), text.float(), targets, choices, config)
    gradient, influence = {}, {}
    for t, (g, s) in exact.items():
        g32, s32 = rounded[t]
        gradient[t] = compare_gradients(g32, {n: v for n, v in g.items() if v is not None}, (), ROUNDING).error
        influence[t] = float((s32.double() - s).abs().max() / s.abs().max())
    norms, conditions = ({n: pair[i] for n, pair in pairs.items()} for i in (0, 1))
    first, answers = text[: config.compared], targets[: config.compared]
    reference = oracles.bptt(cell, first, lambda t, y: F.cross_entropy(y, answers[t]))
    _, failures = check_gradients(exact[config.compared][0], reference, f"the gradient of {config.compared} steps")
    return Conditioned(norms, conditions, gradient, influence), failures


def train(cell: RecurrentMoE, text: Tensor, targets: Tensor, config: Config) -> None:
    """Make some updates by Adam, with exact gradients after every block."""
    learner = BlockRTRL(cell, 1, block=config.block, window=config.window)
    optimizer = torch.optim.Adam(cell.parameters(), lr=config.rate)
    for t in range(config.updates * config.block):
        learner.backward(F.cross_entropy(learner.step(text[t % len(text)]), targets[t % len(text)]))
        if learner.at_block_end:
            learner.sync()
            optimizer.step()
            optimizer.zero_grad()


def verdict(m: Models) -> Judgement:
    """Judge both models; say so where they are smaller than the claim's."""
    found = judge(m.norms, m.errors)
    if m.config.d_model >= CLAIMED_WIDTH:
        return found
    return Judgement.not_at_claimed_size(
        f"d_model {m.config.d_model}, {m.config.span} steps: {found.condition or 'both models keep within both bounds'}"
    )


def judge(norms: dict[str, float], errors: dict[str, float]) -> Judgement:
    """Judge the largest norm and the float32 error at the end, by model; NaN does not hold."""
    bad = [name for name in norms if not (norms[name] <= NORM and errors[name] <= ROUNDING)]
    if not bad:
        return Judgement.holds()
    listed = "; ".join(f"{name}: norm {norms[name]:.3g}, float32 error {errors[name]:.1e}" for name in bad)
    if len(bad) == len(norms):
        return Judgement.does_not_hold(listed)
    return Judgement.holds_when(f"{listed}; the other model keeps within both")


def show(m: Models) -> Shown:
    """Show norms, condition numbers and errors by number of steps."""

    def by_model(attribute: str) -> dict[str, dict[int, float]]:
        return {name: getattr(model, attribute) for name, model in m.models.items()}

    def named(pattern: str, attribute: str) -> dict[str, dict[int, float]]:
        return {pattern.format(name): column for name, column in by_model(attribute).items()}

    in_product, last = "steps in the product", max(m.models["fresh"].gradient)
    errors = {**named("gradient, {}", "gradient"), **named("influence, {}", "influence")}
    products = {**named("norm, {}", "norms"), **named("condition, {} (median)", "conditions")}
    norm, condition = "Largest spectral norm of Jacobian products", "Condition number of Jacobian products, median"
    return Shown(
        f"norms of products {m.norms['fresh']:.3g} at most fresh, {m.norms['trained']:.3g} trained; float32 gradient "
        f"off by {m.errors['fresh']:.1e} and {m.errors['trained']:.1e} after {last} steps",
        [
            table("Products of Jacobians over n steps", "n", products),
            table("Relative error of float32", "steps", errors),
        ],
        [
            plot(norm, in_product, "norm", by_model("norms"), log="xy"),
            plot(condition, in_product, "condition number", by_model("conditions"), log="xy"),
            plot("Error of float32 against float64", "steps", "relative error", errors, log="xy"),
        ],
        model=(
            f"RecurrentMoE, d_model {m.config.d_model}, P = {m.parameters:,}, H = {4 * m.config.d_model}, T = "
            f"{m.config.span:,}, one seed"
        ),
    )


@claim(
    "conditioning",
    claimed="gradients are stable over the span (left open)",
    threshold=f"norm ≤ {NORM:g}, error ≤ {ROUNDING:g}",
    quick=Config(),
    full=Config(
        span=512, updates=100, checkpoints=(4, 16, 64, 256, 512), d_model=CLAIMED_WIDTH, hidden=2 * CLAIMED_WIDTH,
    ),
    small=Config(16, 1, (8, 16), 4, 2, compared=16),
    verdict=verdict,
    show=show,
    void="the gradients that were compared are not those of BPTT",
    noticed_breaks=("truncate", "forget-dormant-losses", "reverse-products", "no-catch-up", "off-by-one"),
)  # fmt: skip
def measure(config: Config, settings: Settings) -> Models:
    """Measure a fresh model and a trained one."""
    text, targets = ByteStream(None, 1, steps=config.span, dtype=torch.float64).first(config.span)
    cell = byte_model(settings.seed, d_model=config.d_model, hidden=config.hidden)
    m = Models(config=config, models={}, parameters=sum(p.numel() for p in cell.parameters()))
    for name in ("fresh", "trained"):
        if name == "trained":
            settings.progress("training")
            train(cell, text, targets, config)
        settings.progress(f"a {name} model")
        m.models[name], failures = measure_model(cell, text, targets, config)
        m.failures += [f"a {name} model: {failure}" for failure in failures]
    return m
