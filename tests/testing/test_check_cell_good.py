"""Good cells pass every check, whatever way they are made."""

from typing import Any

import pytest
import torch
from helpers.toy_cells import ForcedMoE, OddCell, PlainRNN, ScheduledCell, seeded
from torch import Tensor, nn

import rtrl
from rtrl.testing import cell_checks, check_cell

B, T = 3, 2


def _noise(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def _mixture(d_in: int = 3, d_out: int = 2, **arguments: Any) -> rtrl.RecurrentMoE:
    generator = torch.Generator().manual_seed(0)
    return rtrl.RecurrentMoE(d_in, d_out, d_model=4, n_slots=4, n_experts=4, topk=2, generator=generator, **arguments)


class Words(nn.Module):
    """Integer inputs through an embedding, y a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.recur = nn.Embedding(5, 4), nn.Linear(4, 4)

    def init_state(self, batch_size: int) -> Tensor:
        return self.recur.weight.new_zeros(batch_size, 4)

    def forward(self, x: dict[str, Tensor], h: Tensor) -> tuple[dict[str, Any], Tensor]:
        h = torch.tanh(self.enter(x["word"]) + self.recur(h))
        return {"h": h, "pair": (h[:, :1], h.argmax(1))}, h


def _scheduled() -> tuple[nn.Module, list[Any]]:
    masks = torch.randint(0, 2, (T, B, 11), generator=torch.Generator().manual_seed(2)).double()
    return seeded(ScheduledCell(2, 4, 3, 3), 0), list(torch.cat([_noise(T, B, 2), masks], dim=-1))


def _forced() -> tuple[nn.Module, list[Any]]:
    chosen = torch.tensor([[0.0, 2, 2, 1, 3], [1, 3, 1, 0, 2], [3, 0, 0, 2, 1]]).double()
    cell = seeded(ForcedMoE(_mixture(), (2, 1, 2)), 0)
    return cell, [torch.cat([x, chosen], dim=1) for x in _noise(T, B, 3)]


def _good(name: str) -> tuple[nn.Module, list[Any]]:
    xs = list(_noise(T, B, 3, dtype=torch.float32))
    torch.manual_seed(0)
    if name.endswith("Cell") and hasattr(nn, name):
        return rtrl.cells.from_torch(getattr(nn, name)(3, 4), nn.Linear(4, 2)), xs
    makers = {
        "mixture": lambda: (_mixture(), xs),
        "mixture, tokens": lambda: (_mixture(), [x[:, None].repeat(1, 2, 1) for x in xs]),
        "mixture, router output": lambda: (_mixture(router_output=True), xs),
        "mixture, float64": lambda: (_mixture(dtype=torch.float64), list(_noise(T, B, 3))),
        "stack": lambda: (rtrl.cells.Stack([_mixture(3, 4), _mixture(4, 2)]), xs),
        "plain": lambda: (seeded(PlainRNN(3, 4), 0), list(_noise(T, B, 3))),
        "odd": lambda: (seeded(OddCell(3, 4), 0), list(_noise(T, B, 3))),
        "scheduled": _scheduled,
        "forced": _forced,
        "words": lambda: (Words(), [{"word": torch.arange(B) + t} for t in range(T)]),
    }
    return makers[name]()


GOOD = [
    "RNNCell",
    "GRUCell",
    "LSTMCell",
    "mixture",
    "mixture, tokens",
    "mixture, router output",
    "mixture, float64",
    "stack",
    "plain",
    "odd",
    "scheduled",
    "forced",
    "words",
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", GOOD)
def test_a_good_cell_passes_every_check(name: str, seed: int) -> None:
    cell, xs = _good(name)
    report = check_cell(cell, xs, seed=seed)
    assert report.passed
    assert report.checks == cell_checks()
    assert not report.skipped


@pytest.mark.parametrize("name", ["GRUCell", "mixture", "scheduled", "words"])
def test_one_sample_and_one_step_are_enough_to_run_every_check(name: str) -> None:
    cell, xs = _good(name)
    report = check_cell(cell, [torch.utils._pytree.tree_map(lambda t: t[:1], xs[0])])
    assert report.checks == cell_checks()


def test_a_stack_of_routers_is_said_to_be_slow_under_vmap() -> None:
    cell, xs = _good("stack")
    assert any("torch.func" in note for note in check_cell(cell, xs).notes)


class Masked(nn.Module):
    """Multiplies what it does not read by an exact zero."""

    def __init__(self) -> None:
        super().__init__()
        self.recur = nn.Linear(2, 2)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        one = h.new_tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1)
        new = torch.tanh(self.recur((h * one).sum(1, keepdim=True)) + x[:, None, :2])
        row = torch.zeros(h.shape[0], 1, dtype=torch.int64, device=h.device)
        h = torch.cat([new, h[:, 1:]], dim=1)
        return (h * one).sum(1), h, rtrl.Sparsity(row, row)


def test_a_mask_of_exact_zeros_passes_with_a_note() -> None:
    report = check_cell(Masked(), list(_noise(2, B, 3, dtype=torch.float32)), state=torch.zeros(B, 3, 2))
    assert report.passed
    assert any("NaN in a row that is not declared as read reaches y" in note for note in report.notes)
    assert "note: a NaN" in str(report)


def test_frozen_parameters_and_a_cell_without_parameters_pass() -> None:
    cell, xs = _good("GRUCell")
    assert check_cell(cell.requires_grad_(False), xs).passed
    identity = rtrl.cells.from_torch(nn.GRUCell(3, 4))
    assert check_cell(identity, xs, state=torch.ones(B, 4)).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_take_a_gradient_and_a_state_of_ones_are_fine(dtype: torch.dtype) -> None:
    cell, _ = _good("LSTMCell")
    xs = [x.requires_grad_() for x in _noise(T, B, 3, dtype=dtype)]
    assert check_cell(cell.to(dtype), xs, state=torch.ones(B, 2, 4, dtype=dtype, requires_grad=True)).passed
    assert all(x.grad is None for x in xs)
