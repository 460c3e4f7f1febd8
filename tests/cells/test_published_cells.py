"""The cells with independent rows: their equations, against formulas written from their papers; their gradients and
influences in every exact learner; what they declare."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import published_cells as paper
from helpers.running import run
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.cells import LRU, RTU, Columns, ElementwiseLSTM, MinGRU
from rtrl.errors import ConfigError, ShapeError
from rtrl.testing import check_cell

B, T, D = 2, 7, 3
Make = Callable[[], nn.Module]

CELLS: dict[str, tuple[Make, Any]] = {
    "MinGRU": (lambda: MinGRU(D, 3), partial(paper.min_gru, positive=False)),
    "MinGRU, positive": (lambda: MinGRU(D, 3, positive=True), partial(paper.min_gru, positive=True)),
    "ElementwiseLSTM": (lambda: ElementwiseLSTM(D, 3), partial(paper.element_wise_lstm, output_gate=True)),
    "ElementwiseLSTM, no output gate": (
        lambda: ElementwiseLSTM(D, 3, output_gate=False),
        partial(paper.element_wise_lstm, output_gate=False),
    ),
    "LRU": (lambda: LRU(D, 2, 4), paper.linear_recurrent_unit),
    "RTU": (lambda: RTU(D, 2), partial(paper.trace_unit, linear=False)),
    "RTU, linear": (lambda: RTU(D, 2, linear=True), partial(paper.trace_unit, linear=True)),
}
LAYERS: dict[str, Make] = {
    **{name: make for name, (make, _) in CELLS.items()},
    "Columns": lambda: Columns(lambda: rtrl.from_torch(nn.LSTMCell(D, 1)), 3),
    "Columns of wider GRUs": lambda: Columns(lambda: rtrl.from_torch(nn.GRUCell(D, 2)), 2),
    "Columns of RTUs": lambda: Columns(lambda: RTU(D, 1), 2),
    "Stack": lambda: rtrl.Stack([MinGRU(D, 2), nn.LayerNorm(2), nn.ReLU(), RTU(2, 2), nn.Linear(4, 2)]),
    "Stack of pairs": lambda: rtrl.Stack([RTU(D, 2), LRU(4, 1)]),
    "Stack of a dense layer": lambda: rtrl.Stack([rtrl.from_torch(nn.LSTMCell(D, 2)), ElementwiseLSTM(2, 2)]),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squares(t: int, y: Tensor) -> Tensor:
    return (y * (1 + torch.arange(y[0].numel(), dtype=y.dtype).reshape(y[0].shape))).square().sum()


@pytest.mark.parametrize("name", CELLS)
def test_steps_are_those_of_the_paper(name: str) -> None:
    make, formula = CELLS[name]
    cell = seeded(make().double(), 1)
    p = {key: value.detach().numpy() for key, value in cell.named_parameters()}
    h, xs = noise(B, *cell.init_state(B).shape[1:], seed=2), noise(3, B, D)
    assert not cell.init_state(B).any() and cell.init_state(B).dtype == torch.float64
    for x in xs:
        expected = [formula(p, x[b].numpy(), h[b].detach().numpy()) for b in range(B)]
        y, h = cell(x, h)
        for b in range(B):
            np.testing.assert_allclose(y[b].detach().numpy(), expected[b][0], rtol=1e-12, atol=1e-14)
            np.testing.assert_allclose(h[b].detach().numpy(), expected[b][1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_and_influences_are_exact(name: str) -> None:
    cell, xs = seeded(LAYERS[name]().double(), 1), noise(T, B, D)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[4, 1] = True
    expected, influences = oracles.dense_rtrl(cell, xs, squares, resets=resets, return_influence=True)
    assert_gradients_equal(oracles.bptt(cell, xs, squares, resets=resets), expected)
    found = run(cell, xs, squares, resets=resets, block=3)
    assert_gradients_equal(found.gradients, expected)
    assert_influences_equal(found.influences, influences[-1], may_be_zero=True)


@pytest.mark.parametrize("name", LAYERS)
def test_they_keep_their_promises(name: str) -> None:
    assert check_cell(LAYERS[name](), [noise(B, D).float(), noise(B, D, seed=3).float()]).passed


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "Stack of a dense layer"])
def test_declared_rows_hold_and_leave_out_nothing(name: str) -> None:
    """Every entry is in one row; J is zero between rows of a group, and from a group to those before it."""
    cell = seeded(LAYERS[name]().double(), 1)
    groups = cell.row_groups()  # type: ignore[operator]
    state = noise(1, *cell.init_state(1).shape[1:])
    size = state.numel()
    assert sorted(i for rows in groups for i in rows.flatten().tolist()) == list(range(size))
    x = noise(1, D, seed=2)
    jacobian = torch.autograd.functional.jacobian(lambda h: cell(x, h.view_as(state))[1].flatten(), state.flatten())
    allowed, below = torch.zeros(size, size, dtype=torch.bool), []
    for rows in groups:
        for row in rows:
            allowed[row[:, None], row] = True
        allowed[rows.flatten()[:, None], torch.tensor(below, dtype=torch.int64)] = True
        below += rows.flatten().tolist()
    assert bool((jacobian[~allowed] == 0).all())
    assert bool((jacobian.diagonal() != 0).all())


def test_rows_of_each_cell() -> None:
    assert [rows.shape for rows in MinGRU(D, 3).row_groups()] == [(3, 1)]
    assert [rows.tolist() for rows in RTU(D, 2).row_groups()] == [[[0, 1], [2, 3]]]
    assert [rows.shape for rows in LAYERS["Columns"]().row_groups()] == [(3, 2)]  # type: ignore[operator]
    assert [rows.tolist() for rows in LAYERS["Stack"]().row_groups()] == [[[0], [1]], [[2, 3], [4, 5]]]  # type: ignore[operator]
    pairs = LAYERS["Stack of pairs"]()
    assert [rows.tolist() for rows in pairs.row_groups()] == [[[0, 1], [2, 3]], [[4, 5]]]  # type: ignore[operator]
    assert [own.tolist() for own in pairs.layer_entries().values()] == [[0, 1, 2, 3], [4, 5]]  # type: ignore[operator]
    assert LAYERS["Stack of a dense layer"]().row_groups() is None  # type: ignore[operator]


def test_a_stack_of_states_that_differ_is_flat_and_keeps_sparsities() -> None:
    generator = torch.Generator().manual_seed(0)
    mixture = rtrl.RecurrentMoE(D, 3, d_model=2, n_slots=3, n_experts=3, topk=1, generator=generator)
    cell = rtrl.Stack([mixture, nn.Tanh(), MinGRU(3, 2)]).double()
    h = cell.init_state(B)
    assert h.shape == (B, 8)
    sparsity = cell(noise(B, D), h)[2]
    own = mixture(noise(B, D), h[:, :6].reshape(B, 3, 2))[2]
    by_entry = (own.writes.unsqueeze(2) * 2 + torch.arange(2)).flatten(1)
    assert torch.equal(sparsity.writes, torch.cat([by_entry, torch.tensor([[6, 7]] * B)], dim=1))
    assert check_cell(cell, list(noise(2, B, D))).passed
    xs = noise(T, B, D)
    assert_gradients_equal(
        run(cell, xs, squares, block=2, window=2).gradients, oracles.bptt(cell, xs, squares), may_be_zero=True
    )


def test_a_unit_shrinks_its_state_from_the_first_weights_on() -> None:
    for cell in (LRU(D, 64, r_min=0.9, r_max=0.99), RTU(D, 64, r_min=0.9, r_max=0.99)):
        radius = torch.exp(-torch.exp(cell.nu_log.detach()))
        assert float(radius.min()) >= 0.9 and float(radius.max()) <= 0.99
    lru = LRU(D, 5)
    torch.testing.assert_close(torch.exp(lru.gamma_log).square(), 1 - torch.exp(-2 * torch.exp(lru.nu_log)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinGRU(0, 3), "d_in must be a positive integer"),
        (lambda: ElementwiseLSTM(3, 0), "hidden must be a positive integer"),
        (lambda: LRU(3, 2, 0), "d_out must be a positive integer"),
        (lambda: LRU(3, 2, r_min=0.9, r_max=0.8), "r_min"),
        (lambda: RTU(3, 2, r_max=1.5), "r_max must be a number in 0 … 1"),
        (lambda: Columns(lambda: MinGRU(3, 1), 0), "n must be a positive integer"),
        (lambda: Columns(lambda: nn.Linear(3, 1), 2), "has no init_state"),
        (lambda: rtrl.Stack([nn.Linear(3, 1), nn.Tanh()]), "at least one layer that is a cell"),
        (lambda: rtrl.Stack([MinGRU(3, 2), nn.Bilinear(2, 2, 1)]), "does not take x alone"),
        (lambda: rtrl.Stack([MinGRU(3, 2), nn.GRUCell(2, 2)]), "from_torch"),
    ],
)
def test_wrong_sizes_are_refused(make: Make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("units", [1, 2])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
def test_columns_of_pytorchs_cells_are_these_cells_side_by_side(kind: Any, units: int) -> None:
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(rtrl.from_torch(kind(D, units, bias=kind is not nn.GRUCell)).double())
        return made[-1]

    cell, x = Columns(make, 3), noise(B, D)
    assert len(list(cell.parameters())) == (2 if kind is nn.GRUCell else 4)
    h = noise(B, *cell.init_state(B).shape[1:])
    assert not cell.init_state(B).any() and h.shape == (B, 3, (2 if kind is nn.LSTMCell else 1) * units)
    y, after = cell(x, h)
    for i, unit in enumerate(made):
        own = h[:, i].unflatten(1, unit.init_state(1).shape[1:])  # type: ignore[operator]
        y_own, after_own = unit(x, own)
        torch.testing.assert_close(y[:, i * units : (i + 1) * units], y_own, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(after[:, i], after_own.flatten(1), rtol=1e-12, atol=1e-14)


def test_columns_of_other_cells_are_separate_modules() -> None:
    mixed = iter([nn.RNNCell(D, 1), nn.RNNCell(D, 1, nonlinearity="relu")])
    for make in (
        lambda: rtrl.from_torch(nn.GRUCell(D, 1), nn.Tanh()),
        lambda: MinGRU(D, 1),
        lambda: rtrl.from_torch(next(mixed)),
        lambda: rtrl.from_torch(nn.utils.parametrizations.weight_norm(nn.GRUCell(D, 1), "weight_hh")),
    ):
        assert isinstance(Columns(make, 2).units, nn.ModuleList)


def test_columns_are_units_of_their_own() -> None:
    unit = MinGRU(3, 1)
    with pytest.raises(ConfigError, match="make_unit must return a new module at each call"):
        Columns(lambda: unit, 2)
    sizes = iter([1, 2])
    with pytest.raises(ShapeError, match="same size"):
        Columns(lambda: MinGRU(3, next(sizes)), 2)
