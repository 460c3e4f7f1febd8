"""Plain recurrent cells whose units interact in linear maps alone, as users write them; and some where that ends.

Each takes x (B, 3) in float64, has units of width 3, and returns a readout of the new state as y.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtrl._engine import autograd, unitwise

WIDTH, D_IN = 3, 3
Step = Callable[[Any, Tensor, Tensor], Tensor]


class Plain(nn.Module):
    """``h' = step(cell, x, h)``, ``y = readout(h')``, with any parts.

    Args:
        step: of the cell.
        state: the shape of the state of one sample.
        parts: the cell's modules, and the shapes of its parameters.
    """

    def __init__(self, step: Step, state: tuple[int, ...] = (WIDTH,), **parts: nn.Module | tuple[int, ...]) -> None:
        super().__init__()
        self.step, self.shape = step, state
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(torch.rand(part)) if isinstance(part, tuple) else part)
        self.readout = nn.Linear(torch.Size(state).numel(), 2)
        self.double()

    def init_state(self, batch_size: int) -> Tensor:
        """Return constants."""
        return torch.full((batch_size, *self.shape), 0.3, dtype=torch.float64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take one step."""
        h = self.step(self, x, h)
        return self.readout(h.flatten(1)), h


def _map(inputs: int, gates: int = 1, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, gates * WIDTH, bias=bias)


def _gru(c: Any, x: Tensor, h: Tensor) -> Tensor:
    (a, b, c1), (d, e, f) = c.enter(x).chunk(3, 1), c.recur(h).chunk(3, 1)
    update = torch.sigmoid(b + e)
    return (1 - update) * torch.tanh(c1 + torch.sigmoid(a + d) * f) + update * h


def _lstm(z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = z.chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _lstm_side_by_side(c: Any, x: Tensor, state: Tensor) -> Tensor:
    h, cell = state.chunk(2, 1)
    return torch.cat(_lstm(c.all(torch.cat([x, h], 1)), cell), 1)


def _lstm_stacked(c: Any, x: Tensor, state: Tensor) -> Tensor:
    h, cell = state.unbind(1)
    z = torch.cat([gate(torch.cat([h, x], 1)) for gate in (c.i, c.f, c.g, c.o)], 1)
    return torch.stack(_lstm(z, cell), 1)


def _in_place(c: Any, x: Tensor, h: Tensor) -> Tensor:
    z = c.enter(x)
    z += c.recur(h)
    return z.tanh_()


def _peephole(c: Any, x: Tensor, h: Tensor) -> Tensor:
    """Parameters that meet unit by unit, inside and outside the maps."""
    return torch.tanh(c.enter(x) + c.recur(c.p * h) + c.q * h)


UNITWISE: dict[str, Callable[[], nn.Module]] = {
    "two maps": lambda: Plain(lambda c, x, h: torch.tanh(c.enter(x) + c.recur(h)), enter=_map(D_IN), recur=_map(WIDTH)),
    "one map": lambda: Plain(lambda c, x, h: torch.tanh(c.all(torch.cat([x, h], 1))), all=_map(D_IN + WIDTH)),
    "GRU": lambda: Plain(_gru, enter=_map(D_IN, 3), recur=_map(WIDTH, 3)),
    "LSTM, parts side by side": lambda: Plain(_lstm_side_by_side, (2 * WIDTH,), all=_map(D_IN + WIDTH, 4)),
    "LSTM, parts stacked": lambda: Plain(
        _lstm_stacked, (2, WIDTH), **{gate: _map(D_IN + WIDTH, bias=gate == "f") for gate in "ifgo"}
    ),
    "leaky units": lambda: Plain(
        lambda c, x, h: 0.7 * h + 0.3 * (c.enter(x) + c.recur(torch.relu(h))), enter=_map(D_IN), recur=_map(WIDTH)
    ),
    "parameters of units": lambda: Plain(_peephole, enter=_map(D_IN), recur=_map(WIDTH), p=(WIDTH,), q=(WIDTH,)),
    "matrices on the right": lambda: Plain(
        lambda c, x, h: torch.tanh(x @ c.enter + h @ c.recur), enter=(D_IN, WIDTH), recur=(WIDTH, WIDTH)
    ),
    "in place": lambda: Plain(_in_place, enter=_map(D_IN), recur=_map(WIDTH)),
    "one weight twice": lambda: Plain(
        lambda c, x, h: torch.tanh(c.recur(x) + F.linear(h, c.recur.weight) * h), recur=_map(WIDTH)
    ),
    "linear": lambda: Plain(lambda c, x, h: c.enter(x) + c.recur(h), enter=_map(D_IN), recur=_map(WIDTH)),
}
"""Cells that are linearised unit by unit."""


INTERACTING: dict[str, Callable[[], nn.Module]] = {
    name: (lambda step=step: Plain(step, enter=_map(D_IN), recur=_map(WIDTH), norm=nn.LayerNorm(WIDTH)))
    for name, step in (
        ("normalised units", lambda c, x, h: torch.tanh(c.norm(c.enter(x) + c.recur(h)))),
        ("a map behind a map", lambda c, x, h: torch.tanh(c.recur(torch.relu(c.enter(x) + h)))),
        ("units in another order", lambda c, x, h: torch.tanh(c.enter(x) + c.recur(h.flip(1)))),
    )
}
"""Cells whose units interact elsewhere, too."""


def _opening(x: Tensor) -> Tensor:
    """Zero until the first entry of x is larger than 2, whatever the parameters are."""
    return torch.relu(x[:, :1] - 2)


def _in_the_state(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(c.enter(x) + c.recur(h)) + 0.5 * h + _opening(x) * 1e-3 * h.roll(1, 1)


def _behind_a_map(c: Any, x: Tensor, h: Tensor) -> Tensor:
    z = c.enter(x) + c.recur(h)
    return torch.tanh(z + _opening(x) * 1e-3 * z.roll(1, 1))


def _before_a_map(c: Any, x: Tensor, h: Tensor) -> Tensor:
    return torch.tanh(c.enter(x) + c.recur(h + _opening(x) * 1e-3 * h.roll(1, 1)))


def _with_a_weight(c: Any, x: Tensor, h: Tensor) -> Tensor:
    """A parameter that grows: at 0.9 its units are apart, at 2 they are not."""
    return torch.tanh(c.enter(x) + c.recur(h) + torch.relu(c.p - 1.5) * h.roll(1, 1))


INTERACTING_LATER: dict[str, Callable[[], nn.Module]] = {
    name: (lambda step=step: Plain(step, enter=_map(D_IN), recur=_map(WIDTH)))
    for name, step in (
        ("in the state", _in_the_state),
        ("behind a map", _behind_a_map),
        ("before a map", _before_a_map),
    )
}
"""Cells that are linearised unit by unit until the first entry of x is larger than 2."""


def with_a_weight() -> Plain:
    """A cell whose parameter p couples its units once it is larger than 1.5."""
    cell = Plain(_with_a_weight, enter=_map(D_IN), recur=_map(WIDTH), p=(1,))
    with torch.no_grad():
        cell.p.fill_(0.9)  # type: ignore[union-attr]
    return cell


@contextmanager
def blocks_unit_by_unit() -> Iterator[list[bool]]:
    """Small steps are linearised unit by unit, too; and for each block that was tried, whether it was."""
    tried: list[bool] = []
    take = unitwise.unitwise_derivatives

    def noted(*args: Any) -> Any:
        found = take(*args)
        tried.append(found is not None)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unitwise, "_LEAST_NUMBERS", 0)
        patch.setattr(autograd, "unitwise_derivatives", noted)
        yield tried
