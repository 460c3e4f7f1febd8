"""The claims about rivals: the rules are those of the learners, the systems those described, the verdicts follow."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl.learners import RFLO, TBPTT, UORO, LayerLocal, Learner, SnAp
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.tasks import TMaze
from rtrl.training.cell_factory import make_cell
from rtrl.verification.rivals import balancing, equal_memory
from rtrl.verification.rivals.balancing_cell import BalancingCell, Chains
from rtrl.verification.rivals.copies import Copies
from rtrl.verification.rivals.equal_bytes import bytes_of_horizon, horizon_within
from rtrl.verification.rivals.rules import LeakingRule, MaskedRule, RankOneRule, Rule, TruncatedRule, of_layers
from rtrl.verification.rivals.training import Episodes, Run, train_copies, train_exactly


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RULES: dict[str, tuple[Callable[[Copies], Rule], Callable[[nn.Module, int], Learner]]] = {
    "truncated": (lambda c: TruncatedRule(c, 3), lambda cell, seed: TBPTT(cell, 2, 3)),
    "snap": (MaskedRule, lambda cell, seed: SnAp(cell, 2)),
    "rflo": (lambda c: LeakingRule(c, 0.2), lambda cell, seed: RFLO(cell, 2, 0.2)),
    "layers": (lambda c: MaskedRule(c, of_layers(c)), lambda cell, seed: LayerLocal(cell, 2)),
    "uoro": (
        lambda c: RankOneRule(c, [generator(k) for k in range(len(c))]),
        lambda cell, seed: UORO(cell, 2, generator=generator(seed)),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_gives_the_gradients_of_its_learner(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rtrl.verification.rivals.rules.CHUNK", 1)  # one step at once
    cells = [make_cell("mingru", 2, 1, hidden=2, layers=2, seed=seed, dtype=torch.float64) for seed in range(2)]
    copies = Copies(cells)
    make_rule, make_learner = RULES[name]
    rule, h = make_rule(copies), copies.first_state(2)
    draws = generator(5)
    xs = torch.randn(7, 2, 2, 2, generator=draws, dtype=torch.float64)
    dys = torch.randn(7, 2, 2, 1, generator=draws, dtype=torch.float64)
    dys[:3] = 0
    total = {key: torch.zeros_like(value) for key, value in copies.values.items()}
    for part in (slice(0, 4), slice(4, 7)):
        run = copies.record(xs[part], h)
        h = run.last
        for key, gradient in rule.gradient(run, dys[part]).items():
            total[key] += gradient
    for seed, cell in enumerate(copy.deepcopy(cells)):
        learner = make_learner(cell, seed)
        for x, dy in zip(xs[:, seed], dys[:, seed], strict=True):
            learner.backward((learner.step(x) * dy).sum())
        learner.sync()
        for key, parameter in cell.named_parameters():
            torch.testing.assert_close(total[key][seed], parameter.grad, rtol=1e-10, atol=1e-13)


def matrices(chains: Chains) -> tuple[Tensor, Tensor]:
    """The matrices A and D of ``s' = A s + D θ``, entry by entry as the source has them."""
    size, length = chains.count * chains.length, chains.length
    a, d = (torch.zeros(size, n, dtype=torch.float64) for n in (size, chains.count))
    for k in range(chains.count):
        for i in range(length):
            a[k * length + i, k * length + i] = 0.5
            if i + 1 < length:
                a[k * length + i, k * length + i + 1] = 0.5
            d[k * length + i, k] = 1.0 if i < chains.up else -1.0 if i >= length - chains.down else 0.0
    return a, d


@pytest.mark.parametrize("chains", [Chains(1, 10, 0, 13), Chains(3, 1, 2, 2)])
def test_balancing_is_the_system_of_the_source_and_exact_by_full_jacobians(chains: Chains) -> None:
    """The textbook recursion, by the system's own matrices in full."""
    a, d = matrices(chains)
    cell = BalancingCell(chains)
    learner = BlockRTRL(cell, 1, block=4)
    s, influence = torch.ones(len(a), dtype=torch.float64), torch.zeros_like(d)
    theta, gradient = cell.theta.detach(), torch.zeros_like(cell.theta)
    outputs = torch.arange(chains.count) * chains.length
    for _ in range(30):
        y = learner.step(torch.zeros(1, 1, dtype=torch.float64))
        learner.backward((y - 1).square().sum() / 2)
        s, influence = a @ s + d @ theta, a @ influence + d
        gradient = gradient + (s[outputs] - 1) @ influence[outputs]
        torch.testing.assert_close(y[0].detach(), s[outputs], rtol=1e-12, atol=0)
    learner.sync()
    torch.testing.assert_close(cell.theta.grad, gradient, rtol=1e-10, atol=0)
    at_rest = torch.linalg.solve(torch.eye(len(a), dtype=torch.float64) - a, d @ theta)[outputs]
    torch.testing.assert_close(at_rest, 2 * (chains.up - chains.down) * theta)


def test_a_horizon_is_the_longest_that_fits() -> None:
    cell, x = BalancingCell(Chains(2, 1, 2, 1)), torch.zeros(1, 1, dtype=torch.float64)
    budget = bytes_of_horizon(cell, x, 7)
    assert [horizon_within(budget + more, cell, x) for more in (0, -1, 1)] == [7, 6, 7]
    assert horizon_within(0, cell, x) == 1


SYSTEM = balancing.System(Chains(2, 1, 4, 3), 1e-3, 10)


def outcome(failures: tuple[str, ...] = (), ends: dict[str, float] | None = None) -> balancing.Results:
    rules = {"BlockRTRL": 0.0, balancing.TRUNCATED: 20.0, "TBPTT, 4 × the bytes": 0.0, "SnAp-1": 20.0, **(ends or {})}
    learned = [balancing.Learned(rule, {1e-3: [[end] * 10]}) for rule, end in rules.items()]
    horizons = {balancing.TRUNCATED: 9, "TBPTT, 4 × the bytes": 36}
    system = balancing.SystemResult(SYSTEM, 10.0, learned, [], 100, horizons, horizons)
    return balancing.Results(config=replace(balancing.Config(), every=1), systems=[system], failures=list(failures))


@pytest.mark.parametrize(
    ("measured", "verdict", "words"),
    [
        (outcome(), "holds", ""),
        (outcome(ends={"SnAp-1": 0.009}), "holds when", "SnAp-1 with 2 parameters"),
        (outcome(ends={"BlockRTRL": 0.011}), "does not hold", "2 parameters"),
        (outcome(failures=("the gradient of BlockRTRL is off",)), "does not hold", "gradient"),
    ],
)
def test_balancing_judges(measured: balancing.Results, verdict: str, words: str) -> None:
    judged = balancing.verdict(measured)
    assert judged.name == verdict and words in judged.condition


def test_a_rule_counts_at_its_best_rate() -> None:
    learned = balancing.Learned("UORO", {1e-3: [[9.0, 1.0], [9.0, 30.0]], 1e-4: [[9.0, 5.0], [9.0, 5.0]]})
    assert learned.best == 1e-4 and learned.end(1e-3) == [1.0, 30.0]


def test_a_rule_that_is_not_its_learner_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Any, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return (immediate,)

    monkeypatch.setattr(LeakingRule, "advance", forgetful)
    (line,) = balancing.compare_with_learners(Chains(1, 2, 0, 3))
    assert line.startswith("the gradient of RFLO is off")


# ---------------------------------------------------------------------- equal memory


def silent(updates: int) -> None:
    return


MAZE = equal_memory.Pair("MinGRU", "T-maze", (5, 30), hidden=2, updates=9)


def test_copies_and_the_real_learner_train_alike() -> None:
    """On the same episodes, with the same optimizer, BPTT of copies makes the updates of `BlockRTRL`."""
    task, cells = TMaze(5), [MAZE.make_cell(seed) for seed in (3, 4)]
    copies = Copies(cells)
    runs = train_copies(TruncatedRule(copies, 99), task, 4, [3, 4], [0.03, 0.1], 4, silent)
    for k, (cell, rate) in enumerate(zip(cells, (0.03, 0.1), strict=True)):
        run = train_exactly(cell, 3, task, 4, 3 + k, rate, 4, silent)
        assert run.scores == runs[k].scores and len(run.scores) == 4 and run.most_bytes > 0
        for name, parameter in cell.named_parameters():
            torch.testing.assert_close(copies.values[name][k], parameter, rtol=1e-3, atol=1e-5)


def test_episodes_follow_their_seed() -> None:
    task = TMaze(5)
    both, second = Episodes.draw(task, 4, [1, 2], 7), Episodes.draw(task, 4, [2], 7)
    assert torch.equal(both.xs[:, 1:], second.xs) and not torch.equal(both.xs[:, :1], second.xs)
    assert both.xs.shape == (7, 2, 4, 4) and torch.equal(both.targets[:, 1:], second.targets)
    assert not torch.equal(second.xs, Episodes.draw(task, 4, [2], 8).xs)


def test_a_run_is_solved_by_its_recent_mean_and_stays_so() -> None:
    run = Run()
    for score in (0.5, *[1.0] * 7, 1.0, 0.0):
        run.add(TMaze(5), score)
    assert run.solved == 9 and len(run.scores) == 9
    early = Run()
    early.add(TMaze(5), 1.0)
    assert early.solved is None  # one good episode is not enough


@pytest.mark.parametrize(
    ("layers", "rule", "same"),
    [
        (1, "SnAp-1", True),
        (2, "SnAp-1", True),
        (1, "within layers", True),
        (2, "within layers", False),
        (1, "RFLO", False),
    ],
)
def test_a_rule_that_leaves_nothing_out_is_found_exact(layers: int, rule: str, same: bool) -> None:
    """SnAp-1 keeps what a layer drives in the layers above, within a step; minGRU's units have one number each."""
    pair = replace(MAZE, layers=layers)
    names = (equal_memory.WHOLE, equal_memory.EXACT, rule)
    whole, exact, found = (equal_memory.gradient_of(name, pair, TMaze(5), 3) for name in names)
    assert float((exact - whole).norm() / whole.norm()) < equal_memory.SAME
    assert (float((found - whole).norm() / whole.norm()) < equal_memory.SAME) == same


def cases(
    exact: tuple[int, int], truncated: tuple[int, int], snap: int = 0, failures: tuple[str, ...] = ()
) -> equal_memory.Cases:
    """Two of two seeds at most, within the window and beyond it."""

    def outcome(learner: str, solved: int) -> equal_memory.Outcome:
        runs = [Run([0.5] * 9, solved=9 if k < solved else None) for k in range(2)]
        return equal_memory.Outcome(learner, 0.1, runs, 0.01)

    made = []
    for i, delay in enumerate(MAZE.delays):
        names = {equal_memory.EXACT: exact[i], equal_memory.TRUNCATED: truncated[i], "SnAp-1": snap}
        outcomes = [outcome(name, solved) for name, solved in names.items()]
        made.append(equal_memory.Case(MAZE, delay, delay + 2, 12, 1000, 990, outcomes, []))
    config = equal_memory.Config((MAZE,), (equal_memory.TRUNCATED, "SnAp-1"), seeds=2)
    return equal_memory.Cases(config=config, cases=made, failures=list(failures))


@pytest.mark.parametrize(
    ("measured", "verdict", "words"),
    [
        (cases((2, 2), (2, 0)), "holds when", "BlockRTRL solved 2 of 2 runs, truncated BPTT 0"),
        (cases((2, 2), (2, 0), snap=1), "holds when", "SnAp-1 solved 2 of 4"),
        (cases((2, 1), (2, 0)), "holds when", "BlockRTRL solved 1 of 2 runs"),
        (cases((2, 2), (2, 2)), "does not hold", "truncated BPTT 2"),
        (cases((2, 0), (2, 0)), "does not hold", "BlockRTRL solved 0 of 2"),
        (cases((2, 2), (2, 0), failures=("off",)), "does not hold", "gradient"),
    ],
)
def test_equal_memory_judges(measured: equal_memory.Cases, verdict: str, words: str) -> None:
    judged = equal_memory.verdict(measured)
    assert judged.name == verdict and words in judged.condition
    shown = equal_memory.show(measured)
    assert shown.result and all(line.x for plot in shown.plots for line in plot.series)


def test_equal_memory_needs_a_delay_beyond_the_window() -> None:
    measured = cases((2, 2), (2, 0))
    measured.cases = measured.cases[:1]
    assert equal_memory.verdict(measured).name == "not measured"
