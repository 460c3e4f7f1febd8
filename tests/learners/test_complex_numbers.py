"""Complex states, parameters and outputs: exact, as pairs of real numbers, in every exact learner."""

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from helpers.complex_cells import ComplexCell, ComplexWeights, SparseComplex, complex_loss
from helpers.exact_learners import EXACT
from helpers.running import run
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.errors import AuditError, ConfigError, NonFiniteError, ShapeError
from rtrl.learners import UORO, DenseRTRL, DiagonalRTRL
from rtrl.testing import CheckFailed, alignment, check_cell

B, T = 2, 5
CELLS = {
    "complex": ComplexCell,
    "learned first state": functools.partial(ComplexCell, learned=True),
    "real state": ComplexWeights,
}


def inputs(steps: int = T) -> Tensor:
    return torch.randn(steps, B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))


def some_resets() -> Tensor:
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2, 1] = True
    return resets


def unrolled(cell: Any, xs: Tensor) -> dict[str, Tensor]:
    """PyTorch's own gradient, without an oracle."""
    h, total = cell.init_state(B), 0.0
    for t, x in enumerate(xs):
        y, h = cell(x, h)
        loss = complex_loss(t, y)
        total = total + (0.0 if loss is None else loss)
    return dict(zip(dict(cell.named_parameters()), torch.autograd.grad(total, list(cell.parameters())), strict=True))


def in_pairs(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.view_as_real(g) if g.is_complex() else g for name, g in gradients.items()}


@pytest.mark.parametrize("name", CELLS)
def test_oracles_agree_on_complex_numbers(name: str) -> None:
    cell, xs = CELLS[name](), inputs(3)
    expected = unrolled(cell, xs)
    assert any(g.is_complex() and bool((g.imag != 0).all()) for g in expected.values())
    assert_gradients_equal(in_pairs(oracles.bptt(cell, xs, complex_loss)), in_pairs(expected))
    assert_gradients_equal(in_pairs(oracles.dense_rtrl(cell, xs, complex_loss)), in_pairs(expected))
    differences = oracles.finite_difference(cell, xs, complex_loss)
    for key, value in expected.items():
        torch.testing.assert_close(differences[key], value, rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="complex step needs a real cell"):
        oracles.finite_difference(cell, xs, complex_loss, method="complex")


@pytest.mark.parametrize("learner", EXACT)
@pytest.mark.parametrize("name", CELLS)
def test_learners_are_exact_on_complex_numbers(name: str, learner: str) -> None:
    cell, xs, resets = CELLS[name](), inputs(), some_resets()
    offsets: list[dict[str, Tensor]] = [{}] * 3 + [{n: 0.05 * p.detach() for n, p in cell.named_parameters()}] * 2
    extra: dict[str, Any] = {"resets": resets, "offsets": offsets}
    expected, influences = oracles.dense_rtrl(cell, xs, complex_loss, return_influence=True, **extra)
    with_influence = hasattr(EXACT[learner](cell, B), "influence")
    found = run(
        cell, xs, complex_loss, syncs={1: True}, saves={3}, influences=with_influence, make=EXACT[learner], **extra
    )
    assert found.state is not None and found.state.is_complex() == (name != "real state")
    assert all(found.gradients[n].dtype == p.dtype for n, p in cell.named_parameters())
    assert_gradients_equal(in_pairs(found.gradients), in_pairs(expected), may_be_zero=True)
    if with_influence:
        assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


class Conjugated(ComplexCell):
    """Returns lazy conjugates, and holds one as a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(self.rate.detach().conj())

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        (real, _), h = super().forward(x, h)
        return (real, h.conj()), h.conj()


def test_lazy_conjugates_are_exact_and_no_slower() -> None:
    cell, xs = Conjugated(), inputs(4)
    assert cell.rate.is_conj()
    expected = in_pairs(oracles.bptt(cell, xs, complex_loss))
    for structure in ("find", "off"):
        found = run(cell, xs, complex_loss, block=2, structure=structure, influences=False)
        assert_gradients_equal(in_pairs(found.gradients), expected, may_be_zero=True)


def test_dormant_slices_of_complex_parameters_are_exact() -> None:
    cell = SparseComplex()
    xs = normal(3, 12, B, 2)
    rows = torch.tensor(
        [[0, 1], [1, 1], [1, 0], [1, 2], [2, 2], [1, 1], [2, 1], [0, 2], [1, 1], [2, 0], [0, 0], [1, 2]]
    )
    xs[:, :, 1] = rows.double() - 0.5
    resets = torch.zeros(12, B, dtype=torch.bool)
    resets[5, 0] = True
    expected, influences = oracles.dense_rtrl(cell, xs, complex_loss, resets=resets, return_influence=True)
    assert check_cell(cell, list(xs[:2])).passed
    for make in (functools.partial(rtrl.BlockRTRL, block=2, window=2), DenseRTRL):
        found = run(cell, xs, complex_loss, resets=resets, make=make)
        assert_gradients_equal(in_pairs(found.gradients), in_pairs(expected))
        assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


def test_steps_at_once_are_steps_one_by_one() -> None:
    xs, cells = inputs(4), [ComplexCell(), ComplexCell()]
    for cell in cells:
        learner = rtrl.BlockRTRL(cell, B, block=4)
        if cell is cells[0]:
            ys = learner.unroll(xs)
        else:
            steps = [learner.step(x) for x in xs]
            ys = tuple(torch.stack(parts) for parts in zip(*steps, strict=True))
        assert ys[1].is_complex()
        learner_loss = ys[0].square().sum() + ys[1].abs().square().sum()
        learner_loss.backward()
        learner.sync()
    for one, other in zip(*(cell.parameters() for cell in cells), strict=True):
        assert one.grad is not None and torch.equal(one.grad, other.grad)


def test_the_influence_is_over_pairs_of_states_and_parameters() -> None:
    cell, (x, *_) = ComplexCell(), inputs()
    learner = rtrl.BlockRTRL(cell, B)
    learner.step(x)
    influence = learner.influence("rate").reshape(B, 2, 2, 2, 2)  # of unit i's parts by parameter j's parts
    step, h = 1e-6, cell.init_state(B)
    for part, direction in enumerate((1.0, 1j)):
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(cell)
            with torch.no_grad():
                moved.rate[1] += sign * step * direction
            ends.append(torch.view_as_real(moved(x, h)[1].detach()))
        difference = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close(influence[..., 1, part], difference, rtol=1e-6, atol=1e-8)


def test_a_state_that_is_passed_is_complex() -> None:
    cell, xs, state = ComplexCell(), inputs(), torch.full((B, 2), 0.3 - 0.2j, dtype=torch.complex128)
    expected = oracles.bptt(cell, xs, complex_loss, state)
    found = run(cell, xs, complex_loss, block=2, h0=state)
    assert_gradients_equal(in_pairs(found.gradients), in_pairs(expected))
    learner = rtrl.BlockRTRL(cell, B, block=2)
    assert isinstance(learner.cell, rtrl.cells.RealState) and next(learner.cell.parameters()) is cell.rate
    learner.step(xs[0])
    learner.reset(torch.tensor([True, False]), state=state)
    assert torch.equal(learner.state[0], state[0]) and not torch.equal(learner.state[1], state[1])
    for wrong in (state.to(torch.complex64), state.real):
        with pytest.raises(ShapeError, match="state must stay"):
            learner.reset(state=wrong.contiguous())
    real = rtrl.BlockRTRL(ComplexWeights(), B)
    with pytest.raises(ShapeError, match="complex128"):
        real.reset(state=torch.zeros(B, 3, dtype=torch.complex128))
    with pytest.raises(ShapeError, match="state"):
        rtrl.BlockRTRL(ComplexWeights(), B, state=torch.zeros(B, 3, dtype=torch.complex128))


def test_learners_of_complex_cells_are_copied_and_saved() -> None:
    xs, learner = inputs(), rtrl.BlockRTRL(ComplexCell(), B, block=3)
    learner.backward(complex_loss(0, learner.step(xs[0])))
    copies = [learner, copy.deepcopy(learner), pickle.loads(pickle.dumps(learner))]
    for each in copies:
        each.backward(complex_loss(1, each.step(xs[1])))
        each.sync()
    first, *others = [[p.grad for p in each.cell.parameters()] for each in copies]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    with pytest.raises(ConfigError, match="drop its imaginary part"):
        learner.to(torch.float32)
    with pytest.raises(ConfigError, match="real floating-point"):
        learner.to(torch.complex64)


def test_training_lowers_a_loss_of_complex_parameters() -> None:
    cell, x = ComplexCell(), inputs()[0]
    learner, optimizer = rtrl.BlockRTRL(cell, B), torch.optim.SGD(cell.parameters(), lr=0.05)
    seen = []
    for _ in range(30):
        real, turned = learner.step(x)
        loss = (real - 0.3).square().sum() + (turned - (0.1 + 0.2j)).abs().square().sum()
        learner.backward(loss)
        learner.sync()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss.detach()))
    assert seen[-1] < 0.2 * seen[0]


@pytest.mark.parametrize("make", [functools.partial(rtrl.BlockRTRL, block=2), DenseRTRL])
def test_losses_of_a_step_are_taken_apart(make: Any) -> None:
    cell, xs = ComplexCell(), inputs(4)
    learner = make(cell, B)
    for x in xs[:3]:
        learner.step(x)
    real, turned = learner.step(xs[3])
    found = learner.gradients({"real": real.square().sum(), "complex": turned.abs().square().sum()})
    alone = learner.gradients({"complex": turned.abs().square().sum()}, per_sample=True)["complex"]
    for name, of_y in (("real", lambda y: y[0].square().sum()), ("complex", lambda y: y[1].abs().square().sum())):
        expected = oracles.bptt(cell, xs, lambda t, y, of_y=of_y: of_y(y) if t == 3 else None)
        assert_gradients_equal(in_pairs(found[name]), in_pairs(expected), may_be_zero=True)
    assert alone["rate"].shape == (B, 2) and alone["rate"].is_complex()
    for name, value in alone.items():
        torch.testing.assert_close(value.sum(dim=0), found["complex"][name], rtol=1e-10, atol=1e-14)


def test_gradients_of_complex_parameters_are_aligned() -> None:
    stream = [(x, functools.partial(complex_loss, t)) for t, x in enumerate(inputs())]
    found = alignment({"dense": DenseRTRL, "diagonal": DiagonalRTRL}, ComplexCell(), stream)
    assert found["dense"].cosine == pytest.approx(1) and found["dense"].bias < 1e-12
    assert 1e-3 < found["diagonal"].bias < 1 and 0 < found["diagonal"].by_parameter["rate"].cosine < 1


def test_hooks_on_a_complex_parameter_see_its_whole_gradient() -> None:
    cell, xs, seen = ComplexCell(), inputs(), []
    expected = oracles.bptt(cell, xs, complex_loss)["rate"]
    cell.rate.register_hook(lambda gradient: seen.append(gradient.clone()))
    run(cell, xs, complex_loss, block=2, influences=False)
    assert len(seen) == 1 and seen[0].is_complex()
    torch.testing.assert_close(seen[0], expected, rtol=1e-10, atol=0)


def test_nan_in_an_imaginary_part_is_found() -> None:
    cell, xs = ComplexCell(), inputs()
    with torch.no_grad():
        cell.phase.imag[0] = float("nan")  # of y alone
    with pytest.raises(NonFiniteError, match="in y at step 0"):
        rtrl.BlockRTRL(cell, B).step(xs[0])
    with pytest.raises(NonFiniteError, match="first state"):
        rtrl.BlockRTRL(ComplexCell(), B, state=torch.full((B, 2), complex(0, float("inf")), dtype=torch.complex128))


class WrongBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        return

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.complex(gradient.real.clamp(-0.01, 0.01), gradient.imag)


class ClampedRate(ComplexCell):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        return super().forward(x, WrongBackward.apply(h))  # type: ignore[no-untyped-call]


def test_an_audit_refuses_a_wrong_backward_pass_in_complex_numbers() -> None:
    learner = rtrl.BlockRTRL(ClampedRate(), B, block=2, audit="first")
    for t, x in enumerate(inputs()[:2]):
        learner.backward(complex_loss(t, learner.step(x)))
    with pytest.raises(AuditError):
        learner.sync()


class Mixing(ComplexCell):
    """Samples see the imaginary part of one another."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        return super().forward(x, h + 0.1j * h.imag.mean(dim=0))


class Forgetful(ComplexCell):
    def forward(self, x: Tensor, h: Tensor) -> tuple[Any, Tensor]:
        y, h = super().forward(x, h)
        return y, h.real


def test_check_cell_takes_complex_numbers() -> None:
    for name in ("complex", "real state"):
        assert check_cell(CELLS[name](), list(inputs(2))).passed
    for broken, message in ((Mixing(), "depends on the state of another"), (Forgetful(), "state")):
        with pytest.raises(CheckFailed, match=message):
            check_cell(broken, list(inputs(2)))


def test_costs_are_not_planned_for_complex_numbers() -> None:
    for cell in (ComplexCell(), ComplexWeights()):
        with pytest.raises(ConfigError, match="costs are counted for real numbers only"):
            rtrl.plan(cell, [inputs()[0]], batch_size=B, steps=4)
        assert rtrl.BlockRTRL(cell, B, block="auto").block == cell.init_state(1).numel()


def test_layers_have_real_or_complex_states() -> None:
    layers = [ComplexCell(), rtrl.cells.MinGRU(2, 2).double()]
    with pytest.raises(ConfigError, match="all real or all complex"):
        rtrl.Stack(layers)


@pytest.mark.parametrize("name", ["complex", "real state"])
def test_biased_learners_take_complex_numbers(name: str) -> None:
    """At one step from a constant, every learner is exact."""
    cell, xs = CELLS[name](), inputs(1)
    expected = oracles.bptt(cell, xs, complex_loss)
    for make in (DiagonalRTRL, UORO):
        found = run(cell, xs, complex_loss, influences=False, make=make)
        assert_gradients_equal(in_pairs(found.gradients), in_pairs(expected), may_be_zero=True)


def test_trees_with_complex_states_are_packed_as_pairs() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor([0.5 + 0.3j, 0.2 - 0.4j], dtype=torch.complex128))

        def forward(self, x: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            z = self.rate * state["z"].conj() + x.sum(dim=1, keepdim=True) * 1j
            return torch.cat([z.real, z.imag], dim=1), {"z": z, "sum": state["sum"] + z.abs().sum(dim=1, keepdim=True)}

    start = {"z": torch.zeros(1, 2, dtype=torch.complex128), "sum": torch.zeros(1, 1, dtype=torch.float64)}
    cell, xs = rtrl.from_torch(Pair(), state=start), inputs()
    h = cell.init_state(B)
    assert h.shape == (B, 5) and h.dtype == torch.float64
    assert cell.unpack(h)["z"].dtype == torch.complex128
    assert torch.equal(cell.pack(cell.unpack(h)), h)
    assert_gradients_equal(
        in_pairs(run(cell, xs, complex_loss, block=2).gradients), in_pairs(oracles.bptt(cell, xs, complex_loss))
    )
