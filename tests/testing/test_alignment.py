"""The comparison of learners, against the same numbers written out from oracles, and against what each planted error
must show."""

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers.running import live_tensor_bytes, trainable
from helpers.strategies import normal
from helpers.toy_cells import OddCell, PlainRNN, seeded
from torch import Tensor, nn
from torch.nn import functional as F

import oracles
import rtrl
from rtrl.errors import ConfigError, LossError, NonFiniteError, ParameterChangedError, RTRLError
from rtrl.learners import BPTT, TBPTT, UORO, DenseRTRL
from rtrl.testing import Alignment, Alignments, alignment

STEPS = 7
XS = normal(3, STEPS, 2, 2)
Gradient = dict[str, Tensor]


def rnn() -> nn.Module:
    return seeded(PlainRNN(2, 3), 1, scale=1.2)


def squares(t: int, y: Tensor) -> Tensor:
    """A loss at every step that no symmetry makes zero."""
    return (y - 0.1 * t).square().sum() + y.sum()


def walk(xs: Any = XS, loss: Any = squares) -> list[tuple[Tensor, Any]]:
    return [(x, lambda y, t=t: loss(t, y)) for t, x in enumerate(xs)]


def odd(t: int, y: Tensor) -> Tensor | None:
    return squares(t, y) if t % 2 else None


class Edited:
    """A learner with no more than the three methods, which changes what an exact one delivers."""

    def __init__(self, cell: nn.Module, batch: int, edit: Callable[[Tensor], Tensor | None]) -> None:
        self._inner, self._cell, self._edit = rtrl.BlockRTRL(cell, batch, block=8), cell, edit

    def step(self, x: Any) -> Any:
        return self._inner.step(x)

    def backward(self, loss: Tensor) -> None:
        self._inner.backward(loss)

    def sync(self) -> None:
        before = {name: p.grad for name, p in trainable(self._cell).items()}
        for p in trainable(self._cell).values():
            p.grad = None
        self._inner.sync()
        for name, p in trainable(self._cell).items():
            new, old = None if p.grad is None else self._edit(p.grad), before[name]
            p.grad = new if old is None or new is None else old + new


def edited(edit: Callable[[Tensor], Tensor | None]) -> Callable[[nn.Module, int], Edited]:
    return lambda cell, batch: Edited(cell, batch, edit)


def noisy(size: float, factor: float = 1.0) -> Callable[[nn.Module, int], Edited]:
    """Unbiased noise from PyTorch's global generator, on top of a part of the exact gradient."""
    return edited(lambda g: factor * g + size * torch.randn_like(g))


class Unrolled:
    """What a stranger might bring: a plain unrolled graph, with outputs that depend on each other."""

    def __init__(self, cell: Any, batch: int) -> None:
        self._cell, self._h = cell, cell.init_state(batch)

    def step(self, x: Tensor) -> dict[str, Tensor]:
        y, self._h = self._cell(x, self._h)
        return {"y": y, "share": y.softmax(dim=-1)}

    def backward(self, loss: Tensor) -> None:
        loss.backward(retain_graph=True)

    def sync(self) -> None:
        return


# ---------------------------------------------------------------------- learners that are exact


@pytest.mark.parametrize("make", [rtrl.BlockRTRL, BPTT, DenseRTRL])
@pytest.mark.parametrize("every", [1, 3, STEPS, 50])
@pytest.mark.parametrize("exact", [None, BPTT])
def test_exact_learners_agree(make: Any, every: int, exact: Any, device: torch.device) -> None:
    stream = [(x.to(device), loss) for x, loss in walk()]
    found = alignment({"it": make}, rnn().to(device), stream, every=every, exact=exact)["it"]
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.norm_ratio == pytest.approx(1, abs=1e-12)
    assert found.bias < 1e-12
    assert found.cosines == pytest.approx([1] * math.ceil(STEPS / every), abs=1e-12)
    assert all(part.bias < 1e-12 for part in found.by_parameter.values())


def test_a_learner_in_single_precision_is_exact_to_its_own_rounding() -> None:
    stream = [(x.float(), loss) for x, loss in walk()]
    found = alignment({"it": BPTT}, rnn().float(), stream, every=2)["it"]
    assert 0 < found.bias < 1e-5
    assert found.cosine == pytest.approx(1, abs=1e-9)


def test_gradients_whose_squares_underflow_are_compared_all_the_same() -> None:
    tiny = walk(loss=lambda t, y: 1e-200 * squares(t, y))
    found = alignment({"it": BPTT, "twice": edited(lambda g: 2 * g)}, rnn(), tiny, every=3)
    assert found["it"].cosines == pytest.approx([1, 1, 1])
    assert (found["twice"].cosine, found["twice"].norm_ratio) == pytest.approx((1, 2))


def test_outputs_that_depend_on_each_other_count_once() -> None:
    """The loss is a function of both; a graph between them must not bring its gradient in twice."""
    cell = rnn()
    stream = [(x, lambda y: (y["y"] * y["share"]).square().sum()) for x in XS]

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = cell

        def init_state(self, batch: int) -> Tensor:
            return cell.init_state(batch)

        def forward(self, x: Tensor, h: Tensor) -> Any:
            y, h = self.inner(x, h)
            return {"y": y, "share": y.softmax(dim=-1)}, h

    def stranger(both: Any, batch: int) -> Unrolled:
        return Unrolled(both.inner, batch)

    assert alignment({"it": stranger}, Both(), stream, every=2)["it"].bias < 1e-12


# ---------------------------------------------------------------------- the numbers, by hand


def truncated(cell: Any, losses: Any) -> Gradient:
    """Each loss reaches its own step alone."""
    parameters, h = trainable(cell), cell.init_state(2)
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for t, x in enumerate(XS):
        y, h = cell(x, h.detach())
        if (value := losses(t, y)) is not None:
            grads = torch.autograd.grad(value, list(parameters.values()), materialize_grads=True, retain_graph=True)
            total = {name: total[name] + g for name, g in zip(total, grads, strict=True)}
    return total


def flat(gradient: Gradient) -> Tensor:
    return torch.cat([g.flatten() for g in gradient.values()])


def cosine(one: Tensor, two: Tensor) -> float:
    return float(one @ two / (one.norm() * two.norm()))


@pytest.mark.parametrize("loss", [squares, odd])
@pytest.mark.parametrize("every", [1, 3])
def test_truncation_has_the_numbers_of_its_definition(loss: Any, every: int) -> None:
    cell = rnn()
    found = alignment({"it": lambda c, b: TBPTT(c, b, 1)}, cell, walk(loss=loss), every=every)["it"]
    mine, exact = truncated(cell, loss), oracles.bptt(cell, XS, loss)
    one, two = flat(mine), flat(exact)
    assert found.cosine == pytest.approx(cosine(one, two), abs=1e-12)
    assert found.norm_ratio == pytest.approx(float(one.norm() / two.norm()), rel=1e-12)
    assert found.bias == pytest.approx(float((one - two).norm() / two.norm()), rel=1e-10)
    assert found.bias > 0.05
    assert list(found.by_parameter) == list(exact)
    for name, part in found.by_parameter.items():
        a, b = mine[name].flatten(), exact[name].flatten()
        assert part.cosine == pytest.approx(cosine(a, b), abs=1e-12)
        assert part.norm_ratio == pytest.approx(float(a.norm() / b.norm()), rel=1e-10)
        assert part.bias == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-8, abs=1e-12)
        assert part.spread is None
    pieces, steps = [], []
    for first in range(0, STEPS, every):
        inside = range(first, min(first + every, STEPS))
        some = lambda t, y, inside=inside: loss(t, y) if t in inside else None
        if any(loss(t, torch.ones(1)) is not None for t in inside):
            pieces.append(cosine(flat(truncated(cell, some)), flat(oracles.bptt(cell, XS, some))))
            steps.append(inside[-1])
    assert found.cosines == pytest.approx(pieces, abs=1e-12)
    assert found.steps == tuple(steps)


@pytest.mark.parametrize("every", [1, 3])
def test_scaled_negated_and_silent_learners(every: int) -> None:
    learners = {"twice": edited(lambda g: 2 * g), "minus": edited(lambda g: -g), "silent": edited(lambda g: None)}
    found = alignment(learners, rnn(), walk(), every=every)
    assert list(found) == list(learners)
    for name, expected in {"twice": (1, 2, 1), "minus": (-1, 1, 2)}.items():
        it = found[name]
        assert (it.cosine, it.norm_ratio, it.bias) == pytest.approx(expected, abs=1e-12)
        assert it.cosines == pytest.approx([expected[0]] * len(it.steps), abs=1e-12)
    silent = found["silent"]
    assert math.isnan(silent.cosine)
    assert (silent.norm_ratio, silent.bias, silent.spread) == (0, 1, None)
    assert len(silent.cosines) == math.ceil(STEPS / every)
    assert all(map(math.isnan, silent.cosines))
    assert all(math.isnan(part.cosine) and part.bias == 1 for part in silent.by_parameter.values())


def test_a_parameter_that_earns_nothing_has_no_cosine() -> None:
    class Idle(PlainRNN):
        def __init__(self) -> None:
            super().__init__(2, 3)
            self.idle = nn.Parameter(torch.ones(2))
            self.empty = nn.Parameter(torch.ones(0))

    cell = seeded(Idle(), 1)
    found = alignment({"it": BPTT, "noisy": noisy(0.1)}, cell, walk(), exact=BPTT)
    assert found["it"].bias == 0
    assert all(map(math.isnan, found["it"].by_parameter["idle"][:3]))
    assert "empty" not in found["it"].by_parameter
    nothing, bias = found["noisy"].by_parameter["idle"][::2]
    assert math.isnan(nothing)
    assert bias in (math.inf,) or math.isnan(bias)


def test_deliveries_without_an_exact_gradient_are_left_out_for_all_but_count_in_the_total() -> None:
    """Losses at two steps alone; the noisy learner delivers something all the time."""
    stream = [(x, (lambda y: y.sum()) if t in (1, 4) else None) for t, x in enumerate(XS)]

    class Always(Edited):
        def sync(self) -> None:
            super().sync()
            for p in trainable(self._cell).values():
                p.grad = torch.ones_like(p) if p.grad is None else p.grad + 1

    found = alignment({"it": BPTT, "always": lambda c, b: Always(c, b, lambda g: g)}, rnn(), stream)
    assert found["it"].steps == found["always"].steps == (1, 4)
    assert len(found["it"].cosines) == len(found["always"].cosines) == 2
    exact = flat(oracles.bptt(rnn(), XS, lambda t, y: y.sum() if t in (1, 4) else None))
    assert found["always"].bias == pytest.approx(STEPS * len(exact) ** 0.5 / float(exact.norm()))


# ---------------------------------------------------------------------- chance


def test_noise_without_bias_averages_out_and_its_spread_stays() -> None:
    """With σ on each of P numbers at each of D deliveries, spread² is σ² D P / ‖E‖² on average, and bias² R times less.
    Seeds are fixed, so the verdict never changes."""
    cell, size, xs = rnn(), 1.0, XS[:3]
    exact = flat(oracles.bptt(cell, xs, squares))
    expected = size * math.sqrt(3 * len(exact)) / float(exact.norm())
    for repeats in (4, 16, 64):
        found = alignment({"fair": noisy(size), "biased": noisy(size, 0.7)}, cell, walk(xs), repeats=repeats)
        for it in found.values():
            assert it.repeats == repeats
            assert it.spread == pytest.approx(expected, rel=0.2 if repeats == 4 else 0.1)
            assert it.by_chance == pytest.approx(it.spread / math.sqrt(repeats))
        assert found["fair"].bias == pytest.approx(expected / math.sqrt(repeats), rel=0.4)
        assert found["biased"].bias == pytest.approx(math.hypot(0.3, expected / math.sqrt(repeats)), rel=0.2)
    assert found["fair"].norm_ratio == pytest.approx(math.hypot(1, expected), rel=0.02), (
        "of one repeat, not of the mean"
    )
    assert found["fair"].cosine == pytest.approx(1 / math.hypot(1, expected), rel=0.01)
    weight = found["fair"].by_parameter["recurrent"]
    assert weight.spread is not None
    assert 0.4 < weight.bias / (weight.spread / 8) < 1.6


class Forgetful(UORO):
    """What has been carried is dropped at every step."""

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return super()._advance(0 * dynamics, immediate)


class ForgetfulMean(DenseRTRL):
    """What that is on average."""

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return super()._advance(0 * dynamics, immediate)


def test_uoro_has_spread_and_no_bias_and_one_that_forgets_has_both() -> None:
    cell, xs = seeded(PlainRNN(2, 2), 2, scale=2.0), normal(2, 4, 1, 2)
    stream = walk(xs, lambda t, y: squares(t, y) if t > 1 else None)
    few, many = (
        alignment({"uoro": UORO, "forgetful": Forgetful}, cell, stream, every=4, repeats=repeats)
        for repeats in (8, 200)
    )
    bias = alignment({"mean": ForgetfulMean}, cell, stream, every=4)["mean"].bias
    spreads = [many[name].spread for name in ("uoro", "forgetful")]
    fair, forgetful = (spread / 200**0.5 for spread in spreads if spread is not None)
    assert [few[name].spread for name in ("uoro", "forgetful")] == pytest.approx(spreads, rel=0.4)
    assert few["uoro"].bias > 3 * many["uoro"].bias
    assert many["uoro"].bias < 1.5 * fair
    assert bias > 3 * forgetful, "enough repeats to tell it from chance"
    assert many["forgetful"].bias == pytest.approx(math.hypot(bias, forgetful), rel=0.2)
    assert few["forgetful"].bias < 1.5 * many["forgetful"].bias


def test_learners_that_leave_nothing_to_chance_have_no_spread() -> None:
    found = alignment({"it": lambda c, b: TBPTT(c, b, 2)}, rnn(), walk(), repeats=3)["it"]
    alone = alignment({"it": lambda c, b: TBPTT(c, b, 2)}, rnn(), walk())["it"]
    assert (found.spread, found.by_chance) == (0.0, 0.0)
    assert (alone.spread, alone.by_chance) == (None, None)
    assert (found.cosine, found.bias) == pytest.approx((alone.cosine, alone.bias), rel=1e-14)


def test_draws_are_those_of_the_seed_and_of_nobody_else() -> None:
    def found(learners: Any, **options: Any) -> Alignments:
        return alignment(learners, rnn(), walk(), every=3, **options)

    a = found({"a": noisy(1)}, repeats=2)["a"]
    torch.manual_seed(99)
    again = found({"z": noisy(1), "b": UORO, "a": noisy(1)}, repeats=2)
    assert again["a"] == a, "whatever other learners draw, and whatever the caller drew before"
    assert again["z"] != a and again["z"].cosine != a.cosine, "two learners of one rule draw for themselves"
    assert found({"a": noisy(1)}, repeats=2, seed=1)["a"].cosine != a.cosine
    assert a.spread is not None and a.spread > 0.01, "two repeats differ"


def test_draws_from_numpy_and_python_are_reproducible_too() -> None:
    both = edited(lambda g: g * random.random() * np.random.rand())  # noqa: NPY002
    one, two = (alignment({"it": both}, rnn(), walk(), repeats=2)["it"] for _ in range(2))
    assert one == two
    assert one.spread is not None and one.spread > 0


def test_a_stream_that_draws_is_reproducible_and_a_loss_that_draws_is_one_loss_for_all() -> None:
    seen: list[Tensor] = []

    def drawing() -> Iterator[Any]:
        for _ in range(5):
            seen.append(torch.randn(2, 2, dtype=torch.float64))
            yield seen[-1], lambda y: (y * torch.randn_like(y)).sum()

    found = alignment({"noisy": noisy(0.1), "it": BPTT}, rnn(), drawing(), repeats=2)
    alignment({"it": BPTT}, rnn(), drawing())
    assert found["it"].bias < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(seen[:5], seen[5:], strict=True))
    assert not torch.equal(seen[0], seen[1])


# ---------------------------------------------------------------------- live


def test_all_walk_in_lockstep_and_the_stream_is_taken_once() -> None:
    order: list[str] = []

    def stream() -> Iterator[Any]:
        for t in itertools.count():
            order.append(f"x{t}")
            yield XS[t % STEPS], lambda y: y.sum()

    class Noted(Edited):
        def step(self, x: Any) -> Any:
            order.append("step")
            return super().step(x)

        def sync(self) -> None:
            order.append("sync")
            super().sync()

    make = lambda cell, batch: Noted(cell, batch, lambda g: g)
    alignment({"a": make, "b": make}, rnn(), itertools.islice(stream(), 3), every=2)
    assert order == ["x0", "step", "step", "x1", "step", "step", "sync", "sync", "x2", "step", "step", "sync", "sync"]


def test_deliveries_are_told_as_they_come() -> None:
    told: list[tuple[int, dict[str, float]]] = []
    stream = [(x, None if t < 2 else lambda y: y.square().sum()) for t, x in enumerate(XS)]
    learners = {"cut": lambda c, b: TBPTT(c, b, 1), "uoro": UORO}
    found = alignment(learners, rnn(), stream, every=2, repeats=2, on_delivery=lambda *news: told.append(news))
    assert [step for step, _ in told] == [1, 3, 5, 6]
    assert all(math.isnan(value) for value in told[0][1].values())
    assert told[-1][1] == pytest.approx({name: it.cosine for name, it in found.items()}, abs=1e-12)
    start = alignment(learners, rnn(), stream[:4], every=2, repeats=2)
    assert told[1][1] == pytest.approx({name: it.cosine for name, it in start.items()}, abs=1e-12)
    assert found["cut"].steps == (3, 5, 6)


def test_the_callers_cell_may_be_trained_meanwhile() -> None:
    """The comparison is of the parameters as they were when it began."""
    cell = rnn()
    expected = alignment({"it": lambda c, b: TBPTT(c, b, 2)}, cell, walk(), every=3)

    def training() -> Iterator[Any]:
        for item in walk():
            with torch.no_grad():
                cell.recurrent.add_(0.1)
            yield item

    assert alignment({"it": lambda c, b: TBPTT(c, b, 2)}, cell, training(), every=3) == expected


def test_a_learner_sees_the_value_of_the_loss() -> None:
    seen: list[float] = []

    class Looking(Edited):
        def backward(self, loss: Tensor) -> None:
            seen.append(float(loss.detach()))
            super().backward(loss)

    given: list[float] = []

    def loss(y: Tensor) -> Tensor:
        value = (y - 1).square().sum() + 3
        given.append(float(value.detach()))
        return value

    alignment({"it": lambda c, b: Looking(c, b, lambda g: g)}, rnn(), [(x, loss) for x in XS])
    assert seen == pytest.approx(given[1::2], rel=1e-12)


def reached(make: Any, steps: int) -> tuple[int, int]:
    """Bytes of tensors reached in the middle and at the end of a long stream."""
    held: dict[int, int] = {}

    def note(step: int, cosines: dict[str, float]) -> None:
        if step + 1 in (steps // 10, steps):
            held[step + 1] = live_tensor_bytes()

    stream = ((torch.ones(1, 2, dtype=torch.float64), lambda y: y.sum()) for _ in range(steps))
    exact = lambda cell, batch: rtrl.BlockRTRL(cell, batch, block=5)
    alignment({"it": make, "noisy": noisy(1)}, rnn(), stream, every=5, exact=exact, on_delivery=note)
    return held[steps // 10], held[steps]


def test_what_is_held_does_not_grow_with_the_stream() -> None:
    middle, end = reached(lambda c, b: TBPTT(c, b, 1), 200)
    assert middle == end
    middle, end = reached(BPTT, 50)
    assert end > middle, "the control: a learner that keeps its past is seen"


def test_the_result_reads_as_a_table() -> None:
    found = alignment({"exact": BPTT, "a long name": noisy(1)}, rnn(), walk(), repeats=2)
    head, first, second = str(found).splitlines()
    assert head.split() == ["learner", "cosine", "norm", "ratio", "bias", "by", "chance", "spread"]
    assert first.startswith("exact        1.0000")
    assert second.startswith("a long name  ")
    assert len({len(line) for line in (head, first, second)}) == 1
    alone = alignment({"exact": BPTT}, rnn(), walk())
    assert str(alone).splitlines()[1].endswith(" -")
    assert isinstance(alone["exact"], Alignment)


# ---------------------------------------------------------------------- what is the caller's


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nothing_of_the_callers_changes(mode: Any) -> None:
    cell, head = seeded(OddCell(2, 3), 1), nn.Linear(3, 1).double()
    cell.weight.grad = torch.ones_like(cell.weight)
    cell.eval()
    cell.norm.weight.requires_grad_(False)
    held, xs = copy.deepcopy((cell.state_dict(), head.state_dict())), XS.clone()
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    attributes = set(vars(cell))

    class Rough(Edited):
        def step(self, x: Any) -> Any:
            y = super().step(x)
            x.zero_()
            return y

    def loss(y: Any) -> Tensor:
        penalty = cell.weight.square().sum() + torch.rand(()) + random.random()
        return head(y.extra["product"]).square().sum() + y.value.sum() + penalty

    told: list[bool] = []

    def note(step: int, cosines: Any) -> None:
        told.append(torch.equal(torch.get_rng_state(), before[0]))

    with mode():
        rough = lambda c, b: Rough(c, b, lambda g: g + torch.rand_like(g))
        found = alignment(
            {"rough": rough, "it": BPTT}, cell, [(x, loss) for x in xs], every=2, repeats=2, on_delivery=note
        )
    assert found["it"].bias < 1e-12
    assert set(found["it"].by_parameter) == set(trainable(cell))
    now = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())  # noqa: NPY002
    assert torch.equal(before[0], now[0])
    assert before[1:] == now[1:]
    assert all(told)
    torch.testing.assert_close((cell.state_dict(), head.state_dict()), held, rtol=0, atol=0)
    assert torch.equal(xs, XS)
    assert torch.equal(cell.weight.grad, torch.ones_like(cell.weight))
    assert all(p.grad is None for p in [*head.parameters(), *(q for q in cell.parameters() if q is not cell.weight)])
    assert set(vars(cell)) == attributes


def test_random_states_are_put_back_when_something_fails() -> None:
    def failing() -> Iterator[Any]:
        yield XS[0], lambda y: y.sum()
        torch.rand(3)
        raise OSError("the stream is gone")

    cell = rnn()
    before = torch.get_rng_state()
    for stream in (failing(), [(XS[0], lambda y: (torch.rand(3), 1 / 0))]):
        with pytest.raises((OSError, ZeroDivisionError)):
            alignment({"a": noisy(1)}, cell, stream)
        assert torch.equal(before, torch.get_rng_state())


# ---------------------------------------------------------------------- errors

ONE = [(XS[0], lambda y: y.sum())]
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("no mapping", {"learners": [BPTT]}, "learners must map"),
    ("no learners", {"learners": {}}, "at least one name"),
    ("a name that is none", {"learners": {1: BPTT}}, "string that is not empty, got 1"),
    ("an empty name", {"learners": {"": BPTT}}, "not empty"),
    ("no callable", {"learners": {"a": 3}}, "learner 'a' must be a callable .*, got int"),
    ("no learner", {"learners": {"a": lambda c, b: c}}, "learner 'a', repeat 0: a PlainRNN has no method step"),
    ("exact is none", {"exact": "BPTT"}, "exact must be callable or None, got str"),
    ("exact is no learner", {"exact": lambda c, b: None}, "the exact learner: a NoneType has no method step"),
    ("no callback", {"on_delivery": 1}, "on_delivery must be callable"),
    ("no module", {"cell": lambda x, h: (x, h)}, "torch.nn.Module, got function"),
    ("a lazy module", {"cell": nn.LazyLinear(3)}, "without a shape yet"),
    ("no parameters", {"cell": nn.Tanh()}, "no parameter that requires a gradient"),
    ("frozen", {"cell": rnn().requires_grad_(False)}, "no parameter that requires a gradient"),
    ("a tensor", {"stream": XS}, "iterable of pairs"),
    ("no stream", {"stream": None}, "iterable of pairs .*, got NoneType"),
    ("an empty stream", {"stream": iter([])}, "the stream is empty"),
    ("no loss", {"stream": [(x, None) for x in XS]}, "none of the 7 steps of the stream has a loss"),
    ("a loss of None", {"stream": [(x, lambda y: None) for x in XS]}, "none of the 7 steps"),
    ("a loss of zero", {"stream": [(x, lambda y: 0 * y.sum()) for x in XS]}, "gradient of the whole stream is zero"),
    ("x alone", {"stream": [*ONE, XS[1]]}, r"step 1: the stream must consist of pairs \(x, loss\), got Tensor"),
    ("a triple", {"stream": [(XS[0], None, 1)]}, "step 0: the stream must consist of pairs"),
    ("a loss that is a tensor", {"stream": [(XS[0], XS[0].sum())]}, "step 0: a loss must be a function of y"),
    ("no tensor in x", {"stream": [(3, None)]}, "step 0: x must be a tree of tensors"),
    ("a scalar x", {"stream": [(torch.ones(()), None)]}, "step 0: x must be a tree of tensors"),
    *((f"every {n!r}", {"every": n}, "every must be a positive integer") for n in (0, -1, 1.0, True, None)),
    *((f"repeats {n!r}", {"repeats": n}, "repeats must be a positive integer") for n in (0, 2.0, False)),
    *((f"seed {n!r}", {"seed": n}, "seed must be an integer") for n in (-1, 2**32, 0.5, True, None)),
]


@pytest.mark.parametrize(("arguments", "match"), [pytest.param(*case[1:], id=case[0]) for case in BAD])
def test_bad_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        alignment(**{"learners": {"a": BPTT}, "cell": rnn(), "stream": walk(), **arguments})


def test_a_cell_that_cannot_be_copied_is_refused() -> None:
    cell = rnn()
    cell.kept = cell.recurrent * 2
    with pytest.raises(ConfigError, match="cannot be copied"):
        alignment({"a": BPTT}, cell, walk())


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda y: y, r"step 1: a loss must be a scalar tensor, or None, got shape \(2, 2\)"),
        (lambda y: 1.0, "step 1: a loss must be a scalar tensor, or None, got float"),
        (lambda y: y.detach().sum(), "loss of step 1 does not depend on y"),
        (lambda y: torch.ones((), requires_grad=True) * 2, "loss of step 1 does not depend on y"),
    ],
)
def test_losses_that_are_none_are_refused(loss: Any, match: str) -> None:
    with pytest.raises(LossError, match=match):
        alignment({"a": BPTT}, rnn(), [*ONE, (XS[1], loss)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_gradients_that_are_not_finite_are_named(value: float) -> None:
    calls: list[int] = []

    def spoil(g: Tensor) -> Tensor:
        calls.append(0)
        return g * value if g.shape == (3, 3) and len(calls) > 5 else g  # the recurrent weight, at the second delivery

    match = "learner 'bad', repeat 0: NaN or infinity in the gradient of parameter 'recurrent' delivered at step 3"
    with pytest.raises(NonFiniteError, match=match):
        alignment({"good": BPTT, "bad": edited(spoil)}, rnn(), walk(), every=2)
    calls.clear()
    with pytest.raises(NonFiniteError, match=r"the exact learner: NaN .* 'recurrent' delivered at step 3"):
        alignment({"good": BPTT}, rnn(), walk(), every=2, exact=edited(spoil))


def test_a_learner_that_learns_is_refused() -> None:
    class Learning(Edited):
        def sync(self) -> None:
            super().sync()
            for p in trainable(self._cell).values():
                p.data.add_(1e-3)

    with pytest.raises(
        ParameterChangedError, match="learner 'a', repeat 0 has changed parameter 'recurrent' by step 2"
    ):
        alignment({"a": lambda c, b: Learning(c, b, lambda g: g)}, rnn(), walk(), every=3)


def test_what_a_learner_raises_says_whose_it_is() -> None:
    def fails(learner: Callable[..., Any], stream: Any) -> list[str]:
        with pytest.raises((RTRLError, ValueError)) as caught:
            alignment({"good": BPTT, "bad": learner}, rnn(), stream, repeats=2)
        return caught.value.__notes__

    def refuse(cell: nn.Module, batch: int) -> Any:
        raise ValueError("no")

    class Tired(Edited):
        def sync(self) -> None:
            raise ValueError("no")

    assert fails(refuse, walk()) == ["learner 'bad', repeat 0, step 0"]
    assert fails(lambda c, b: Tired(c, b, lambda g: g), walk()) == ["learner 'bad', repeat 0, step 0"]
    with pytest.raises(NonFiniteError) as caught:
        alignment({"a": BPTT}, rnn(), [*ONE, (XS[1] * math.nan, None)])
    assert caught.value.__notes__ == ["the exact learner, step 1"]


def test_a_loss_outside_the_cell_reaches_a_head_that_stays_without_gradient() -> None:
    head, target = nn.Linear(2, 3).double(), torch.tensor([0, 2])
    found = alignment({"a": BPTT}, rnn(), [(x, lambda y: F.cross_entropy(head(y), target)) for x in XS])
    assert found["a"].bias < 1e-12
    assert head.weight.grad is None
