"""What a step and a loss look at quickly: no less is found than by looking at everything."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers.adversarial_inputs import (
    F64,
    INF,
    NAN,
    B,
    Plain,
    assert_same,
    attacked,
    finish,
    mixture,
    plain,
    refused,
    stream,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

import rtrl
from rtrl._engine import checks, losses
from rtrl.cells import from_torch
from rtrl.cells.protocol import Sparsity, check_indices, check_sparsity, same_choices
from rtrl.errors import LossError, NonFiniteError, ParameterChangedError, SparsityError

# ---------------------------------------------------------------------- NaN, infinity, and sums that overflow

SHAPES = [(), (1,), (5,), (2, 3), (8, 9), (2, 3, 4), (1, 40, 40)]
HUGE = {torch.float64: 1.7e308, torch.float32: 3e38, torch.float16: 6e4, torch.bfloat16: 3e38}


@pytest.fixture(params=["CPU", "elsewhere"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """As on this device, and as on one where every look costs."""
    if request.param == "elsewhere":
        monkeypatch.setattr(Tensor, "is_cpu", False)
    return str(request.param)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("dtype", HUGE)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_finite_is_told_from_what_only_sums_up_to_infinity(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    large = torch.full(shape, HUGE[dtype], dtype=dtype)
    assert checks.finite(large)
    assert checks.finite(large.clone().requires_grad_())
    assert checks.all_finite([large, torch.ones(2, dtype=dtype), -large])
    for bad in (NAN, INF, -INF):
        for at in {0, large.numel() - 1}:
            value = torch.ones(shape, dtype=dtype)
            value.view(-1)[at] = bad
            assert not checks.finite(value)
            assert not checks.finite(value.requires_grad_())
            assert not checks.all_finite([large, value])
            assert not checks.all_finite([value, large])
    if large.numel() > 1:
        both = torch.ones(shape, dtype=dtype)
        both.view(-1)[0], both.view(-1)[-1] = INF, -INF
        assert not checks.finite(both)


@pytest.mark.usefixtures("place")
def test_what_has_no_fractions_or_no_entries_is_finite() -> None:
    values = [torch.full((2, 2), 2**62), torch.zeros(0, 3), torch.tensor(True), torch.ones(2, dtype=torch.complex64)]
    assert all(map(checks.finite, values))
    assert checks.all_finite(values)
    assert checks.all_finite(values[:1] + values[2:])
    assert checks.all_finite([])


class Vast(nn.Module):
    """A state and an output as large as numbers get, y = 1e308 + W x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 3), 1e308, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return h + x @ self.weight, h


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("batch", [1, 40])
def test_steps_and_losses_whose_sums_overflow_are_taken(batch: int) -> None:
    learner, x = rtrl.BlockRTRL(Vast(), batch, block=2), torch.full((batch, 3), 1e308, dtype=F64)
    y = learner.step(x)
    learner.backward(((y - y.detach()) * 1e308).sum())
    assert y.grad is not None
    assert bool((y.grad == 1e308).all())
    learner.step(x)


@pytest.mark.parametrize("make", [plain, mixture])
def test_the_first_that_is_not_finite_is_named_on_any_device(make: Callable[[], rtrl.BlockRTRL], place: str) -> None:
    """At once on the CPU; elsewhere, where nothing is looked at before, when the block closes."""

    def steep(learner: rtrl.BlockRTRL, ys: list[Tensor], losses: list[Tensor]) -> None:
        own = next(learner.cell.parameters())
        learner.backward(ys[-1].sum() + (own - own.detach()).sum().sqrt())

    if place == "CPU":
        attacked(make, steep, NonFiniteError, "the gradient of the loss at a parameter at step 4")
    else:
        learner, y = make(), None
        for x in stream()[:5]:
            y = learner.step(x)
        steep(learner, [y], [])
        with pytest.raises(NonFiniteError, match="in a loss or its gradient at step 4"):
            learner.sync()
    learner = make()
    with torch.no_grad():
        learner.cell.head.weight.fill_(INF)
    with refused_there(learner, place, "in y at step 0"):
        learner.step(stream()[0])


@contextmanager
def refused_there(learner: rtrl.BlockRTRL, place: str, match: str) -> Iterator[None]:
    """Refused at once on the CPU; elsewhere when the block closes."""
    if place == "CPU":
        with refused(learner, NonFiniteError, match):
            yield
        return
    yield
    with pytest.raises(NonFiniteError, match=match):
        learner.sync()


class Bad(Plain):
    """Gives its state beside y; on request, makes either infinite."""

    where = ""

    def forward(self, x: Tensor, h: Tensor) -> Any:
        y, h = super().forward(x, h)
        out = (h / 0.0 if self.where == "state" else h).abs()
        return {"same": (out, h), "first": (y / 0.0, out), "state": (y, out), "pair": ((y, out), out)}.get(
            self.where, ((y, h), h)
        )


@pytest.mark.parametrize(("where", "what"), [("first", "y"), ("state", "the next state")])
def test_an_infinite_y_is_told_from_an_infinite_state(where: str, what: str, place: str) -> None:
    learner = rtrl.BlockRTRL(Bad(), B, block=3)
    learner.step(stream()[0])
    learner.cell.where = where
    with refused_there(learner, place, f"in {what} at step 1"):
        learner.step(stream()[1])


@pytest.mark.usefixtures("place")
def test_a_run_is_the_same_on_any_device() -> None:
    assert_same(finish(mixture(), stream()), finish(mixture(), stream()))


# ---------------------------------------------------------------------- parameters and buffers inside an open block


def _rename(linear: nn.Module) -> None:
    bias = linear.bias
    del linear.bias
    linear.b = bias


def _equal(cell: nn.Module) -> None:
    cell.enter.weight = nn.Parameter(cell.enter.weight.detach().clone())


def _hidden(cell: nn.Module) -> None:
    cell.inner.more = nn.Linear(1, 1)


STRANGE = "replaced, added or removed.*make a new learner"
TOGGLED = r"frozen or unfrozen inside the open block.*call sync\(\)"
REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an equal parameter": (_equal, STRANGE),
    "another name": (lambda cell: _rename(cell.enter), STRANGE),
    "an equal module": (lambda cell: setattr(cell, "enter", copy.deepcopy(cell.enter)), STRANGE),
    "frozen": (lambda cell: cell.recur.weight.requires_grad_(False), TOGGLED),
    "unfrozen": (lambda cell: cell.head.bias.requires_grad_(), TOGGLED),
    "a parameter more": (lambda cell: setattr(cell, "extra", nn.Parameter(torch.ones(1))), STRANGE),
    "a module more": (lambda cell: setattr(cell, "extra", nn.Linear(1, 1)), STRANGE),
    "a module more in an empty one": (_hidden, STRANGE),
    "a module less": (lambda cell: delattr(cell, "enter"), STRANGE),
    "in place": (lambda cell: cell.head.weight.detach().mul_(2.0), "'head.weight' changed inside the open block"),
    "a frozen one": (lambda cell: cell.head.bias.mul_(2.0), "'head.bias' changed inside the open block"),
    "data": (lambda cell: setattr(cell.enter.bias, "data", cell.enter.bias * 2), "'enter.bias' changed inside"),
    "a buffer": (lambda cell: cell.scale.mul_(2.0), "'scale' changed inside"),
    "a buffer's data": (lambda cell: setattr(cell.scale, "data", cell.scale * 2), "'scale' changed inside"),
    "a new buffer": (lambda cell: setattr(cell, "scale", cell.scale * 2), "'scale' changed inside"),
    "a buffer more": (lambda cell: cell.enter.register_buffer("more", torch.ones(1)), "'enter.more' changed inside"),
}
ALLOWED: dict[str, Callable[[Any], Any]] = {
    "evaluation": lambda cell: cell.eval(),
    "gradients": lambda cell: [setattr(p, "grad", torch.zeros_like(p)) for p in cell.parameters()],
    "the same again": lambda cell: setattr(cell.enter, "weight", cell.enter.weight),
    "an empty module": lambda cell: setattr(cell, "extra", nn.Identity()),
    "the same buffer by another object": lambda cell: setattr(cell, "scale", cell.scale.detach()),
}


def _opened(steps: int = 2) -> rtrl.BlockRTRL:
    """A learner in the middle of its second block, after a change of its parameters between the two."""
    cell = Plain()
    cell.inner = nn.Module()
    learner = rtrl.BlockRTRL(cell, B, block=5)
    for x in stream()[:3]:
        learner.backward(learner.step(x).sum())
    learner.sync()
    with torch.no_grad():
        cell.enter.weight.mul_(0.5)
    for x in stream()[3 : 3 + steps]:
        learner.backward(learner.step(x).sum())
    return learner


@pytest.mark.parametrize(("change", "match"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_changes_in_mid_block_is_refused_by_the_very_next_step(
    change: Callable[[Any], Any], match: str, steps: int
) -> None:
    learner = _opened(steps)
    change(learner.cell)
    for _ in range(2):
        with refused(learner, ParameterChangedError, match):
            learner.step(stream()[0])


@pytest.mark.parametrize("change", ALLOWED.values(), ids=ALLOWED)
def test_what_changes_no_parameter_is_let_pass_and_hides_nothing_after_it(change: Callable[[Any], Any]) -> None:
    learner = _opened(2)
    change(learner.cell)
    learner.backward(learner.step(stream()[5]).sum())
    _equal(learner.cell)
    with refused(learner, ParameterChangedError, STRANGE):
        learner.step(stream()[6])


def _move(cell: nn.Module) -> None:
    moved, last = cell.one.w, cell.two.last
    del cell.one.w, cell.two.last
    cell.two.w, cell.two.last = moved, last


MOVES: dict[str, Callable[[Any], Any]] = {
    "to another module": _move,
    "the last one gone": lambda cell: delattr(cell.two, "last"),
    "all gone": lambda cell: (delattr(cell.two, "last"), delattr(cell.one, "w"), delattr(cell.one, "first")),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_a_parameter_that_moves_away_is_missed(move: Callable[[Any], Any]) -> None:
    cell = Plain()
    cell.one, cell.two = nn.Module(), nn.Module()
    cell.one.first, cell.one.w = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(2))
    cell.two.last = nn.Parameter(torch.ones(3))
    learner = rtrl.BlockRTRL(cell, B, block=4)
    learner.step(stream()[0])
    move(cell)
    with refused(learner, ParameterChangedError, STRANGE):
        learner.step(stream()[1])


class Shifty(Plain):
    """Told so, replaces a parameter of its own in a forward."""

    shifty = False

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        if self.shifty:
            self.shifty = False
            _equal(self)
        return super().forward(x, h)


@pytest.mark.parametrize("at", [3, 4], ids=["first step of a block", "second step"])
def test_a_cell_that_replaces_its_own_parameter_is_refused_by_the_next_step(at: int) -> None:
    learner = rtrl.BlockRTRL(Shifty(), B, block=3)
    for x in stream()[:at]:
        learner.step(x)
    learner.sync() if at == 3 else None
    learner.cell.shifty = True
    learner.step(stream()[at])
    with refused(learner, ParameterChangedError, STRANGE):
        learner.step(stream()[at + 1])


# ---------------------------------------------------------------------- losses


HELD = {
    "y": lambda y, loss: y,
    "a loss": lambda y, loss: loss,
    "both": lambda y, loss: (y, loss),
}
CLOSED: dict[str, Callable[[rtrl.BlockRTRL], Any]] = {
    "a full block": lambda learner: [learner.step(x) for x in stream()[1:3]],
    "sync": lambda learner: learner.sync(),
    "given up": lambda learner: learner.reset(discard=True),
    "loaded": lambda learner: learner.load_state_dict(learner.state_dict()),
}


@pytest.mark.parametrize("close", CLOSED.values(), ids=CLOSED)
@pytest.mark.parametrize("hold", HELD.values(), ids=HELD)
def test_a_loss_of_a_closed_block_is_refused_however_it_is_held(
    hold: Callable[[Tensor, Tensor], Any], close: Callable[[rtrl.BlockRTRL], Any]
) -> None:
    learner = plain(block=2)
    y = learner.step(stream()[0])
    held: Any = hold(y, y.square().sum())
    del y
    gc.collect()
    close(learner)
    gc.collect()
    loss = held[1] if isinstance(held, tuple) else held if held.ndim == 0 else held.square().sum()
    del held
    for _ in range(2):
        with refused(learner, LossError, "a loss reaches the y of step 0, whose block has closed"):
            loss.backward(retain_graph=True)


def test_what_nobody_holds_any_more_is_gone_when_its_block_closes() -> None:
    learner = plain(block=3)
    kept = [learner.step(x) for x in stream()[:2]]
    gone = weakref.ref(kept.pop(0))
    learner.step(stream()[2])
    assert gone() is not None
    learner.sync()
    assert gone() is None
    with pytest.raises(LossError, match="step 1, whose block has closed"):
        kept[0].sum().backward()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_is_pulled_back_as_autograd_does(shape: tuple[int, ...]) -> None:
    a, b, unused = (torch.randn(3, 4, dtype=F64).requires_grad_() for _ in range(3))
    loss = lambda: ((a @ b.T).tanh().sum() + a.sum()).reshape(shape)
    found = losses._gradients(loss(), [a, b, unused])
    expected = torch.autograd.grad(loss(), [a, b, unused], allow_unused=True)
    assert found[2] is None
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


class Handed(torch.autograd.Function):
    """The sum of the entries, whose derivative is a tensor that somebody else holds."""

    @staticmethod
    def forward(context: Any, value: Tensor, derivative: Tensor) -> Tensor:
        context.derivative = derivative
        return value.sum()

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Any:
        return context.derivative, None


def test_the_gradient_at_y_is_a_tensor_of_its_own() -> None:
    learner, derivative = plain(), torch.ones(B, 2, dtype=F64)
    y = learner.step(stream()[0])
    learner.backward(Handed.apply(y, derivative))
    derivative.fill_(7.0)
    assert y.grad is not None
    assert y.grad.tolist() == [[1.0, 1.0]] * B
    kept = y.grad
    learner.backward(y.sum())
    assert kept.tolist() == [[1.0, 1.0]] * B
    assert y.grad.tolist() == [[2.0, 2.0]] * B
    other = plain()
    y = other.step(stream()[0])
    other.backward(y.sum())
    assert y.grad is not None
    assert y.grad.is_contiguous()


def test_one_number_may_be_its_own_loss() -> None:
    cell = from_torch(nn.RNNCell(1, 1))
    learner = rtrl.BlockRTRL(cell, 1)
    y = learner.step(torch.ones(1, 1))
    learner.backward(y)
    assert y.grad is not None
    assert y.grad.tolist() == [[1.0]]


@pytest.mark.parametrize("grad", [True, False])
def test_a_refused_step_leaves_autograd_switched_as_it_was(grad: bool) -> None:
    learner = plain()
    with torch.set_grad_enabled(grad):
        learner.step(stream()[0])
        assert torch.is_grad_enabled() is grad
        with pytest.raises(NonFiniteError):
            learner.step(stream()[0] * NAN)
        assert torch.is_grad_enabled() is grad


class Switched(Plain):
    """Switches autograd on by itself."""

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            return super().forward(x, h)


def test_a_cell_that_switches_autograd_on_leaves_no_graph_behind() -> None:
    def run(kind: type[Plain]) -> list[Any]:
        torch.manual_seed(0)
        learner = rtrl.BlockRTRL(kind(), B, block=3)
        y = learner.step(stream()[0])
        assert y.is_leaf
        assert not learner.state.requires_grad
        assert not learner._state.requires_grad
        return finish(learner, stream()[1:])

    assert_same(run(Switched), run(Plain))


# ---------------------------------------------------------------------- indices


def _wrong(rows: Tensor) -> Iterator[tuple[Tensor, str]]:
    sample = len(rows) - 1
    for bad in (50, -1):
        wrong = rows.clone()
        wrong[sample, 0] = bad
        yield wrong, rf"^w must lie in 0 … 49, got {int(wrong.min())} … {int(wrong.max())}$"
    if rows.shape[1] > 1:
        wrong = rows.clone()
        wrong[sample, 0] = wrong[sample, -1]
        yield wrong, rf"^w repeats an index within sample {sample}: \[{int(wrong[sample, 0])}, "


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("batch", "k"), [(1, 1), (2, 3), (3, 50), (300, 1), (100, 4), (7, 50)])
def test_indices_are_checked_alike_few_or_many(batch: int, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(50, generator=generator) for _ in range(batch)])[:, :k]
    for good in (rows, rows[:, :0], torch.arange(k).expand(batch, k), torch.arange(50 - k, 50).expand(batch, k)):
        check_indices("w", good, batch, 50, rows.device)
    for wrong, match in _wrong(rows):
        with pytest.raises(SparsityError, match=match):
            check_indices("w", wrong, batch, 50, rows.device)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("batch", [2, 200])
@pytest.mark.parametrize("which", range(4))
def test_of_several_index_tensors_the_wrong_one_is_named(which: int, batch: int) -> None:
    names = ["Sparsity.reads", "Sparsity.writes", r"Sparsity.active\['a'\]", r"Sparsity.active\['b'\]"]
    parameters = {"a": torch.zeros(4, 2), "b": torch.zeros(3, 2), "c": torch.zeros(4)}
    h = torch.zeros(batch, 5, 2)
    own = [torch.tensor([[0, 1]]).repeat(batch, 1) for _ in names]
    sparsity = lambda: Sparsity(own[0], own[1], {"a": own[2], "c": own[2], "b": own[3]})
    check_sparsity(sparsity(), h, parameters)
    own[which][batch - 1, 0] = (5, 5, 4, 3)[which]
    with pytest.raises(SparsityError, match=f"^{names[which]} must lie in 0 … {(4, 4, 3, 2)[which]}, got 0 … "):
        check_sparsity(sparsity(), h, parameters)
    own[which][batch - 1, 0] = 1
    with pytest.raises(SparsityError, match=f"^{names[which]} repeats an index within sample {batch - 1}"):
        check_sparsity(sparsity(), h, parameters)


def test_one_index_tensor_is_checked_against_each_size_it_is_used_for() -> None:
    rows = torch.tensor([[0, 3]])
    parameters = {"a": torch.zeros(4), "b": torch.zeros(3)}
    check_sparsity(Sparsity(rows, rows, {"a": rows}), torch.zeros(1, 4), parameters)
    with pytest.raises(SparsityError, match=r"^Sparsity.active\['b'\] must lie in 0 … 2, got 0 … 3"):
        check_sparsity(Sparsity(rows, rows, {"a": rows, "b": rows}), torch.zeros(1, 4), parameters)


def test_choices_are_compared_by_what_they_say() -> None:
    one = torch.tensor([[0, 1]])
    same, turned = one.clone(), one.flip(1)
    full = Sparsity(one, one, {"a": one, "b": one})
    assert same_choices(full, Sparsity(same, same, {"b": same, "a": same}))
    assert same_choices(Sparsity(), Sparsity())
    for other in (
        Sparsity(turned, one, full.active),
        Sparsity(one, turned, full.active),
        Sparsity(same, turned, full.active),
        Sparsity(same, same, {"a": same, "b": turned}),
        Sparsity(None, one, full.active),
        Sparsity(one, None, full.active),
        Sparsity(one, one, {"a": one, "b": turned}),
        Sparsity(one, one, {"a": one}),
        Sparsity(one, one, {"a": one, "c": one}),
    ):
        assert not same_choices(full, other)
        assert not same_choices(other, full)


# ---------------------------------------------------------------------- PyTorch's cells


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("computed", [(), ("weight_hh",), ("bias_ih",), ("weight_ih", "bias_hh")], ids=str)
def test_parameters_that_are_computed_are_met_where_they_are(kind: Any, bias: bool, computed: tuple[str, ...]) -> None:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 0.5 * value

    cell = kind(3, 4, bias=bias, dtype=F64)
    adapted, x = from_torch(cell), torch.randn(B, 3, dtype=F64)
    h = torch.randn(adapted.init_state(B).shape, dtype=F64)
    for name in computed:
        if getattr(cell, name) is not None:
            parametrize.register_parametrization(cell, name, Half())
    expected = cell(x, tuple(h.unbind(1)) if kind is nn.LSTMCell else h)
    found = adapted(x, h)[1]
    torch.testing.assert_close(
        found, torch.stack(expected, 1) if kind is nn.LSTMCell else expected, rtol=1e-12, atol=1e-12
    )


def test_who_looks_at_the_identity_is_shown_what_passes_it() -> None:
    cell, seen = from_torch(nn.RNNCell(3, 4)), []
    x, h = torch.randn(B, 3), torch.zeros(B, 4)
    y, h_next = cell(x, h)
    assert y is h_next
    with cell.readout.register_forward_hook(lambda module, args, out: 2 * out):
        assert torch.equal(cell(x, h)[0], 2 * y)
    with cell.readout.register_forward_pre_hook(lambda module, args: seen.append(args)):
        cell(x, h)
    assert len(seen) == 1
