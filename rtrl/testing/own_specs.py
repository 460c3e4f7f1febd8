"""What the learners and cells of this package promise, for ``pytest --rtrl-spec=rtrl.testing.own_specs:ALL``.

They are also examples: a spec says which law a learner obeys, on which cells, and what it refuses.
"""

import functools
from typing import Any

import torch
from torch import nn

import rtrl
from rtrl import errors
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, DiagonalRTRL, LayerLocal, SnAp
from rtrl.testing.example_cells import Leaky, Ring, seeded
from rtrl.testing.laws import Exact, ExactWithin, Truncated, Unbiased
from rtrl.testing.recursion_laws import LocalToLayers, Masked
from rtrl.testing.spec import CellSpec, ErrorInput, LearnerSpec
from rtrl.testing.streams import Stream, normal


def _x(learner: Any, fill: float = 0.0, batch: int | None = None) -> torch.Tensor:
    """An x as wide as the one before."""
    first = next(p for p in learner.cell.parameters() if p.ndim == 2)  # maps x
    width = first.shape[1]
    return torch.full((learner.batch_size if batch is None else batch, width), fill, dtype=torch.float64)


PROMISES: dict[str, Any] = {"constant_memory": True, "plain_backward": True, "copies_inputs": True}

ERRORS = [
    ErrorInput("another batch", lambda learner: learner.step(_x(learner, batch=7)), errors.ShapeError, "batch of"),
    ErrorInput("float32 x", lambda learner: learner.step(_x(learner).float()), errors.ShapeError, "float32"),
    ErrorInput("NaN in x", lambda learner: learner.step(_x(learner, float("nan"))), errors.NonFiniteError, "NaN"),
    ErrorInput("no tensor", lambda learner: learner.step({}), errors.ShapeError, "no tensor"),
    ErrorInput("a loss of nothing", lambda learner: learner.backward(torch.ones(())), errors.LossError),
    ErrorInput(
        "samples of another batch", lambda learner: learner.reset(torch.ones(9).bool()), errors.ShapeError, "samples"
    ),
]


def _leaky(leak: float | None) -> list[Stream]:
    """Cells whose dynamics Jacobian is diagonal: a constant leak, or one a unit."""
    return [Stream(seeded(Leaky(3, 4, leak), 0), normal(0, 14, 2, 3), name="leaky units")]


LAYERS = {"layers.0.": range(3), "layers.2.": range(3, 7), "layers.4.": range(7, 9)}


def _layers() -> list[Stream]:
    """Three layers with a state and others between them; a dense one, and one whose rows are pairs."""
    dense = rtrl.cells.from_torch(nn.RNNCell(3, 3))
    cell = rtrl.Stack([dense, nn.Linear(3, 2), rtrl.cells.RTU(2, 2), nn.LayerNorm(4), rtrl.cells.MinGRU(4, 2)])
    return [Stream(seeded(cell, 0), normal(0, 12, 2, 3), name="layers with others between")]


def _ring() -> list[Stream]:
    """A cell in which each unit sees itself and its neighbour alone, so that masks of any order say something."""
    return [Stream(seeded(Ring(2, 4), 0), normal(0, 14, 2, 2), name="a ring of units")]


def _uoro(cell: nn.Module, batch_size: int) -> UORO:
    return UORO(cell, batch_size)  # draws from the global generator, which the check seeds before each draw


def _block(**options: Any) -> LearnerSpec:
    words = ", ".join(f"{name}={value}" for name, value in options.items())
    make = functools.partial(rtrl.BlockRTRL, **options)
    return LearnerSpec(make, name=f"BlockRTRL({words})", errors=ERRORS, **PROMISES)


BLOCK_RTRL = [
    _block(block=1, window=3),
    _block(block=4, window=2),
    _block(block=64),
    _block(block=3, lazy=False),
]

BASELINES = [
    LearnerSpec(BPTT, errors=ERRORS, plain_backward=True, copies_inputs=True),
    LearnerSpec(
        functools.partial(TBPTT, horizon=3),
        law=Truncated(3),
        name="TBPTT(3), sliding",
        errors=ERRORS,
        **PROMISES,
    ),
    LearnerSpec(
        functools.partial(TBPTT, horizon=3, sliding=False),
        law=Truncated(3, sliding=False),
        name="TBPTT(3), in chunks",
        errors=ERRORS,
        **PROMISES,
    ),
    LearnerSpec(
        functools.partial(TBPTT, horizon=5),
        law=ExactWithin(5),
        name="TBPTT(5) within 5 steps",
    ),
    LearnerSpec(DenseRTRL, errors=ERRORS, **PROMISES),
    LearnerSpec(
        functools.partial(SnAp, order=1), law=Masked(), name="SnAp-1", streams=_ring(), errors=ERRORS,
        **PROMISES,
    ),
    LearnerSpec(
        functools.partial(SnAp, order=2), law=Masked(), name="SnAp-2", streams=_ring(), errors=ERRORS,
        **PROMISES,
    ),
    LearnerSpec(functools.partial(SnAp, order=3), law=ExactWithin(3), name="SnAp-3 within 3 steps"),
    LearnerSpec(
        functools.partial(SnAp, order=4), law=Exact(scope="order ≥ H"), name="SnAp-4 of 4 units", streams=_ring()
    ),
    LearnerSpec(_uoro, law=Unbiased(), name="UORO", sparse=False, **PROMISES),
    LearnerSpec(
        functools.partial(RFLO, leak=0.3),
        law=Exact(scope="the dynamics Jacobian is (1 − leak) I"),
        name="RFLO(0.3)",
        streams=_leaky(0.3),
        errors=ERRORS,
        **PROMISES,
    ),
    LearnerSpec(
        DiagonalRTRL,
        law=Exact(scope="the dynamics Jacobian is diagonal"),
        streams=_leaky(None),
        errors=ERRORS,
        **PROMISES,
    ),
    LearnerSpec(
        LayerLocal,
        law=LocalToLayers(LAYERS),
        streams=_layers(),
        errors=ERRORS,
        **PROMISES,
    ),
]  # fmt: skip


def _torch(*cells: nn.Module, width: int) -> nn.Module:
    return rtrl.cells.from_torch(cells[0] if len(cells) == 1 else list(cells), nn.Linear(width, 2))


def _inputs(cell: nn.Module) -> list[torch.Tensor]:
    return list(normal(0, 3, 4, 3).to(next(cell.parameters()).dtype))


CELLS = [
    CellSpec(lambda: rtrl.RecurrentMoE(3, 2, d_model=4, n_slots=4, n_experts=4, topk=2), _inputs, name="RecurrentMoE"),
    CellSpec(lambda: _torch(nn.RNNCell(3, 4), width=4), _inputs, name="nn.RNNCell"),
    CellSpec(lambda: _torch(nn.GRUCell(3, 4), width=4), _inputs, name="nn.GRUCell"),
    CellSpec(lambda: _torch(nn.LSTMCell(3, 4), width=4), _inputs, name="nn.LSTMCell"),
    CellSpec(lambda: _torch(nn.GRUCell(3, 4), nn.LSTMCell(4, 2), width=2), _inputs, name="layers of cells"),
    CellSpec(lambda: _torch(nn.LSTM(3, 4, num_layers=2), width=4), _inputs, name="nn.LSTM"),
]

ALL = [*BLOCK_RTRL, *BASELINES, *CELLS]
