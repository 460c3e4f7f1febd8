"""An error names the place: the step, the sample and the row at fault, in a block of several steps and samples."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.strategies import normal
from torch import Tensor, nn

import rtrl
from rtrl.cells.protocol import OTHER_CHOICES
from rtrl.errors import CellError, NonFiniteError, RTRLError, ShapeError, SparsityError

F64 = torch.float64
BATCH, FLAGGED, SAMPLE = 3, 4, 2  # one sample of one step is at fault: in blocks of three, the one in the middle


class Flagged(nn.Module):
    """Reads and writes row 0 of a state (B, 6, 2); where x is flagged, it breaks its contract as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.enter, self.recur, self.head = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.other = nn.Linear(2, 2, bias=False)
        self.zero = nn.Parameter(torch.zeros(2))
        self.double()
        nn.init.zeros_(self.other.weight)

    def init_state(self, batch_size: int) -> Tensor:
        return torch.linspace(0.1, 0.8, 12, dtype=F64).reshape(1, 6, 2).repeat(batch_size, 1, 1)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        flag = x[:, 1:2] > 100
        x = torch.where(flag, 0.5, x)
        root: Callable[[Tensor], Tensor] = lambda z: torch.where(flag, z, 1.0).sqrt()  # infinitely steep where z is 0
        new, y, last = torch.tanh(self.enter(x) + self.recur(h[:, 0])), self.head(h[:, 0]), h[:, 3]
        extra: dict[str, Callable[[], Tensor]] = {
            "writes": lambda: self.zero * flag,
            "opposite writes": lambda: self.zero.sum() * flag * torch.tensor([1.0, -1.0], dtype=F64),
            "reads": lambda: torch.where(flag, h[:, 2], 0.0),
            "Jacobian": lambda: root(h[:, 0] - h[:, 0]),
            "tap": lambda: root(self.other(x)),
            "state": lambda: torch.where(flag & (len(x) != BATCH), 0.1, 0.0),
            "nothing": lambda: torch.zeros_like(y),
        }
        part, _, what = self.how.partition(" of ")
        value = extra[what]()
        if part == "y":
            y = y + value
        elif what.endswith("writes"):
            last = last + value
        else:
            new = new + value
        first = torch.zeros(len(x), 1, dtype=torch.int64)
        return y, torch.cat([new[:, None], h[:, 1:3], last[:, None], h[:, 4:]], dim=1), rtrl.Sparsity(first, first)


def stream() -> Tensor:
    xs = normal(1, 6, BATCH, 2)
    xs[FLAGGED, SAMPLE, 1] = 1e3
    return xs


DIFFERENT = (
    ": re-running these steps as one batch gave a different {} than running them one by one. Either the cell is not a"
    " pure function of (x, h, parameters), its samples are not independent, or its parameters were changed behind"
    " autograd's back inside an open block (call sync() first)"
)
PLACES: dict[str, tuple[type[RTRLError], str]] = {
    "h of writes": (
        SparsityError,
        "step 4: row 3 of the state of sample 2 is not declared as written, yet it depends on more than its own last"
        " value (which did not change)",
    ),
    "h of opposite writes": (
        SparsityError,
        "step 4: row 3 of the state of sample 2 is not declared as written, yet it depends on more than its own last"
        " value (which did not change)",
    ),
    "h of reads": (
        SparsityError,
        "step 4: the written rows of sample 2 depend on row 2 of the state, which it declares neither as read nor as"
        " written",
    ),
    "y of reads": (
        SparsityError,
        "{steps}: y depends on rows of the state outside the declared reads and writes",
    ),
    "h of Jacobian": (NonFiniteError, "NaN or infinity in the dynamics Jacobian, step 4, sample 2"),
    "y of Jacobian": (NonFiniteError, "NaN or infinity in the adjoint, step 4, sample 2"),
    "h of tap": (
        NonFiniteError,
        "NaN or infinity in the immediate Jacobian of parameter 'other.weight', step 4, sample 2",
    ),
    "y of tap": (NonFiniteError, "NaN or infinity in the gradient of parameter 'other.weight', step 4, sample 2"),
    "h of state": (CellError, "{steps}" + DIFFERENT.format("state")),
    "y of state": (CellError, "{steps}" + DIFFERENT.format("output")),
}


# A block of one step cannot differ from the step itself.
@pytest.mark.parametrize(
    ("how", "block"), [(how, block) for how in PLACES for block in (1, 3) if block == 3 or not how.endswith("of state")]
)
def test_the_step_and_the_sample_at_fault_are_named(how: str, block: int) -> None:
    error, message = PLACES[how]
    learner = rtrl.BlockRTRL(Flagged(how), BATCH, block=block)
    message = message.format(steps="step 4" if block == 1 else "steps 3 … 5")
    with pytest.raises(error, match=f"^{re.escape(message)}$") as caught:  # noqa: PT012
        for x in stream():
            learner.backward(learner.step(x).square().sum())
        learner.sync()
    assert type(caught.value) is error


def test_of_several_places_at_fault_the_earliest_step_is_named() -> None:
    xs = normal(1, 3, BATCH, 2)
    xs[2, 0, 1] = xs[1, SAMPLE, 1] = 1e3
    learner = rtrl.BlockRTRL(Flagged("h of Jacobian"), BATCH, block=3)
    for x in xs:
        learner.step(x)
    with pytest.raises(NonFiniteError, match="step 1, sample 2"):
        learner.sync()


class TwoScales(nn.Module):
    """The influence of a is large but finite, though its largest factors, of two samples, do not show it; that of b
    overflows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, dtype=F64), nn.Parameter(torch.zeros(2, 2, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 2, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        first = (x[:, :1] > 0).to(F64)
        h = (1 + 1e200 * first) * self.a(x * (1 + 1e150 * (1 - first)))
        h = h + 1e200 * nn.functional.linear(1e200 * x, self.b)
        return h, h


def test_an_influence_that_overflows_in_the_second_linear_map_is_refused() -> None:
    learner = rtrl.BlockRTRL(TwoScales(), 2, block=2)
    learner.step(torch.tensor([[1.0, 0.5], [-1.0, 0.5]], dtype=F64))
    with pytest.raises(NonFiniteError, match="influence of parameter 'b'"):
        learner.sync()


class OwnRows(nn.Module):
    """Each sample writes the row of two that x says; the other row of the second sample depends on a parameter
    that does not move it."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.zero = nn.Linear(2, 2, dtype=F64), nn.Parameter(torch.zeros(2, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.ones(batch_size, 2, 2, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        writes = (x[:, :1] > 0).long()
        new = torch.tanh(self.enter(x) + h.sum(1)).unsqueeze(1)
        moved = h + (self.zero - self.zero.detach()) * (x[:, :1, None] > 0)
        h = moved.scatter(1, writes[:, :, None].expand(-1, 1, 2), new)
        return h.sum(1), h, rtrl.Sparsity(None, writes)


def test_each_sample_is_held_to_the_rows_that_it_declares_itself() -> None:
    learner = rtrl.BlockRTRL(OwnRows(), 2, block=2)
    for _ in range(2):
        learner.step(torch.tensor([[-1.0, 0.5], [1.0, 0.5]], dtype=F64))
    with pytest.raises(SparsityError, match="step 0: row 0 of the state of sample 1 is not declared as written"):
        learner.sync()


def test_a_row_that_a_zero_parameter_moves_is_named_with_its_step_and_sample() -> None:
    class Moved(OwnRows):
        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
            y, h, sparsity = super().forward(x, h)
            other = 1 - sparsity.writes[:, :, None]
            return y, h.scatter_add(1, other.expand(-1, 1, 2), (self.zero * x[:, 1:] * 1e3)[:, None]), sparsity

    learner = rtrl.BlockRTRL(Moved(), 2, block=2)
    for second in (0.0, 0.5):
        learner.step(torch.tensor([[-1.0, 0.0], [-1.0, second]], dtype=F64))
    with pytest.raises(SparsityError, match="step 1: row 1 of the state of sample 1 changed"):
        learner.sync()


class ManyTerms(nn.Module):
    """Adds terms whose influence is 1e307 each: some tokens in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Parameter(torch.zeros(1, 1, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        h = h + 1e200 * nn.functional.linear(1e107 * x.unsqueeze(2), self.b).sum(1)
        return h, h


@pytest.mark.parametrize(("steps", "tokens"), [(18, 1), (1, 18)])
def test_a_sum_of_many_terms_that_overflows_is_refused(steps: int, tokens: int) -> None:
    learner = rtrl.BlockRTRL(ManyTerms(), 1, block=steps)
    for _ in range(steps):
        learner.step(torch.ones(1, tokens, dtype=F64))
    with pytest.raises(NonFiniteError, match="influence of parameter 'b'"):
        learner.sync()


class Undecided(nn.Module):
    """Writes the first row of a single sample and the last row of those of a larger batch; once stubborn, it
    ignores the replay."""

    stubborn = False

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(2, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.full((batch_size, 2), 0.5, dtype=F64)

    def forward(
        self, x: Tensor, h: Tensor, replay: rtrl.Sparsity | None = None
    ) -> tuple[Tensor, Tensor, rtrl.Sparsity]:
        chosen = torch.full((len(x), 1), int(len(x) > 1)) if replay is None or self.stubborn else replay.writes
        assert chosen is not None
        new = torch.tanh((h @ self.weight).gather(1, chosen) + x)
        return new, h.scatter(1, chosen, new), rtrl.Sparsity(None, chosen)


def test_choices_that_are_not_replayed_are_named_with_their_steps() -> None:
    learner = rtrl.BlockRTRL(Undecided(), 1, block=2)
    for x in normal(1, 4, 1, 1):
        learner.backward(learner.step(x).sum())
    learner.cell.stubborn = True
    with pytest.raises(CellError, match=f"^{re.escape(f'steps 2 … 3: {OTHER_CHOICES}')}$"):
        learner.sync()


def test_what_is_flagged_is_no_fault_by_itself() -> None:
    learner = rtrl.BlockRTRL(Flagged("h of nothing"), BATCH, block=3)
    for x in stream():
        learner.backward(learner.step(x).square().sum())
    learner.sync()
    assert bool(learner.cell.enter.weight.grad.count_nonzero())


# ---------------------------------------------------------------------- overflow over the steps of a block


class Steep(nn.Module):
    """h' = slope h + w x, y = out h, at h = w = 0: every value is zero, whatever the derivatives are."""

    def __init__(self, slope: float, out: float, *, untapped: bool = False) -> None:
        super().__init__()
        self.slope, self.out, self.untapped = slope, out, untapped
        self.w = nn.Parameter(torch.zeros(1, 1, dtype=F64))

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.out * h, self.slope * h + (x * self.w.sum() if self.untapped else x @ self.w)


OVERFLOWS: dict[str, tuple[float, float, float, str]] = {
    "products": (1e200, 1.0, 0.0, "NaN or infinity in the Jacobian product of {}: the state's dynamics overflow"),
    "adjoints": (1e100, 1e250, 0.0, "NaN or infinity in the adjoint of {}: the state's dynamics overflow"),
    "gradients": (1.0, 1e250, 1e100, "NaN or infinity in the gradient of parameter 'w' inside {}"),
    "immediate influence": (1e120, 0.0, 1e200, "NaN or infinity in the immediate influence of parameter 'w' in {}"),
}


@pytest.mark.parametrize("untapped", [False, True], ids=["tap", "untapped"])
@pytest.mark.parametrize("kind", OVERFLOWS)
def test_what_overflows_over_a_block_is_named_with_its_steps(kind: str, untapped: bool) -> None:
    slope, out, size, message = OVERFLOWS[kind]
    learner = rtrl.BlockRTRL(Steep(slope, out, untapped=untapped), 2, block=2)
    for t in range(4):
        x = torch.full((2, 1), size if t >= 2 else 0.0, dtype=F64)
        y = learner.step(x)
        if t == 1:
            learner.reset(discard=True)
        if t == 3:
            learner.backward(y.sum())
    with pytest.raises(NonFiniteError, match=f"^{re.escape(message.format('steps 2 … 3'))}$"):
        learner.sync()


def test_what_overflows_over_several_blocks_is_named_with_the_last_step() -> None:
    learner = rtrl.BlockRTRL(Steep(1.0, 1e200), 2, block=1)
    learner.step(torch.full((2, 1), 1e200, dtype=F64))
    learner.backward(learner.step(torch.zeros(2, 1, dtype=F64)).sum())
    with pytest.raises(NonFiniteError, match=r"^NaN or infinity in the gradient of parameter 'w' up to step 1$"):
        learner.sync()
    learner = rtrl.BlockRTRL(Steep(1e200, 1.0), 2, block=1)
    for size in (1e200, 0.0):
        learner.step(torch.full((2, 1), size, dtype=F64))
    message = r"^the influence of parameter 'w' explodes: its entries are up to 1\.0e\+200 before steps 1 … 1, "
    with pytest.raises(NonFiniteError, match=message):
        learner.influence("w")


# ---------------------------------------------------------------------- arguments


def started() -> Any:
    learner = rtrl.BlockRTRL(Flagged("h of nothing"), BATCH, block=3)
    learner.backward(learner.step(stream()[0]).sum())
    return learner


ALL = [True] * BATCH
ROWS = "samples must be a Boolean tensor of shape (3,), got {}"
ARGUMENTS: dict[str, tuple[Callable[[Any], Any], type[RTRLError], str]] = {
    "reset: a list": (lambda own: own.reset(ALL), ShapeError, ROWS.format("list")),
    "reset: integers": (lambda own: own.reset(torch.ones(3)), ShapeError, ROWS.format("torch.float32 (3,)")),
    "reset: another batch": (
        lambda own: own.reset(torch.ones(2, dtype=torch.bool)),
        ShapeError,
        ROWS.format("torch.bool (2,)"),
    ),
    "reset: elsewhere": (
        lambda own: own.reset(torch.ones(3, dtype=torch.bool, device="meta")),
        ShapeError,
        "samples is on meta, the state on cpu; move one of them",
    ),
    "x": (
        lambda own: own.step((torch.zeros(3, 1, dtype=F64), torch.zeros(3, 5, 2, dtype=F64))),
        ShapeError,
        "step 1: the cell does not take this x ((3, 1) torch.float64, (3, 5, 2) torch.float64) with a state (3, 6, 2)"
        " torch.float64: tuple indices must be integers or slices, not tuple",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_what_is_wrong_with_an_argument_is_said(call: Any, error: type[RTRLError], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(started())
