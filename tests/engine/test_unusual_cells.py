"""Unusual cells that keep their contract, and unusual surroundings: exact."""

import random
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers.adversarial_inputs import (
    D_IN,
    F64,
    STEPS,
    B,
    Step,
    assert_same,
    finish,
    make,
    mixture,
    refused,
    rows,
    stream,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import oracles
import rtrl.testing
from rtrl import Sparsity
from rtrl._engine import untapped
from rtrl.errors import CellError, PerformanceWarning
from rtrl.learners import DenseRTRL


class Cell(nn.Module):
    """A cell made of a function ``step(cell, x, h)`` and its modules or parameters."""

    def __init__(self, step: Step, *shape: int, **parts: Any) -> None:
        super().__init__()
        self.step, self.shape = step, shape or (4,)
        for name, part in {
            "enter": nn.Linear(D_IN, 4),
            "recur": nn.Linear(4, 4),
            "head": nn.Linear(4, 2),
            **parts,
        }.items():
            setattr(self, name, part)
        self.double()

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, *self.shape, dtype=self.enter.weight.dtype)

    def forward(self, x: Any, h: Tensor) -> Any:
        out = self.step(self, x, h)
        return out if isinstance(out, tuple) else (self.head(out), out)


def theta(*shape: int) -> nn.Parameter:
    return nn.Parameter(0.5 * torch.randn(shape))


def tanh_of(change: Callable[[Any, Tensor], Tensor]) -> Step:
    return lambda c, x, h: torch.tanh(c.enter(x) + change(c, h))


def check_exact(
    cell: nn.Module,
    xs: list[Any],
    loss: Callable[[Any], Tensor],
    *,
    block: int,
    syncs: tuple[int, ...] = (),
    structure: Any = "find",
) -> None:
    """Gradients equal backpropagation through the unrolled steps, and every influence the derivative of the last
    state."""
    parameters = {name: p for name, p in cell.named_parameters() if p.requires_grad}
    size = len(pytree_tensors(xs[0])[0])
    learner = rtrl.BlockRTRL(cell, size, block=block, structure=structure)
    h, total = learner.state, torch.zeros(())
    for t, x in enumerate(xs):
        learner.backward(loss(learner.step(x)))
        y, h = cell(x, h)[:2]
        total = total + loss(y)
        if t in syncs:
            learner.sync()
    learner.sync()
    close = {"rtol": 1e-10, "atol": 1e-10} if h.dtype == F64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(learner.state, h.detach(), **close)
    flat = h.reshape(size, -1)
    expected = grads_of(total, parameters)
    entries = [grads_of(entry, parameters) for entry in flat.flatten()]
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            learner.influence(name),
            torch.stack([entry[name].flatten() for entry in entries]).reshape(*flat.shape, -1),
            **close,
            msg=lambda m, n=name: f"{n}: {m}",
        )
        torch.testing.assert_close(parameter.grad, expected[name], **close, msg=lambda m, n=name: f"{n}: {m}")


def pytree_tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def grads_of(value: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if not value.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    grads = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(parameters.items(), grads, strict=True)
    }


def first_square(y: Any) -> Tensor:
    leaves = [leaf for leaf in pytree_tensors(y) if leaf.is_floating_point()]
    return sum((leaf.square().sum() for leaf in leaves), torch.zeros(()))


def floats(size: int) -> Tensor:
    return torch.randn(size, D_IN, dtype=F64)


def tokens(size: int) -> Tensor:
    return torch.randint(0, 5, (size, 2))


def tree(size: int) -> dict[str, Any]:
    return {"a": floats(size), "more": (torch.randint(0, 3, (size,)), torch.randn(size, dtype=F64))}


Output = namedtuple("Output", "value choice")


def _tied() -> Cell:
    cell = Cell(tanh_of(lambda c, h: c.recur(h) + c.again(h * h)), again=nn.Linear(4, 4))
    cell.again.weight = cell.recur.weight
    return cell


def _two_names() -> Cell:
    cell = Cell(tanh_of(lambda c, h: c.again(c.norm(c.recur(h)))), norm=nn.LayerNorm(4))
    cell.again, cell.also = cell.recur, cell.norm
    return cell


def _frozen() -> Cell:
    cell = Cell(tanh_of(lambda c, h: c.recur(h)))
    cell.recur.weight.requires_grad_(False)
    return cell


def _attention(c: Any, x: Tensor, h: Tensor) -> Tensor:
    seen = torch.stack([h, c.enter(x)], dim=1)
    return torch.tanh(c.attend(h.unsqueeze(1), seen, seen, need_weights=c.weights)[0].squeeze(1) + c.enter(x))


def _attending(weights: bool) -> Cell:
    cell = Cell(_attention, attend=nn.MultiheadAttention(4, 2, batch_first=True))
    cell.weights = weights
    return cell


def _one_row(c: Any, x: Tensor, h: Tensor) -> Any:
    writes = (x[:, :1] > 0).long()
    h = h.scatter(1, writes.unsqueeze(2).expand(-1, -1, 4), torch.tanh(c.enter(x) + c.recur(h.mean(1))).unsqueeze(1))
    return c.head(h.sum(1)), h, Sparsity(None, writes)


def _sometimes(c: Any, x: Tensor, h: Tensor) -> Any:
    if x["write"]:
        return _one_row(c, x["x"], h)
    return c.head(h.sum(1) + c.enter(x["x"])), h, Sparsity(rows(x["x"], 0, 1, 2), rows(x["x"]).long())


def _token_major(c: Any, x: Tensor, h: Tensor) -> Tensor:
    seen = c.recur(torch.stack([h, 0.5 * h])).tanh()  # (2, B, 4), as long as the batch is wide
    return torch.tanh(c.enter(x) + seen[0] + 2.0 * seen[1])


def _flat_token_major(c: Any, x: Tensor, h: Tensor) -> Tensor:
    first, second = c.recur(torch.cat([h, 0.5 * h])).tanh().chunk(2)
    return torch.tanh(c.enter(x) + first + 2.0 * second)


def _learned_tokens(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(c.enter(x) + h @ c.recur(c.tokens).T @ c.back)


def _checkpointed(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return checkpoint(lambda a: torch.tanh(a) * torch.sigmoid(a), c.enter(x) + c.recur(h), use_reentrant=False)


def _checkpointed_with_parameters(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return checkpoint(lambda x, h: torch.tanh(c.enter(x) + c.recur(h)), x, h, use_reentrant=False)


class OldSquare(torch.autograd.Function):
    """A square in the old style, which does not run under torch.func."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value * value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2.0 * ctx.saved_tensors[0] * grad


class LoneSquare(OldSquare):
    """Its backward pass looks at values, and so cannot be batched."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return OldSquare.backward(ctx, grad) if grad.abs().sum() > 0 else torch.zeros_like(grad)


class SilentSquare(OldSquare):
    """Its backward pass returns nothing where there is nothing to return."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return OldSquare.backward(ctx, grad) if grad.abs().sum() > 0 else None


def _square_of_one_unit(c: Any, h: Tensor) -> Tensor:
    return torch.cat([SilentSquare.apply(F.linear(h, c.one)), c.recur(h)[:, 1:]], dim=1)


LEGAL: dict[str, tuple[Callable[[], Cell], Callable[[int], Any]]] = {
    "in place after a linear": (lambda: Cell(lambda c, x, h: c.enter(x).relu_() + c.recur(h).tanh_()), floats),
    "x @ W and x @ W.T": (
        lambda: Cell(lambda c, x, h: torch.tanh(x @ c.w + h @ c.u.T), w=theta(3, 4), u=theta(4, 4)),
        floats,
    ),
    "W @ h": (lambda: Cell(tanh_of(lambda c, h: (c.u @ h.unsqueeze(2)).squeeze(2)), u=theta(4, 4)), floats),
    "einsum": (lambda: Cell(tanh_of(lambda c, h: torch.einsum("oi,bi->bo", c.u, h)), u=theta(4, 4)), floats),
    "tied": (_tied, floats),
    "one module, two names": (_two_names, floats),
    "frozen": (_frozen, floats),
    "used twice": (lambda: Cell(tanh_of(lambda c, h: c.recur(torch.tanh(c.recur(h))))), floats),
    "used in two ways": (lambda: Cell(tanh_of(lambda c, h: c.recur(h) + c.recur.weight.diagonal() * h)), floats),
    "one number a sample": (lambda: Cell(lambda c, x, h: (h.sum(dim=1), torch.tanh(c.enter(x) + c.recur(h)))), floats),
    "never used": (lambda: Cell(tanh_of(lambda c, h: c.recur(h)), idle=theta(3, 2)), floats),
    "scalar": (lambda: Cell(tanh_of(lambda c, h: c.gain * c.recur(h)), gain=theta()), floats),
    "bias added by hand": (lambda: Cell(tanh_of(lambda c, h: c.recur(h) + c.shift), shift=theta(4)), floats),
    "layer norm": (lambda: Cell(tanh_of(lambda c, h: c.norm(c.recur(h))), norm=nn.LayerNorm(4)), floats),
    "attention with weights": (lambda: _attending(True), floats),
    "GRU": (lambda: Cell(lambda c, x, h: c.gru(x, h), gru=nn.GRUCell(D_IN, 4)), floats),
    "convolution": (
        lambda: Cell(
            lambda c, x, h: (c.head(h[:, 0]), torch.tanh(c.conv(h) + c.enter(x)[:, None])),
            2,
            4,
            conv=nn.Conv1d(2, 2, 3, padding=1),
        ),
        floats,
    ),
    "a state (B, n, a, b)": (
        lambda: Cell(
            lambda c, x, h: (
                c.head(h.mean(1).flatten(1)),
                torch.tanh(c.enter(x).reshape(-1, 1, 2, 2) + c.recur(h.flatten(2)).reshape(h.shape)),
            ),
            2,
            2,
            2,
        ),
        floats,
    ),
    "integer x": (
        lambda: Cell(
            lambda c, x, h: torch.tanh(c.embed(x)[:, 0] - c.embed(x)[:, 1] + c.recur(h)), embed=nn.Embedding(5, 4)
        ),
        tokens,
    ),
    "padded embedding": (
        lambda: Cell(lambda c, x, h: torch.tanh(c.e(x).sum(1) + c.recur(h)), e=nn.Embedding(5, 4, padding_idx=0)),
        tokens,
    ),
    "x as a tree": (
        lambda: Cell(lambda c, x, h: torch.tanh(c.enter(x["a"]) + (x["more"][1] + x["more"][0])[:, None] * c.recur(h))),
        tree,
    ),
    "y as a named tuple": (
        lambda: Cell(lambda c, x, h: (Output(c.head(h), h.argmax(1)), torch.tanh(c.enter(x) + c.recur(h)))),
        floats,
    ),
    "y as a dict with the state": (
        lambda: Cell(
            lambda c, x, h: ({"y": c.head(h), "h": h, "k": [h.argmax(1)]}, torch.tanh(c.enter(x) + c.recur(h)))
        ),
        floats,
    ),
    "y not of θ": (lambda: Cell(lambda c, x, h: ((c.head(h), x), torch.tanh(c.enter(x) + c.recur(h)))), floats),
    "all rows read, one written": (lambda: Cell(_one_row, 3, 4), floats),
    "no rows written at times": (
        lambda: Cell(_sometimes, 3, 4),
        lambda size: {"x": floats(size), "write": random.random() < 0.5},
    ),
    "nothing ever written": (
        lambda: Cell(lambda c, x, h: (c.head(h[:, 0] + c.enter(x)), h, Sparsity(None, rows(x).long())), 3, 4),
        floats,
    ),
    "low rank": (
        lambda: Cell(
            tanh_of(lambda c, h: F.linear(h, c.u @ c.v) @ c.back), u=theta(6, 2), v=theta(2, 4), back=theta(6, 4)
        ),
        floats,
    ),
    "token-major": (lambda: Cell(_token_major), floats),
    "flat token-major": (lambda: Cell(_flat_token_major), floats),
    "learned tokens": (lambda: Cell(_learned_tokens, tokens=theta(6, 4), back=theta(6, 4)), floats),
    "weight norm": (
        lambda: Cell(tanh_of(lambda c, h: c.r(h)), r=nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        floats,
    ),
    "old-style function of the state": (lambda: Cell(tanh_of(lambda c, h: c.recur(OldSquare.apply(h)))), floats),
    "old-style function of a linear": (lambda: Cell(tanh_of(lambda c, h: OldSquare.apply(c.recur(h)))), floats),
    "checkpointed": (lambda: Cell(_checkpointed), floats),
    "attention without weights": (lambda: _attending(False), floats),
    "x of two dtypes": (
        lambda: Cell(
            lambda c, x, h: torch.tanh(c.enter(x.double() * (2 if x.is_floating_point() else -1)) + c.recur(h))
        ),
        lambda size: floats(size) if random.random() < 0.5 else (3 * floats(size)).round().long(),
    ),
    "one bias for all": (lambda: Cell(tanh_of(lambda c, h: F.linear(h, c.u, c.b)), u=theta(4, 4), b=theta(1)), floats),
    "a vector as weight": (lambda: Cell(tanh_of(lambda c, h: F.linear(h, c.u)[:, None]), u=theta(4)), floats),
}


def _legal_cases() -> list[Any]:
    cases = []
    for name, (build, draw) in LEGAL.items():
        for block, size in ((1, 2), (3, 2), (3, 1)):
            cases.append(pytest.param(build, draw, block, size, id=f"{name}, block {block}, batch {size}"))
    return cases


@pytest.mark.parametrize(("build", "draw", "block", "size"), _legal_cases())
def test_an_unusual_cell_is_exact(build, draw, block, size):
    torch.manual_seed(1)
    random.seed(3)
    check_exact(build(), [draw(size) for _ in range(5)], first_square, block=block)


OLD_STYLE = {
    "of a parameter": lambda: Cell(tanh_of(lambda c, h: OldSquare.apply(c.gain) * c.recur(h)), gain=theta(4)),
    "beside a parameter": lambda: Cell(tanh_of(lambda c, h: OldSquare.apply(h) * c.gain), gain=theta(4)),
    "that cannot be batched": lambda: Cell(tanh_of(lambda c, h: LoneSquare.apply(c.recur(h)).roll(1, 1))),
    "that may return nothing": lambda: Cell(tanh_of(_square_of_one_unit), one=theta(1, 4)),
}


@pytest.mark.parametrize("block", [1, 3])
def test_parameters_inside_a_checkpoint_are_refused(block):
    torch.manual_seed(1)
    learner = rtrl.BlockRTRL(Cell(_checkpointed_with_parameters), B, block=block)
    learner.backward(first_square(learner.step(floats(B))))
    with refused(learner, CellError, "checkpoints activations .* remove the checkpoint"):
        learner.sync()


@pytest.mark.parametrize(("block", "size"), [(1, 2), (3, 2), (3, 1)])
@pytest.mark.parametrize("build", OLD_STYLE.values(), ids=OLD_STYLE)
def test_an_old_style_function_is_exact_and_said_to_be_slow(build, block, size):
    torch.manual_seed(1)
    with pytest.warns(PerformanceWarning, match="row by row|sample by sample"):
        check_exact(build(), [floats(size) for _ in range(STEPS - 1)], first_square, block=block, structure="off")


def test_a_backward_pass_that_may_return_nothing_is_exact_row_by_row(monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr(untapped, "_ROWS_CHUNK", 1)
    with pytest.warns(PerformanceWarning, match="row by row"):
        check_exact(OLD_STYLE["that may return nothing"](), [floats(1) for _ in range(4)], first_square, block=2)


@pytest.mark.parametrize("block", [1, 3])
def test_single_precision_is_exact_to_its_rounding(block):
    torch.manual_seed(1)
    check_exact(
        Cell(tanh_of(lambda c, h: c.recur(h))).float(),
        [floats(B).float() for _ in range(STEPS - 1)],
        first_square,
        block=block,
    )


def test_a_cell_with_learned_tokens_is_exact_when_blocks_are_closed_early():
    torch.manual_seed(1)
    cell = Cell(
        _learned_tokens, tokens=theta(4, 4), back=theta(4, 4)
    )  # as many as samples in a run of two steps, but not of four
    check_exact(cell, [floats(B) for _ in range(12)], first_square, block=4, syncs=(3, 5))


@pytest.mark.parametrize("block", [1, 3])
def test_learned_tokens_behind_a_gate_that_opens_later_are_exact(block):
    torch.manual_seed(1)
    parts = {"gate": nn.Parameter(torch.zeros(())), "tokens": theta(6, 4), "back": theta(6, 4)}
    cell, xs = Cell(tanh_of(lambda c, h: 0.5 * h + c.gate * (h @ c.recur(c.tokens).T @ c.back)), **parts), stream()
    learner = rtrl.BlockRTRL(cell, B, block=block)
    for x in xs:
        learner.backward(learner.step(x).sum())
    learner.sync()
    with torch.no_grad():
        cell.gate.fill_(1.0)
    cell.zero_grad()
    learner.reset()
    h, total = learner.state, torch.zeros(())
    for x in xs:
        learner.backward(learner.step(x).square().sum())
        y, h = cell(x, h)
        total = total + y.square().sum()
    learner.sync()
    expected = grads_of(total, dict(cell.named_parameters()))
    for name, parameter in cell.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("build", [make, mixture])
@pytest.mark.parametrize("block", [1, 2])
def test_steps_taken_without_gradients_are_exact(block, build, mode):
    def run(mode: Callable[[], Any]) -> list[Any]:
        learner, xs = build(block=block), stream()
        learner.backward(learner.step(xs[0]).square().sum())
        for x in xs[1:5]:
            with mode():
                y = learner.step(x.clone())
            learner.backward(y.square().sum())
        return finish(learner, xs[5:])

    assert_same(run(nullcontext), run(mode))


@pytest.mark.parametrize("block", [1, 2])
def test_a_first_step_under_inference_mode_is_exact(block):
    def run(mode: Callable[[], Any]) -> list[Any]:
        learner, xs = make(block=block), stream()
        with mode():
            y = learner.step(xs[0].clone())
        learner.backward(y.square().sum())
        return finish(learner, xs[1:])

    assert_same(run(nullcontext), run(torch.inference_mode))


CALLS = {
    "influence": lambda learner: learner.influence("enter.weight"),
    "sync": lambda learner: learner.sync(),
    "reset": lambda learner: learner.reset(torch.tensor([True, False])),
    "load": lambda learner: learner.load_state_dict(learner.state_dict()),
}


@pytest.mark.parametrize(
    "call",
    CALLS.values(),
    ids=CALLS,
)
def test_what_is_called_under_inference_mode_changes_nothing(call):
    def run(mode: Callable[[], Any]) -> list[Any]:
        learner, xs = make(), stream()
        for x in xs[:5]:
            learner.backward(learner.step(x).square().sum())
        with mode():
            call(learner)
        return finish(learner, xs[5:])

    assert_same(run(nullcontext), run(torch.inference_mode))


@pytest.mark.parametrize("block", [1, 2])
def test_warming_up_without_gradients_changes_nothing(block):
    def run(warm: bool) -> list[Any]:
        learner, xs = make(block=block), stream()
        with torch.set_grad_enabled(not warm):
            for x in xs[:5]:
                learner.step(x)
        return finish(learner, xs[5:])

    assert_same(run(False), run(True))


@pytest.mark.parametrize("reference", ["learner", "baseline", "oracle", "check"])
def test_a_module_held_under_two_names_is_left_as_it_was(reference: str) -> None:
    cell = _two_names()
    before = {name: (p, p.detach().clone()) for name, p in cell.named_parameters(remove_duplicate=False)}
    xs = torch.randn(4, B, D_IN, dtype=F64)
    if reference == "oracle":
        oracles.dense_rtrl(cell, xs, lambda t, y: y.square().sum())
    elif reference == "check":
        rtrl.testing.check_cell(cell, list(xs))
    else:
        learner = rtrl.BlockRTRL(cell, B, block=2) if reference == "learner" else DenseRTRL(cell, B)
        for x in xs:
            learner.backward(learner.step(x).square().sum())
        learner.sync()
    for name, p in cell.named_parameters(remove_duplicate=False):
        assert p is before[name][0], name
        assert torch.equal(p, before[name][1]), name
