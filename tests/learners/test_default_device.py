"""Every tensor says where it lives: what torch takes for the default device makes no difference to a learner.

The default is set to "meta", whose tensors hold no numbers: one that is made there by mistake cannot be computed with.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.running import run
from helpers.strategies import normal
from helpers.toy_cells import ForcedMoE, OddCell, PlainRNN, ScheduledCell, seeded
from torch import Tensor, nn

import rtrl
from rtrl.learners import UORO


@pytest.fixture
def elsewhere() -> Iterator[Callable[[], None]]:
    """A switch that sets the default device to one without numbers, until the test ends."""
    yield lambda: torch.set_default_device("meta")
    torch.set_default_device(None)


def loss(t: int, y: Tensor) -> Tensor | None:
    leaves = torch.utils._pytree.tree_leaves(y)
    return sum(leaf.square().sum() for leaf in leaves) if t % 3 != 1 else None


def scheduled() -> tuple[nn.Module, Tensor]:
    """Rows and experts of ever other sets, all of them at the third step."""
    bits = [[[int((t // 2 + i + b) % 3 < 1) for i in range(8)] for b in range(2)] for t in range(9)]
    features = normal(1, 9, 2, 2).clamp(max=0.7)
    features[2, 0, 0] = 0.9
    return seeded(ScheduledCell(2, 3, 2, 2), 1), torch.cat([features, torch.tensor(bits).double()], dim=-1)


def forced() -> tuple[nn.Module, Tensor]:
    moe = rtrl.RecurrentMoE(2, 2, d_model=2, n_slots=3, n_experts=3, topk=1, expert_hidden=2, ffn_hidden=2)
    chosen = [[[t // 2 % 3, (t // 2 + 1) % 3, t // 2 % 3, (t // 3 + b) % 3] for b in range(2)] for t in range(9)]
    return seeded(ForcedMoE(moe, (2, 1, 1)), 1), torch.cat([normal(1, 9, 2, 2), torch.tensor(chosen).double()], dim=-1)


CASES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear maps": lambda: (seeded(PlainRNN(2, 3), 1), normal(1, 6, 2, 2)),
    "other parameters": lambda: (seeded(OddCell(2, 2), 1), normal(1, 6, 2, 2)),
    "scheduled": scheduled,
    "mixture": forced,
}


@pytest.mark.parametrize("name", CASES)
def test_a_whole_run_is_the_same_bit_for_bit(name: str, elsewhere: Callable[[], None]) -> None:
    cell, xs = CASES[name]()
    resets = torch.zeros(len(xs), 2, dtype=torch.bool)
    resets[3, 1] = True
    resets[4] = True
    options = {"block": 2, "window": 2, "syncs": {4: False, 5: True}, "saves": {2, 5}, "resets": resets}
    here = run(cell, xs, loss, **options)  # type: ignore[arg-type]
    elsewhere()
    there = run(cell, xs, loss, **options)  # type: ignore[arg-type]
    assert here.state is not None and there.state is not None and torch.equal(here.state, there.state)
    for one, two in ((here.gradients, there.gradients), (here.influences, there.influences)):
        assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(bool(value.count_nonzero()) for value in here.influences.values())


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_the_signs_of_uoro_are_drawn_where_their_generator_is(
    generator: torch.Generator | None, elsewhere: Callable[[], None]
) -> None:
    cell, xs = CASES["linear maps"]()
    elsewhere()
    found = run(cell, xs, loss, make=UORO, influences=False, generator=generator)
    assert any(bool(value.count_nonzero()) for value in found.gradients.values())
