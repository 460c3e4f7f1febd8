"""The driver: what happens at each step and in which order, and that gradients are exact through all of it."""

from typing import Any

import pytest
import torch
from helpers.strategies import normal
from helpers.toy_cells import PlainRNN, seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.testing import Driver, assert_gradients_equal, assert_influences_equal
from rtrl.testing.streams import squares

XS = normal(2, 11, 2, 2)


def rnn() -> nn.Module:
    return seeded(PlainRNN(2, 3, start=0.3), 1)


class Recorder:
    """A learner that writes down what it is called with."""

    def __init__(self, cell: nn.Module, batch_size: int) -> None:
        self.cell, self.calls = cell, [f"make {batch_size}"]

    def step(self, x: Tensor) -> Tensor:
        self.calls.append(f"step {float(x):g} with {next(self.cell.parameters()).item():g}")
        return x

    def backward(self, loss: Tensor) -> None:
        self.calls.append(f"loss {float(loss):g}")

    def sync(self, **options: Any) -> None:
        self.calls.append(f"sync {options}" if options else "sync")

    def reset(self, samples: Tensor) -> None:
        self.calls.append(f"reset {samples.tolist()}")

    def state_dict(self) -> list[str]:
        return self.calls

    def load_state_dict(self, saved: list[str]) -> None:
        self.calls = [*saved, "loaded"]


def scalar() -> nn.Module:
    cell = nn.Linear(1, 1, bias=False)
    nn.init.ones_(cell.weight)
    return cell


def test_the_events_of_a_step_come_in_their_order() -> None:
    driver = Driver(Recorder, scalar(), 1)
    resets = torch.tensor([[False], [True], [False]])
    offsets = [{}, {"weight": torch.ones(1, 1)}, {}]
    driver.run(
        torch.arange(3.0), lambda t, y: y if t != 1 else None, resets=resets, offsets=offsets, syncs={0}, saves={2}
    )
    assert driver.learner.calls == [
        *("make 1", "step 0 with 1", "loss 0", "sync"),
        *("sync", "reset [True]", "step 1 with 2"),
        *("sync", "step 2 with 1", "loss 2", "loaded"),
    ]
    assert (driver.n_losses, driver.step_index) == (2, 2)


def test_a_mapping_of_syncs_says_what_becomes_of_dormant_slices() -> None:
    driver = Driver(Recorder, scalar(), 1)
    offsets = [{}, {"weight": torch.ones(1, 1)}]
    driver.run(torch.arange(2.0), lambda t, y: None, offsets=offsets, syncs={0: True, 1: False})
    syncs = [call for call in driver.learner.calls if call.startswith("sync")]
    assert syncs == ["sync {'dormant': True}", "sync {'dormant': False}", "sync {'dormant': False}"]


def test_every_fifth_step_resets_no_sample() -> None:
    driver = Driver(Recorder, scalar(), 1)
    driver.run(torch.arange(5.0), lambda t, y: None, resets=torch.zeros(5, 1, dtype=torch.bool))
    assert [call for call in driver.learner.calls if call.startswith("reset")] == ["reset [False]"]


@pytest.mark.parametrize("block", [1, 4])
def test_gradients_and_influences_are_exact_through_all_events(block: int) -> None:
    cell, resets = rnn(), torch.zeros(11, 2, dtype=torch.bool)
    resets[3, 0] = resets[7] = True
    moved = {"recurrent": normal(5, 3, 3)}
    offsets = [{} if t < 5 or t > 8 else moved for t in range(11)]
    driver = Driver(lambda cell, batch: rtrl.BlockRTRL(cell, batch, block=block), cell, 2)
    driver.run(XS, squares, resets=resets, offsets=offsets, syncs={2: True, 6: False}, saves={4})
    driver.sync()
    assert_gradients_equal(driver.gradients(), oracles.bptt(rnn(), XS, squares, resets=resets, offsets=offsets))
    expected = oracles.dense_rtrl(rnn(), XS, squares, resets=resets, offsets=offsets, return_influence=True)[1][-1]
    assert_influences_equal(driver.influences(), expected)
    assert driver.influences(["recurrent"]).keys() == {"recurrent"}
    assert driver.state.shape == (2, 3)


def test_a_fork_answers_without_disturbing_the_run() -> None:
    driver = Driver(lambda cell, batch: rtrl.BlockRTRL(cell, batch, block=4), rnn(), 2)
    for t, _ in driver.along(XS, squares):
        if t == 5:
            forked = driver.fork()
            forked.sync()
            assert_gradients_equal(forked.gradients(), oracles.bptt(rnn(), XS[:6], squares))
            assert not any(bool(gradient.any()) for gradient in driver.gradients().values())
    driver.sync()
    expected = oracles.bptt(rnn(), XS, squares)
    assert_gradients_equal(driver.gradients(), expected)
    assert_gradients_equal(driver.take_gradients(), expected)
    assert all(p.grad is None for p in driver.cell.parameters())


def test_a_stream_may_begin_in_the_middle() -> None:
    driver = Driver(Recorder, scalar(), 1)
    assert [t for t, _ in driver.along(torch.arange(4.0), lambda t, y: None, first=2)] == [2, 3]
