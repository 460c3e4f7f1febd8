"""The claims about rivals: the rules are those of the learners, the systems those described, the verdicts follow."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rtrl.learners import BPTT, RFLO, TBPTT, UORO, LayerLocal, Learner, SnAp
from rtrl.learners.block_rtrl import BlockRTRL
from rtrl.training.cell_factory import make_cell
from rtrl.verification.rivals import balancing
from rtrl.verification.rivals.balancing_cell import BalancingCell, Chains
from rtrl.verification.rivals.copies import Copies
from rtrl.verification.rivals.equal_bytes import bytes_of_horizon, horizon_within
from rtrl.verification.rivals.rules import LeakingRule, MaskedRule, RankOneRule, Rule, TruncatedRule, of_layers


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


RULES: dict[str, tuple[Callable[[Copies], Rule], Callable[[nn.Module, int], Learner]]] = {
    "truncated": (lambda c: TruncatedRule(c, 3), lambda cell, seed: TBPTT(cell, 2, 3)),
    "bptt": (lambda c: TruncatedRule(c, 9), lambda cell, seed: BPTT(cell, 2)),
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
    assert balancing.compare_with_learners(Chains(1, 2, 0, 3)) == []

    def forgetful(self: Any, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return (immediate,)

    monkeypatch.setattr(LeakingRule, "advance", forgetful)
    (line,) = balancing.compare_with_learners(Chains(1, 2, 0, 3))
    assert line.startswith("the gradient of RFLO is off")
