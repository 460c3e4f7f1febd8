"""UORO has the exact gradient as its mean. A fixed list of seeds, so the verdict never changes from run to run.

For each of D fixed directions the mean over N independent draws must lie within z standard errors of the exact value.
If the estimate is unbiased, a mean over N = 500 draws is off by more than z = 5.5 standard errors with chance below
7e-8 (Student's t, 499 degrees of freedom; normal: 4e-8), for any of D = 8 directions below 6e-7 < 1e-6.
"""

import functools
from collections.abc import Callable

import pytest
import torch
from helpers.baseline_cells import Leaky, Ring, delivered, normal, squares
from helpers.tolerances import assert_gradients_equal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor

import oracles
from rtrl.learners import UORO

DRAWS, DIRECTIONS, Z = 500, 8, 5.5
STEPS = 4


class Biased(UORO):
    """A control: what has been carried shrinks by half a step."""

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        return super()._advance(0.5 * dynamics, immediate)


class SameSigns(UORO):
    """A control: within one stream every step has the signs of the first, so the cross terms have a mean."""

    def _advance(self, dynamics: Tensor, immediate: Tensor) -> tuple[Tensor, ...]:
        assert self._generator is not None
        self._generator.manual_seed(self._generator.initial_seed())
        return super()._advance(dynamics, immediate)


@functools.cache
def worst_deviation(make: Callable[..., UORO]) -> float:
    """The largest distance of a mean from the exact value, in standard errors, over the directions."""
    cell, xs = seeded(Ring(2, 2), 2, scale=1.2), normal(2, STEPS, 1, 2)

    def flat(gradients: dict[str, Tensor]) -> Tensor:
        return torch.cat([gradients[name].flatten() for name in sorted(gradients)])

    exact = flat(oracles.bptt(cell, xs, last))
    directions = torch.cat([exact[None], normal(11, DIRECTIONS - 1, len(exact))])  # its own, where a bias shows best
    draws = torch.stack(
        [
            directions @ flat(delivered(make(cell, 1, generator=torch.Generator().manual_seed(seed)), xs, last))
            for seed in range(DRAWS)
        ]
    )
    error = draws.std(dim=0) / DRAWS**0.5 + 1e-12
    return float(((draws.mean(dim=0) - directions @ exact).abs() / error).max())


def last(t: int, y: Tensor) -> Tensor | None:
    """A loss on what was long ago; in the middle of the stream too, for what is delivered on the way."""
    return squares(t, y) if t in (STEPS // 2, STEPS - 1) else None


def test_the_mean_over_many_draws_is_the_exact_gradient() -> None:
    assert worst_deviation(UORO) < Z


@pytest.mark.parametrize("make", [Biased, SameSigns])
def test_a_biased_estimate_is_rejected(make: Callable[..., UORO]) -> None:
    assert worst_deviation(make) > Z


def test_one_step_of_a_state_of_one_entry_leaves_nothing_to_chance() -> None:
    cell, xs = seeded(Leaky(3, 1, None), 0), normal(0, 2, 3, 3)
    assert_gradients_equal(delivered(UORO(cell, 3), xs, squares), oracles.bptt(cell, xs, squares))


def test_draws_come_from_the_generator_alone_and_differ_between_samples() -> None:
    cell, xs = seeded(PlainRNN(2, 3), 0), normal(0, 5, 1, 2).expand(5, 2, 2)
    before = torch.get_rng_state()
    one, two, other = (UORO(cell, 2, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    first, second, third = (delivered(learner, xs, squares) for learner in (one, two, other))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)
    influence = one.influence("recurrent")
    assert not torch.equal(influence[0], influence[1]), "two samples of one stream draw for themselves"


def test_the_norms_of_the_two_factors_stay_balanced() -> None:
    """With ρ = 1 they drift apart; the sum of two balanced terms is balanced up to their angle."""
    cell, xs = seeded(Ring(2, 3), 1), normal(1, 1, 4, 2)
    learner = UORO(cell, 4, generator=torch.Generator().manual_seed(0))
    learner.step(xs[0])
    learner.sync()
    by_state, by_theta = learner.state_dict()["buffers"]["carried"]
    torch.testing.assert_close(by_state.norm(dim=1), by_theta.norm(dim=1), rtol=1e-12, atol=0)
