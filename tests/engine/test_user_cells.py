"""Cells such as users bring: exact, or refused before anything changes.

The reference is the module itself, unrolled step by step under autograd: no line of the engine.
"""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from helpers.unitwise_cells import blocks_unit_by_unit
from helpers.user_cells import D_IN, EXACT, F64, HELD, REFUSED, H, of, tanh_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import rtrl
import rtrl.testing
from rtrl.errors import ConfigError, RTRLError, ShapeError
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, DiagonalRTRL, Learner, SnAp

B, STEPS, BLOCK = 2, 7, 3
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def stream(seed: int, steps: int) -> Tensor:
    return torch.randn(steps, B, D_IN, generator=torch.Generator().manual_seed(seed), dtype=F64)


def loss_of(t: int, y: Tensor) -> Tensor:
    return (y * torch.linspace(1.0, 2.0, y[0].numel(), dtype=y.dtype).reshape(y[0].shape)).sum() / (1 + t % 3)


def run(learner: Learner, xs: Tensor) -> None:
    for t, x in enumerate(xs):
        learner.backward(loss_of(t, learner.step(x)))
    learner.sync()


def unrolled(cell: nn.Module, xs: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient, and the influence on the last state, by plain autograd of the module."""
    parameters = {name: p for name, p in cell.named_parameters() if p.requires_grad}
    h, total = cell.init_state(B), torch.zeros((), dtype=F64)
    for t, x in enumerate(xs):
        y, h = cell(x, h)
        total = total + loss_of(t, y)

    def pull(head: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(head, list(parameters.values()), retain_graph=True, materialize_grads=True))

    rows = [[g.flatten() for g in pull(entry)] for entry in h.flatten()]
    influence = {
        name: torch.stack([row[i] for row in rows]).reshape(B, h[0].numel(), -1) for i, name in enumerate(parameters)
    }
    return dict(zip(parameters, pull(total), strict=True)), influence


def grads(cell: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in cell.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore::rtrl.errors.PerformanceWarning")
@pytest.mark.filterwarnings(
    "ignore:Using backward.. with create_graph=True",
    "ignore:Full backward hook is firing",
    "ignore:.torch.jit.script. is deprecated:DeprecationWarning",  # forward mode scripts its formulas
)
@pytest.mark.parametrize("name", EXACT)
def test_it_is_exact(name):
    torch.manual_seed(0)
    cell = EXACT[name]()
    for seed, steps, audit in ((1, STEPS, "off"), (2, BLOCK + 1, "first")):
        learner = rtrl.BlockRTRL(cell, B, block=BLOCK, audit=audit)
        xs = stream(seed, steps)
        with blocks_unit_by_unit() if audit == "off" else nullcontext():
            run(learner, xs)
        gradient, influence = unrolled(cell, xs)
        assert any(bool(g.any()) for g in gradient.values())
        for key, value in gradient.items():
            torch.testing.assert_close(cell.get_parameter(key).grad, value, **TIGHT, msg=lambda m, k=key: f"{k}: {m}")
            own = key.removeprefix("_orig_mod.")
            torch.testing.assert_close(
                learner.influence(own), influence[key], **TIGHT, msg=lambda m, k=key: f"influence of {k}: {m}"
            )
        with torch.no_grad():  # what was computed from the old values must not be used again
            for p in cell.parameters():
                p.mul_(0.8)
        cell.zero_grad()
    assert learner.audits.count == 2
    assert learner.audits.fallback is None  # exact at once, not in a slower way


@pytest.mark.filterwarnings("ignore::rtrl.errors.PerformanceWarning", "ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_changes_nothing(name):
    torch.manual_seed(0)
    case = REFUSED[name]
    assert case.error is not None
    cell = case.make()
    values = [p.detach().clone() for p in cell.parameters() if not nn.parameter.is_lazy(p)]
    state = torch.zeros(B, H, dtype=F64)
    learners: list[Learner] = []

    def use() -> None:
        learners.append(rtrl.BlockRTRL(cell, B, block=BLOCK, state=state, audit="first"))
        for t, x in enumerate(stream(1, STEPS)):
            before.append(learners[0].state)
            learners[0].backward(loss_of(t, learners[0].step(x)))

    before = [state]
    with pytest.raises(case.error, match=case.match):
        use()
    assert not grads(cell)
    assert all(torch.equal(p, value) for p, value in zip(cell.parameters(), values, strict=False))
    assert all(torch.equal(learner.state, before[-1]) for learner in learners)
    if case.error is ConfigError:
        with pytest.raises(ConfigError, match=case.match):
            BPTT(cell, B, state=state)
        with pytest.raises(ConfigError, match=case.match):
            rtrl.testing.check_cell(cell, [stream(1, 1)[0]], state=state)


class Scalar(nn.Module):
    """One number per sample: ``h' = step(cell, h) + x``."""

    def __init__(self, step: Callable[["Scalar", Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([[0.5]], dtype=F64))
        self.step, self.held = step, [self.a]

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = self.step(self, h) + x
        return h, h


def _relaxed(cell: Scalar, h: Tensor) -> Tensor:
    with torch.enable_grad():
        z = h if h.requires_grad else h.detach().requires_grad_()
        (slope,) = torch.autograd.grad(0.5 * F.linear(z, cell.a).square().sum(), z, create_graph=True)
        return h - slope


def _pruned_relu() -> nn.Module:
    cell = nn.RNNCell(1, 1, bias=False, nonlinearity="relu").double()
    nn.init.constant_(cell.weight_ih, 1.0)
    nn.init.constant_(cell.weight_hh, 0.5)
    prune.identity(cell, "weight_hh")
    return rtrl.from_torch(cell)


BY_HAND = {
    "in a list": (lambda: Scalar(lambda c, h: c.held[0] * h), "a", 3.0),
    "an inner gradient": (lambda: Scalar(_relaxed), "a", -3.5),
    "pruned": (_pruned_relu, "cell.weight_hh_orig", 3.0),
}


@pytest.mark.filterwarnings("ignore::rtrl.errors.PerformanceWarning")
@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("learner", ["BlockRTRL", "BPTT", "TBPTT", "DenseRTRL", "SnAp"])
def test_the_gradient_is_that_worked_out_by_hand(learner, name):
    """Three steps of x = 1, and the loss is the sum of all h."""
    make, parameter, expected = BY_HAND[name]
    cell = make()
    makers = {**EXACT_LEARNERS, "BlockRTRL": lambda cell, batch: rtrl.BlockRTRL(cell, batch, block=2)}
    tried = makers[learner](cell, 1)
    for _ in range(3):
        tried.backward(tried.step(torch.ones(1, 1, dtype=F64)).sum())
    tried.sync()
    grad = cell.get_parameter(parameter).grad
    torch.testing.assert_close(grad, torch.full_like(grad, expected), **TIGHT)


EXACT_LEARNERS = {
    "BPTT": BPTT,
    "TBPTT": lambda cell, batch: TBPTT(cell, batch, horizon=20),
    "DenseRTRL": DenseRTRL,
    "SnAp": lambda cell, batch: SnAp(cell, batch, order=4),
}
KINDS = [*HELD, "an inner gradient", "an inner torch.func.grad", "a cell, then pruned", "a scripted function"]


@pytest.mark.filterwarnings("ignore::rtrl.errors.PerformanceWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("learner", EXACT_LEARNERS)
def test_baselines_use_the_parameters_of_each_step(learner, kind):
    """Parameters change in mid-stream. The reference: a learner of each step's own block, which sees no change."""
    torch.manual_seed(0)
    cell = EXACT[kind]()
    rival = EXACT_LEARNERS[learner](cell, B)
    exact = rtrl.BlockRTRL(cell, B, block=1)
    total: dict[str, Tensor] = {}
    for t, x in enumerate(stream(1, 4)):
        exact.backward(loss_of(t, exact.step(x)))
        exact.sync()
        for name, grad in grads(cell).items():
            total[name] = total.get(name, 0) + grad
        cell.zero_grad()
        rival.backward(loss_of(t, rival.step(x)))
        with torch.no_grad():
            for p in cell.parameters():
                p.mul_(0.9)
    kept = {name: (p.detach().clone(), p._version) for name, p in cell.named_parameters()}
    rival.sync()
    assert all(torch.equal(p, kept[name][0]) and p._version == kept[name][1] for name, p in cell.named_parameters())
    torch.testing.assert_close(grads(cell), total, **TIGHT)


@pytest.mark.parametrize("make", [lambda c: RFLO(c, B, leak=0.5), lambda c: DiagonalRTRL(c, B), lambda c: UORO(c, B)])
def test_a_parameter_in_a_list_reaches_the_approximations(make):
    torch.manual_seed(0)
    found = []
    for kind in ("plain", "in a list"):
        torch.manual_seed(0)
        cell = EXACT[kind]() if kind in EXACT else of(tanh_of(lambda c, h: c.p * (h @ c.q)))()
        torch.manual_seed(1)
        run(make(cell), stream(1, 3))
        found.append(grads(cell))
    torch.testing.assert_close(*found, **TIGHT)


def test_autocast_around_a_step_is_refused_and_changes_nothing():
    learner = rtrl.BlockRTRL(of(tanh_of(lambda c, h: c.recur(h)))(), B, block=BLOCK)
    xs = stream(1, 2)
    run(learner, xs[:1])
    before, number = learner.state, learner.steps_taken
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ConfigError, match=r"not work under torch\.autocast"),
    ):
        learner.step(xs[1])
    with (
        nn.utils.parametrize.cached(),
        pytest.raises(ConfigError, match=r"not work under torch\.nn\.utils\.parametrize\.cached"),
    ):
        learner.step(xs[1])
    learner.step(xs[1])
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ConfigError, match=r"not work under torch\.autocast"),
    ):
        learner.sync()
    assert learner.steps_taken == number + 1
    assert not torch.equal(learner.state, before)


def test_after_a_conversion_of_the_cell_the_message_names_the_state():
    cell = of(tanh_of(lambda c, h: c.recur(h)))().float()
    learner = rtrl.BlockRTRL(cell, B, block=BLOCK)
    cell.double()
    for dtype in (torch.float32, F64):
        with pytest.raises(ShapeError, match=r"the learner's state is torch\.float32 .* parameters are torch\.float64"):
            learner.step(stream(1, 1)[0].to(dtype))
    assert learner.steps_taken == 0


def test_weights_that_a_hook_keeps_are_those_of_the_parameters():
    """The engine runs the cell at other values too; what hooks store then must not stay."""
    torch.manual_seed(0)
    cell = EXACT["a cell, then pruned"]()
    learner = rtrl.BlockRTRL(cell, B, block=BLOCK)
    run(learner, stream(1, STEPS))
    torch.testing.assert_close(cell.cell.weight_hh, cell.cell.weight_hh_orig * cell.cell.weight_hh_mask)


def test_what_runs_without_gradient_gets_zeros():
    cell = of(torch.no_grad()(tanh_of(lambda c, h: c.recur(h))))()
    run(rtrl.BlockRTRL(cell, B, block=BLOCK, audit="first"), stream(1, STEPS))
    assert grads(cell)
    assert not any(bool(grad.any()) for grad in grads(cell).values())


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["cell", "in place", "part"])
def test_a_compiled_cell_is_exact(how):
    torch.manual_seed(0)
    cell = of(tanh_of(lambda c, h: c.p * c.recur(h)))()
    given = cell
    if how == "cell":
        given = torch.compile(cell, backend="eager")
    elif how == "in place":
        cell.compile(backend="eager")
    else:
        cell.recur = torch.compile(cell.recur, backend="eager")
    learner = rtrl.BlockRTRL(given, B, block=BLOCK)
    run(learner, stream(1, STEPS))
    with torch.compiler.set_stance("force_eager"):
        gradient, _ = unrolled(cell, stream(1, STEPS))
    for name, value in gradient.items():
        torch.testing.assert_close(cell.get_parameter(name).grad, value, **TIGHT)


def test_errors_are_of_one_family():
    assert all(case.error is not None and issubclass(case.error, RTRLError) for case in REFUSED.values())
    assert len(EXACT) + len(REFUSED) >= 30
