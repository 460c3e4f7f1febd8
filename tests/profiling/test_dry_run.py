"""Runs on tensors without numbers take what real runs take: multiply-adds and bytes, at each moment."""

from typing import Any

import pytest
import torch
from helpers.cost_cases import DENSE, inputs, mixture, torch_cell
from torch import Tensor, nn

from rtrl.costs.profile import Profile
from rtrl.learners import BPTT, BlockRTRL
from rtrl.profiling import dry_run
from rtrl.profiling.dry_run import DryRun, ShapeTensor
from rtrl.profiling.live_bytes import LiveBytes
from rtrl.profiling.macs import MacCounter


def both(cell: nn.Module, xs: Tensor, learner: type, **options: Any) -> tuple[Any, Any]:
    dry, real = (Profile(cell, list(xs), xs.shape[1]) for _ in range(2))
    real._dry = None
    found = dry.run(learner, len(xs), **options), real.run(learner, len(xs), **options)
    assert dry._dry is not None, "the cell was run without numbers"
    return found


@pytest.mark.parametrize("kind", DENSE)
def test_a_learner_takes_what_it_takes_with_numbers(kind: str) -> None:
    cell = DENSE[kind]()
    xs = inputs(cell, 7, 2)
    for learner, options in ((BlockRTRL, {"block": 3, "audit": "off"}), (BPTT, {})):
        dry, real = both(cell, xs, learner, **options)
        assert dry.macs == real.macs
        assert dry.held == real.held
        assert dry.peaks["any"] == real.peaks["any"]


def test_a_mixture_takes_what_it_takes_with_numbers() -> None:
    dry, real = both(mixture(), inputs(mixture(), 9, 2), BlockRTRL, block=2, window=3, audit="off")
    assert dry.macs == real.macs
    assert dry.held == real.held
    assert dry.peaks["any"] == pytest.approx(real.peaks["any"], rel=0.01)


def test_a_form_that_is_wrong_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dry_run._FORMS, "aten.cat", lambda tensors, dim=0: torch.empty_like(tensors[0]))
    cell = torch_cell(nn.LSTMCell)
    profile = Profile(cell, list(inputs(cell, 7, 2)), 2)
    dry = profile.run(BlockRTRL, 7, block=3, audit="off")
    monkeypatch.undo()
    real = Profile(cell, list(inputs(cell, 7, 2)), 2).run(BlockRTRL, 7, block=3, audit="off")
    assert profile._dry is None or dry.peaks["any"] != real.peaks["any"]


OPERATIONS: dict[str, Any] = {
    "a permuted sum": lambda x: x.transpose(0, 1) + x.transpose(0, 1),
    "a product in another order of strides": lambda x: x.transpose(0, 1) * x[0].unsqueeze(1).contiguous(),
    "an outer product": lambda x: x[0, 0].unsqueeze(1) * x[0, 1],
    "a comparison": lambda x: (x > 1) | (x == 0),
    "a choice": lambda x: torch.where(x > 0, x, 1.0),
    "parts put together": lambda x: torch.cat([x, x[:1]]).mean(dim=1),
    "tensors side by side": lambda x: torch.stack([x, x], dim=-1),
    "a product of batches": lambda x: torch.baddbmm(x[:, :, :1], x, x.mT),
    "a mask": lambda x: x[torch.tensor([True, False])].any(dim=2),
    "entries": lambda x: x[:, torch.tensor([2, 0])].count_nonzero(dim=0),
    "a view": lambda x: x.flatten(0, 1)[1:].T.softmax(dim=0),
    "in place": lambda x: x.clone().add_(1).mul_(x),
    "double precision": lambda x: x.to(torch.float64).sum(dim=0),
    "a result that is given": lambda x: torch.mul(x, 2.0, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_results_have_the_form_of_real_ones(operation: str) -> None:
    x = torch.zeros(2, 3, 4)
    with LiveBytes() as live, MacCounter() as counter:
        real = OPERATIONS[operation](x)
    with DryRun() as dry:
        value = dry.without_numbers(x)
        found = OPERATIONS[operation](value)
    assert isinstance(found, ShapeTensor)
    assert (found.shape, found.stride(), found.dtype) == (real.shape, real.stride(), real.dtype)
    assert (dry.macs, dry.live.now, dry.live.peak) == (counter.macs, live.now, live.peak)


def test_numbers_that_are_read_are_zero() -> None:
    with DryRun() as dry:
        x = dry.without_numbers(torch.ones(2, 3))
        assert x.sum().item() == 0 and x.tolist() == [[0.0] * 3] * 2
        assert bool(torch.isfinite(x).all()) and not bool(x.isnan().any())
        assert torch.equal(x, x) and int(x.count_nonzero()) == 0
        with pytest.raises((NotImplementedError, RuntimeError)):
            x.nonzero()
    with pytest.raises(TypeError):
        x + x
