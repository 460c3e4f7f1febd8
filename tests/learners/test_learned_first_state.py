"""First states that depend on parameters: their influence begins as ∂h₀/∂θ, at the start and after every reset."""

from typing import Any

import pytest
import torch
from helpers.baseline_cells import BASELINES, F64, normal
from helpers.exact_learners import EXACT, Make
from helpers.running import gradients
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from torch import Tensor, nn

import rtrl
from rtrl.errors import ConfigError, NonFiniteError
from rtrl.learners import BPTT, RFLO, UORO, DiagonalRTRL, SnAp

FIRST = torch.tensor([True, False])


class Decay(nn.Module):
    """h' = 0.5 h + x, y = h' (or h); its only parameter is its first state."""

    def __init__(self, shape: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        self.h0 = nn.Parameter(torch.ones(shape, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return self.h0.expand(batch_size, *self.h0.shape)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        after = 0.5 * h + x
        return after, after


class Learned(nn.Module):
    """A tanh cell whose first state is a function of two parameters, one of which the step uses, too."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for name, shape in {"a": (3, 3), "b": (3, 2), "c": (4,), "unused": (2,)}.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator, dtype=F64)))
        self.given = torch.randn(2, 4, generator=generator, dtype=F64)

    def init_state(self, batch_size: int) -> Tensor:
        """Another first state for each sample."""
        return torch.tanh((self.c * self.given[:batch_size])[:, :3] @ self.a + self.c[1])

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h_next = torch.tanh(h @ self.a.T + x @ self.b.T)
        return h_next + h, h_next


def loss(t: int, y: Tensor) -> Tensor | None:
    return None if t % 3 == 1 else (y - 0.1 * t).square().sum()


def reference(cell: nn.Module, xs: Tensor, resets: dict[int, Tensor | None], changes: dict[int, float]) -> Tensor:
    """Backpropagate through the module itself; at step t its parameters gain a constant, before any reset."""
    names, offset = [n for n, _ in cell.named_parameters()], 0.0
    theta = dict(cell.named_parameters())

    def shifted() -> dict[str, Tensor]:
        return {name: theta[name] + offset for name in names}

    class Starts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, batch_size: int) -> Tensor:
            return self.cell.init_state(batch_size)  # type: ignore[operator, no-any-return]

    def first() -> Tensor:
        values = {f"cell.{name}": value for name, value in shifted().items()}
        return torch.func.functional_call(Starts(), values, (xs.shape[1],))  # type: ignore[no-any-return]

    h, total = first(), torch.zeros((), dtype=F64)
    for t, x in enumerate(xs):
        offset += changes.get(t, 0.0)
        if t in resets:
            mask = torch.ones(len(h), dtype=torch.bool) if resets[t] is None else resets[t]
            h = torch.where(mask.reshape(-1, *[1] * (h.ndim - 1)), first(), h)  # type: ignore[union-attr]
        y, h = torch.func.functional_call(cell, shifted(), (x, h))
        value = loss(t, y)
        total = total if value is None else total + value
    return total


def run(learner: Any, xs: Tensor, resets: dict[int, Tensor | None], changes: dict[int, float]) -> dict[str, Tensor]:
    learner.cell.zero_grad()
    for t, x in enumerate(xs):
        if t in changes:
            learner.sync()
            with torch.no_grad():
                for parameter in learner.cell.parameters():
                    parameter += changes[t]
        if t in resets:
            learner.reset(resets[t])
        value = loss(t, learner.step(x))
        if value is not None:
            learner.backward(value)
    learner.sync()
    return gradients(learner.cell)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_the_gradient_of_a_first_state_that_only_decays(make: Make) -> None:
    cell = Decay()
    learner = make(cell, 1)
    for _ in range(3):
        learner.backward(learner.step(torch.ones(1, 1, dtype=F64)).sum())
    learner.sync()
    assert cell.h0.grad is not None and cell.h0.grad.item() == 0.875
    assert learner.retained_bytes()["state"] == 8  # what began the influence is not held twice


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_a_function_of_parameters_as_the_first_state_with_resets_and_changes(make: Make) -> None:
    resets, changes = {4: FIRST, 7: None, 8: FIRST, 11: ~FIRST}, {3: 0.05, 8: -0.03}
    cell, xs = Learned(), normal(1, 13, 2, 2)
    total = reference(cell, xs, resets, changes)
    names = [name for name, _ in cell.named_parameters()]
    exact = torch.autograd.grad(total, list(cell.parameters()), materialize_grads=True)
    found = run(make(cell, 2), xs, resets, changes)
    assert not bool(found.pop("unused").any())
    assert_gradients_equal(found, {n: g for n, g in zip(names, exact, strict=True) if n != "unused"})


def first_jacobian(cell: nn.Module, name: str) -> Tensor:
    theta = dict(cell.named_parameters())[name]
    first = cell.init_state(2)  # type: ignore[operator]
    rows = [torch.autograd.grad(entry, theta, retain_graph=True)[0].flatten() for entry in first.flatten()]
    return torch.stack(rows).reshape(2, first[0].numel(), -1)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_the_influence_begins_as_the_derivative_of_the_first_state(make: Make) -> None:
    cell = Learned()
    learner, expected = make(cell, 2), {name: first_jacobian(cell, name) for name in ("a", "c")}
    if not hasattr(learner, "influence"):
        return
    for _ in range(2):  # a new learner, and after a reset
        assert_influences_equal({name: learner.influence(name) for name in expected}, expected)
        assert not bool(learner.influence("b").any())
        learner.step(torch.ones(2, 2, dtype=F64))
        learner.reset()
    learner.step(torch.ones(2, 2, dtype=F64))
    before = learner.influence("a")
    learner.reset(FIRST)
    learner.reset(FIRST)  # twice, without a step or a look in between
    assert torch.equal(learner.influence("a")[1], before[1])
    assert_influences_equal({"a": learner.influence("a")[:1]}, {"a": expected["a"][:1]})
    learner.reset(FIRST)  # again, before any step
    learner.reset(~FIRST, state=torch.zeros(2, 3, dtype=F64))  # a constant
    assert_influences_equal({"a": learner.influence("a")[:1]}, {"a": expected["a"][:1]})
    assert not bool(learner.influence("a")[1].any())
    learner.reset()
    learner.reset(state=torch.zeros(2, 3, dtype=F64))
    assert not bool(learner.influence("a").any())


class Routed(nn.Module):
    """Every step uses one of three rows of a table, which is the first state, too: slices of it sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(normal(5, 3, 2))
        self.mix = nn.Parameter(normal(6, 2, 2))

    def init_state(self, batch_size: int) -> Tensor:
        return (self.table[:2].sum(0) + self.mix[0]).expand(batch_size, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        index = x.long()
        after = torch.tanh(h @ self.mix + nn.functional.embedding(index, self.table))
        return after, after, rtrl.Sparsity(active={"table": index[:, None]})


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_slices_that_only_the_first_state_has_used(make: Make) -> None:
    """Row 1 of the table is never active: it sleeps from the first state on, longer than the window."""
    cell, xs, resets = Routed(), torch.tensor([[0, 2], [2, 2], [2, 0]] * 4, dtype=F64), {5: FIRST, 9: ~FIRST}
    h, total = cell.init_state(2), torch.zeros((), dtype=F64)
    for t, x in enumerate(xs):
        h = torch.where(resets[t][:, None], cell.init_state(2), h) if t in resets else h
        y, h, _ = cell(x, h)
        value = loss(t, y)
        total = total if value is None else total + value
    exact = torch.autograd.grad(total, list(cell.parameters()))
    found = run(make(cell, 2), xs, resets, {})  # type: ignore[arg-type]
    assert_gradients_equal(found, dict(zip(["table", "mix"], exact, strict=True)))
    assert bool(found["table"][1].any())


def test_slices_that_no_first_state_has_used_take_no_memory() -> None:
    learner = rtrl.BlockRTRL(Routed(), 2, block=2)
    learner.step(torch.tensor([0.0, 2.0], dtype=F64))
    assert learner.last_updates("table").tolist() == [[0, 0, -1], [0, 0, -1]]


@pytest.mark.parametrize("make", [*BASELINES, pytest.param(EXACT["block-3"], id="block")])
def test_a_learner_saved_before_the_first_step_of_a_learned_state_continues_bit_for_bit(make: Make) -> None:
    found, saved = [], None
    for resumed in (False, True):
        cell = Learned()
        learner = make(cell, 2)
        for t, x in enumerate(normal(1, 9, 2, 2)):
            if t == 5:
                learner.reset(FIRST)
                if resumed:
                    other = make(cell, 2)
                    other.load_state_dict(saved)
                    learner = other
                saved = learner.state_dict()
            learner.backward((learner.step(x) - 0.1 * t).square().sum())
        learner.sync()
        found.append(gradients(cell))
    assert bool(found[0]["c"].any())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_an_open_block_given_up_begins_with_the_derivative_again() -> None:
    cell, xs = Learned(), normal(2, 4, 2, 2)
    learner = rtrl.BlockRTRL(cell, 2, block=3)
    for x in xs:
        learner.backward(learner.step(x).sum())
    learner.reset(discard=True)
    assert_gradients_equal(run(learner, xs, {}, {}), run(rtrl.BlockRTRL(cell, 2), xs, {}, {}), may_be_zero=True)


LAWS = {
    "rflo": (lambda *a: RFLO(*a, leak=0.5), torch.full((2, 3), 0.5, dtype=F64)),
    "diagonal": (DiagonalRTRL, torch.tensor([0.2, 0.5, -0.7], dtype=F64).expand(2, 3)),
    "snap": (lambda *a: SnAp(*a, order=1), torch.tensor([0.2, 0.5, -0.7], dtype=F64).expand(2, 3)),
}


@pytest.mark.parametrize("law", LAWS)
def test_local_rules_are_exact_for_the_learned_state_of_a_cell_of_their_law(law: str) -> None:
    make, decay = LAWS[law]

    class Cell(Decay):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            after = decay[:1] * h + x
            return after.sin(), after

    cell, xs, resets = Cell((3,)), normal(4, 7, 2, 3), {3: FIRST}
    exact = torch.autograd.grad(reference(cell, xs, resets, {}), cell.h0)[0]  # type: ignore[arg-type]
    assert_gradients_equal(run(make(cell, 2), xs, resets, {}), {"h0": exact})  # type: ignore[arg-type]


def test_the_mean_of_uoro_begins_as_the_derivative_of_the_first_state() -> None:
    """All eight draws of the signs, each as likely: their mean is exact."""
    cell, total, generator = Learned(), torch.zeros(2, 3, 9, dtype=F64), torch.Generator()
    seeds: dict[tuple[int, ...], int] = {}
    for seed in range(4000):
        key = tuple(torch.randint(0, 2, (2, 3), generator=generator.manual_seed(seed)).flatten().tolist())
        seeds.setdefault(key, seed)
    assert len(seeds) == 64
    for seed in seeds.values():
        total += UORO(cell, 2, generator=torch.Generator().manual_seed(seed)).influence("a")
    assert_influences_equal({"a": total / 64}, {"a": first_jacobian(cell, "a")})


def test_uoro_leaves_the_estimates_of_samples_that_go_on() -> None:
    learner = UORO(Learned(), 2, generator=torch.Generator().manual_seed(0))
    for x in normal(3, 3, 2, 2):
        learner.step(x)
    before = learner.influence("a")
    learner.reset(FIRST)
    assert torch.equal(learner.influence("a")[1], before[1])
    assert torch.linalg.matrix_rank(learner.influence("a")[0]) == 1


def test_layers_and_modules_with_a_learned_first_state() -> None:
    class Pair(nn.Module):
        """A module whose state is a pair."""

        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(normal(7, 1, 2))

        def init_state(self, batch_size: int) -> tuple[Tensor, Tensor]:
            return self.start.expand(batch_size, 2), self.start.expand(batch_size, 2) ** 2

        def forward(self, x: Tensor, s: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            return s[0] * s[1], (torch.sin(s[0] + x), 0.3 * s[0] + s[1])

    module = Pair()
    function = rtrl.from_torch(Pair(), state=lambda n: (torch.zeros(n, 2, dtype=F64), torch.ones(n, 2, dtype=F64)))
    assert not rtrl.BlockRTRL(function, 2).influence("cell.start").any()
    with pytest.raises(ConfigError, match="state passed requires grad"):
        rtrl.from_torch(Pair(), state=(torch.zeros(1, 2, requires_grad=True), torch.ones(1, 2)))
    for cell in (rtrl.from_torch(module), rtrl.cells.Stack([Decay((4,)), rtrl.from_torch(module)])):
        for make in (EXACT["block-3"], BPTT):
            learner, xs = make(cell, 2), normal(8, 7, 2, 2)
            if isinstance(cell, rtrl.cells.Stack):
                xs = torch.cat([xs, xs], dim=2)
                cell.layers[0].forward = lambda x, h: ((0.5 * h + x)[:, :2], 0.5 * h + x)
            exact = torch.autograd.grad(reference_direct(cell, xs), list(cell.parameters()))
            names = [name for name, _ in cell.named_parameters()]
            assert_gradients_equal(run(learner, xs, {3: FIRST}, {}), dict(zip(names, exact, strict=True)))


def reference_direct(cell: nn.Module, xs: Tensor) -> Tensor:
    h, total = cell.init_state(2), torch.zeros((), dtype=F64)  # type: ignore[operator]
    for t, x in enumerate(xs):
        h = torch.where(FIRST[:, None], cell.init_state(2), h) if t == 3 else h  # type: ignore[operator]
        y, h, *_ = cell(x, h)
        value = loss(t, y)
        total = total if value is None else total + value
    return total


@pytest.mark.parametrize("make", [*BASELINES, pytest.param(rtrl.BlockRTRL, id="block")])
def test_states_that_no_gradient_would_reach_are_refused(make: Make) -> None:
    state = torch.ones(2, 3, dtype=F64, requires_grad=True)
    with pytest.raises(ConfigError, match=r"state\.detach\(\), or make it a parameter"):
        make(Learned(), 2, state=state)
    learner = make(Learned(), 2)
    learner.step(torch.ones(2, 2, dtype=F64))
    before = learner.state_dict()
    with pytest.raises(ConfigError, match=r"state\.detach\(\), or make it a parameter"):
        learner.reset(state=state * 2)
    assert str(learner.state_dict()) == str(before)

    class Foreign(Learned):
        def init_state(self, batch_size: int) -> Tensor:
            return state * self.c[:3]

    with pytest.raises(ConfigError, match=r"depends on a tensor \(2, 3\) that requires grad and is not"):
        make(Foreign(), 2)


def test_a_derivative_of_a_first_state_that_is_infinite_is_refused() -> None:
    class Root(Decay):
        def init_state(self, batch_size: int) -> Tensor:
            return (self.h0 - 1).sqrt().expand(batch_size, 1)

    with pytest.raises(NonFiniteError, match="derivative of the first state by parameter 'h0'"):
        rtrl.BlockRTRL(Root(), 1)


def test_hooks_on_parameters_do_not_see_the_derivative_of_the_first_state() -> None:
    cell, xs, seen = Learned(), normal(2, 4, 2, 2), []
    plain = run(rtrl.BlockRTRL(cell, 2, block=2), xs, {}, {})
    cell.c.register_hook(lambda gradient: seen.append(gradient.clone()))  # type: ignore[no-untyped-call]
    hooked = run(rtrl.BlockRTRL(cell, 2, block=2), xs, {}, {})
    assert len(seen) == 1 and torch.equal(seen[0], plain["c"]) and torch.equal(hooked["c"], plain["c"])


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
def test_a_sample_that_is_reset_twice_before_a_step_begins_once(make: Make) -> None:
    cell = Learned()
    once, twice = make(cell, 2), make(cell, 2)
    for learner in (once, twice):
        for x in normal(0, 2, 2, 2):
            learner.step(x)
        learner.reset(FIRST)
    twice.reset(FIRST)
    twice.reset(FIRST)
    for learner in (once, twice):
        cell.zero_grad()
        learner.backward(learner.step(normal(1, 2, 2)).square().sum())
        learner.sync()
        if learner is once:
            expected = gradients(cell)
    assert_gradients_equal(gradients(cell), expected, may_be_zero=True)
    assert bool(expected["c"].any())
