"""``from_torch`` of PyTorch's own recurrent layers: what they compute and what they learn, against PyTorch itself."""

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers.running import gradients, run
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import rtrl
from rtrl._engine import checks
from rtrl._engine.taps import TapRecorder
from rtrl.cells import from_torch
from rtrl.testing import cell_checks, check_cell

T, B, D_IN = 9, 2, 3
F64 = torch.float64

MAKERS: dict[str, Callable[[], Any]] = {
    "RNNCell": lambda: nn.RNNCell(D_IN, 4),
    "RNNCell, relu, no bias": lambda: nn.RNNCell(D_IN, 4, bias=False, nonlinearity="relu"),
    "GRUCell": lambda: nn.GRUCell(D_IN, 4),
    "GRUCell, no bias": lambda: nn.GRUCell(D_IN, 4, bias=False),
    "LSTMCell": lambda: nn.LSTMCell(D_IN, 4),
    "LSTMCell, no bias": lambda: nn.LSTMCell(D_IN, 4, bias=False),
    "cells: GRU": lambda: [nn.GRUCell(D_IN, 4)],
    "cells: GRU, LSTM": lambda: [nn.GRUCell(D_IN, 5), nn.LSTMCell(5, 4)],
    "cells: LSTM, RNN, LSTM": lambda: (nn.LSTMCell(D_IN, 2), nn.RNNCell(2, 3, bias=False), nn.LSTMCell(3, 4)),
    "cells: RNN, RNN relu": lambda: nn.ModuleList([nn.RNNCell(D_IN, 4), nn.RNNCell(4, 4, nonlinearity="relu")]),
    "RNN": lambda: nn.RNN(D_IN, 4),
    "RNN, relu, two layers": lambda: nn.RNN(D_IN, 4, 2, nonlinearity="relu"),
    "GRU, two layers": lambda: nn.GRU(D_IN, 4, 2),
    "GRU, three layers, no bias": lambda: nn.GRU(D_IN, 4, 3, bias=False),
    "LSTM": lambda: nn.LSTM(D_IN, 4, batch_first=True),
    "LSTM, two layers": lambda: nn.LSTM(D_IN, 4, 2),
    "LSTM, three layers, no bias": lambda: nn.LSTM(D_IN, 4, 3, bias=False),
    "LSTM, two layers, projection": lambda: nn.LSTM(D_IN, 6, 2, proj_size=4),
}
each = pytest.mark.parametrize("name", MAKERS)


def made(name: str) -> tuple[Any, nn.Linear, nn.Module, Tensor]:
    """A module of PyTorch in float64, a readout, the two as a cell, and a stream."""
    module, readout = MAKERS[name](), nn.Linear(4, 2)
    cell = seeded(from_torch(module, readout), 3, scale=1.0)
    xs = torch.randn(T, B, D_IN, dtype=F64, generator=torch.Generator().manual_seed(4))
    return module, readout, cell, xs


def unrolled(module: Any, xs: Tensor) -> tuple[list[Tensor], list[Any]]:
    """What PyTorch's own modules give for a sequence: the top layer's h, and the states of all layers, each step."""
    tops, states = [], []
    if isinstance(module, nn.RNNBase):
        module = copy.copy(module)
        module.batch_first = False
        state = None
        for x in xs:
            top, state = module(x.unsqueeze(0), state)
            tops.append(top[0])
            states.append(list(zip(*state, strict=True)) if isinstance(state, tuple) else list(state))
        whole = module(xs)[0]
        torch.testing.assert_close(torch.stack(tops), whole, rtol=1e-12, atol=1e-13)
        return list(whole), states
    cells = [module] if isinstance(module, nn.RNNCellBase) else list(module)
    now: list[Any] = [None] * len(cells)
    for x in xs:
        for k, cell in enumerate(cells):
            now[k] = cell(x, now[k])
            x = now[k][0] if isinstance(now[k], tuple) else now[k]
        tops.append(x)
        states.append(list(now))
    return tops, states


def loss(t: int, y: Tensor) -> Tensor | None:
    return None if t % 3 == 1 else (y.sin() * (1 + t)).sum()


def layers(cell: nn.Module, h: Tensor) -> Sequence[Any]:
    if hasattr(cell, "unpack"):
        return cell.unpack(h)
    return [tuple(h.unbind(1)) if isinstance(cell.cell, nn.LSTMCell) else h]


@each
def test_every_step_is_that_of_pytorch(name: str) -> None:
    module, readout, cell, xs = made(name)
    tops, states = unrolled(module, xs)
    h = cell.init_state(B)
    assert h.dtype == F64 and not h.count_nonzero()
    for x, top, wanted in zip(xs, tops, states, strict=True):
        y, h = cell(x, h)
        torch.testing.assert_close(y, readout(top), rtol=1e-12, atol=1e-12)
        found = layers(cell, h)
        assert len(found) == len(wanted)
        for one, two in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@each
def test_gradients_are_those_of_pytorch_and_influences_those_of_dense_rtrl(name: str) -> None:
    module, readout, cell, xs = made(name)
    found = run(cell, xs, loss, block=4)  # a PerformanceWarning would be an error, as any warning in this suite
    assert_gradients_equal(found.gradients, oracles.bptt(cell, xs, loss))
    wanted, influences = oracles.dense_rtrl(cell, xs, loss, return_influence=True)
    assert_gradients_equal(found.gradients, wanted)
    assert_influences_equal(found.influences, influences[-1])

    tops, _ = unrolled(module, xs)  # the adapter has no part in this
    total = sum(value for t, top in enumerate(tops) if (value := loss(t, readout(top))) is not None)
    total.backward()
    assert_gradients_equal(found.gradients, gradients(cell))


@each
def test_it_keeps_the_contract(name: str) -> None:
    report = check_cell(made(name)[2], list(made(name)[3][:2]))
    assert report.checks == cell_checks() and not report.skipped and not report.notes


@each
def test_every_weight_is_met_in_a_linear_map(name: str) -> None:
    _, _, cell, xs = made(name)
    parameters = dict(cell.named_parameters())
    with TapRecorder(parameters, B) as recorder:
        y, h = cell(xs[0], cell.init_state(B))
    assert {tap.name for tap in recorder.taps} == parameters.keys()
    reached = checks.reached_leaves(y, h)
    assert not [n for n, p in parameters.items() if id(p) in reached], "these would take the general path"


@each
def test_the_module_is_used_in_place_and_left_as_it_was(name: str) -> None:
    module, readout, cell, xs = made(name)
    own = nn.ModuleList(module) if isinstance(module, list | tuple) else module
    before = copy.deepcopy(own.state_dict())
    run(cell, xs[:3], loss, block=2)
    assert [n for n, _ in cell.named_parameters()] == [
        *(f"cell.{n}" for n, _ in own.named_parameters()),
        "readout.weight",
        "readout.bias",
    ]
    assert list(cell.state_dict()) == [n for n, _ in cell.named_parameters()]
    mine = dict(cell.named_parameters())
    assert all(mine[f"cell.{n}"] is p for n, p in own.named_parameters())
    assert cell.readout is readout
    if not isinstance(module, list | tuple):
        assert cell.cell is module
    for key, value in own.state_dict().items():
        assert torch.equal(value, before[key])
    unrolled(module, xs)  # and it still runs


@each
def test_a_copy_and_a_pickled_cell_go_on_alike(name: str) -> None:
    _, _, cell, xs = made(name)
    h = torch.randn_like(cell.init_state(B))
    for other in (copy.deepcopy(cell), pickle.loads(pickle.dumps(cell))):
        for one, two in zip(cell(xs[0], h), other(xs[0], h), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["cells: GRU, LSTM", "LSTM, two layers, projection"])
def test_dtype_and_device_are_those_of_the_parameters(name: str, device: torch.device) -> None:
    cell = made(name)[2]
    for dtype in (torch.float32, F64):
        cell = cell.to(device, dtype)
        h = cell.init_state(B)
        y, h_next = cell(torch.ones(B, D_IN, dtype=dtype, device=device), h)
        assert {t.dtype for t in (h, y, h_next)} == {dtype}
        assert {t.device.type for t in (h, y, h_next)} == {device.type}


def test_pack_undoes_unpack() -> None:
    cell = made("cells: LSTM, RNN, LSTM")[2]
    h = torch.arange(2.0 * 15).reshape(2, 15)
    (h0, c0), h1, (h2, c2) = cell.unpack(h)
    assert torch.equal(torch.cat([h0, c0, h1, h2, c2], dim=1), h)
    assert torch.equal(cell.pack(cell.unpack(h)), h)


def test_the_states_of_a_warmed_up_module_go_in() -> None:
    module, readout, cell, xs = made("LSTM, two layers")
    with torch.no_grad():
        _, (h, c) = module(xs[:5])
    learner = rtrl.BlockRTRL(cell, B, state=cell.pack(tuple(zip(h, c, strict=True))))
    torch.testing.assert_close(learner.step(xs[5]), readout(module(xs[:6])[0][5]), rtol=1e-12, atol=1e-12)


def test_layers_that_share_their_weights_learn_what_both_teach_them() -> None:
    below, above = nn.GRUCell(D_IN, D_IN), nn.GRUCell(D_IN, D_IN)
    for name, parameter in below.named_parameters():
        setattr(above, name, parameter)
    cell = seeded(from_torch([below, above]), 0)
    xs = torch.randn(T, B, D_IN, dtype=F64, generator=torch.Generator().manual_seed(6))
    found = run(cell, xs, loss, block=4, influences=False)
    assert list(found.gradients) == [f"cell.0.{n}" for n, _ in below.named_parameters()]
    total = sum(value for t, top in enumerate(unrolled([below, above], xs)[0]) if (value := loss(t, top)) is not None)
    total.backward()
    assert_gradients_equal(found.gradients, gradients(cell))


def test_layers_go_into_a_stack() -> None:
    makers = (nn.GRU(D_IN, 3, 2), [nn.LSTMCell(3, 2), nn.RNNCell(2, 4)])
    cell = seeded(rtrl.cells.Stack([from_torch(maker) for maker in makers]), 1)
    xs = torch.randn(T, B, D_IN, dtype=F64)
    assert_gradients_equal(run(cell, xs, loss, block=4).gradients, oracles.bptt(cell, xs, loss))


KINDS = st.sampled_from([nn.RNNCell, nn.GRUCell, nn.LSTMCell])


@given(
    st.lists(st.tuples(KINDS, st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(0, 2**20),
)
def test_any_layers_learn_what_pytorch_learns(layered: list[Any], block: int, batch: int, seed: int) -> None:
    widths = [D_IN, *(width for _, width, _ in layered)]
    cells = [kind(widths[k], width, bias=bias) for k, (kind, width, bias) in enumerate(layered)]
    cell = seeded(from_torch(cells), seed)
    xs = torch.randn(6, batch, D_IN, dtype=F64, generator=torch.Generator().manual_seed(seed))
    found = run(cell, xs, loss, block=block, influences=False)
    total = sum(value for t, top in enumerate(unrolled(cells, xs)[0]) if (value := loss(t, top)) is not None)
    total.backward()
    assert_gradients_equal(found.gradients, gradients(cell))
