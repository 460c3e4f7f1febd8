"""Streams for learners: a cell, its inputs, a loss, and the events in mid-stream."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._utils import pytrees
from rtrl._utils.real_pairs import as_real, is_continuous
from rtrl.cells import RecurrentMoE
from rtrl.errors import ConfigError
from rtrl.testing.example_cells import (
    ForcedMoE,
    NearTie,
    OddCell,
    PartlyTrained,
    PlainRNN,
    ScheduledCell,
    SlowUnits,
    TwiceUsed,
    TwoLayers,
    seeded,
)

Loss = Callable[[int, Any], Tensor | None]


def squares(t: int, y: Any) -> Tensor:
    """A loss at every step, a sum over samples, whose gradient is not zero by symmetry."""
    leaves = [as_real(leaf) for leaf in pytrees.tensors(y) if is_continuous(leaf)]
    return torch.stack([(leaf - 0.1 * (t % 7)).square().sum() + leaf.sum() for leaf in leaves]).sum()


@dataclass(frozen=True, eq=False)
class Stream:
    """Sample inputs of a learner.

    Args:
        cell: in float64, with ``init_state``; it is copied and never changed.
        xs: (T, B, ...), the input of every step; T should be larger than a block of the learner.
        loss: ``loss(t, y)`` returns the scalar loss of step t, a sum over samples, or None.
        name: in reports.
        syncs: the steps after which ``sync`` is called; the end is not one of them.
        resets: Boolean (T, B); these samples are reset before a step.
        split_resets: the steps before which each sample is reset by a call of its own.
        saves: the steps after which the learner is saved, and a new learner loads its state and goes on.
        offsets: one dict of constants per step, by which the parameters differ from those of the cell.
        pieces: the number of losses into which each loss is split.
        scattered: whether each x is a view that is not contiguous.
        overwritten: whether each x is overwritten after the losses of its step.
        plain: whether ``loss.backward()`` replaces ``learner.backward(loss)``.
        unrolled: whether several steps are taken at once, by ``learner.unroll``, with one loss for all of them.

    Raises:
        ConfigError: xs is not a float64 tensor (T, B, ...), the cell is not in float64 or has no ``init_state``, or
            resets or offsets do not fit.

    Example:
        >>> import torch, rtrl
        >>> cell = rtrl.cells.from_torch(torch.nn.GRUCell(3, 4)).double()
        >>> stream = Stream(cell, torch.ones(12, 2, 3, dtype=torch.float64))
        >>> stream.steps, stream.prefix(5).steps
        (12, 5)
    """

    cell: nn.Module
    xs: Tensor
    loss: Loss = squares
    name: str = "stream"
    syncs: frozenset[int] = frozenset()
    resets: Tensor | None = None
    split_resets: frozenset[int] = frozenset()
    saves: frozenset[int] = frozenset()
    offsets: Sequence[Mapping[str, Tensor]] | None = None
    pieces: int = 1
    scattered: bool = False
    overwritten: bool = False
    plain: bool = False
    unrolled: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.cell, nn.Module):
            raise ConfigError(f"a Stream's cell must be a torch.nn.Module, got {type(self.cell).__name__}")
        if not callable(getattr(self.cell, "init_state", None)):
            raise ConfigError(f"a Stream's cell must have init_state(batch_size); {type(self.cell).__name__} has none")
        if not callable(self.loss):
            raise ConfigError(f"a Stream's loss must be a function loss(t, y), got {type(self.loss).__name__}")
        if not isinstance(self.xs, Tensor) or self.xs.ndim < 2 or 0 in self.xs.shape[:2]:
            form = tuple(self.xs.shape) if isinstance(self.xs, Tensor) else type(self.xs).__name__
            raise ConfigError(f"a Stream's xs must be a tensor (T, B, ...) with T, B ≥ 1, got {form}")
        if self.xs.is_floating_point() and self.xs.dtype != torch.float64:
            raise ConfigError(f"a Stream's xs must be in float64 like its cell, got {self.xs.dtype}: call .double()")
        flags = self.resets
        if flags is not None and (flags.dtype != torch.bool or flags.shape != self.xs.shape[:2]):
            raise ConfigError(f"a Stream's resets must be Boolean (T, B), got {flags.dtype} {tuple(flags.shape)}")
        if self.offsets is not None and len(self.offsets) != self.steps:
            raise ConfigError(f"a Stream's offsets must be one dict a step, got {len(self.offsets)}")
        for name, p in self.cell.named_parameters():
            if p.dtype != torch.float64:
                raise ConfigError(
                    f"a Stream's cell must be in float64, so that nothing but rounding is forgiven; parameter {name!r} "
                    f"is {p.dtype}: call .double()"
                )

    @property
    def steps(self) -> int:
        """The number of steps, T."""
        return self.xs.shape[0]

    @property
    def batch_size(self) -> int:
        """The batch size, B."""
        return self.xs.shape[1]

    def prefix(self, steps: int) -> "Stream":
        """Return the first ``steps`` only."""
        return replace(
            self,
            xs=self.xs[:steps],
            resets=None if self.resets is None else self.resets[:steps],
            offsets=None if self.offsets is None else self.offsets[:steps],
        )

    def alone(self, sample: int) -> "Stream":
        """Return one ``sample`` as a batch of one."""
        one = slice(sample, sample + 1)
        return replace(self, xs=self.xs[:, one], resets=None if self.resets is None else self.resets[:, one])

    def resized(self, batch: int) -> "Stream":
        """Return a stream of ``batch`` samples: the first ones, and beyond them the same ones shifted in time."""
        if batch <= self.batch_size:
            chosen = [self.xs[:, b] for b in range(batch)]
        else:
            chosen = [self.xs[:, b % self.batch_size].roll(b // self.batch_size, dims=0) for b in range(batch)]
        resets = None
        if self.resets is not None:
            resets = self.resets[:, torch.arange(batch, device=self.resets.device) % self.batch_size]
        return replace(self, xs=torch.stack(chosen, dim=1), resets=resets)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64 that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moved_parameters(stream: Stream, n: int, seed: int) -> list[dict[str, Tensor]]:
    """No offset, and then ``n`` random offsets of all trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    trained = {name: p for name, p in stream.cell.named_parameters() if p.requires_grad}
    return [{}] + [
        {
            name: 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
            for name, p in trained.items()
        }
        for _ in range(n)
    ]


def dense_stream(seed: int, steps: int = 14, batch: int = 5) -> Stream:
    """tanh units; y sees the state before and after the step."""
    return Stream(seeded(PlainRNN(2, 3, start=0.3), seed), normal(seed, steps, batch, 2), name="dense")


def unusual_stream(seed: int, steps: int = 14) -> Stream:
    """A normalisation, a transposed use, scales and a scalar; a state of two rows; y a tree, used by its names."""

    def loss(t: int, y: Any) -> Tensor:
        return squares(t, (y.value, y.extra["product"]))

    return Stream(seeded(OddCell(2, 3), seed), normal(seed, steps, 2, 2), loss, name="unusual parameters")


def shared_stream(seed: int, steps: int = 14) -> Stream:
    """A weight that each step uses twice."""
    cell = seeded(TwiceUsed(2, 3, start=0.3), seed)
    return Stream(cell, normal(seed, steps, 2, 2), name="a weight used twice")


def near_tie_stream(seed: int, steps: int = 8) -> Stream:
    """A choice that differs when several steps run as one batch, and must be replayed."""
    return Stream(seeded(NearTie(), seed), normal(seed, steps, 1, 1), name="near ties")


def layered_stream(seed: int, steps: int = 14) -> Stream:
    """Two layers in one state."""
    return Stream(seeded(TwoLayers(2, 3, 2), seed), normal(seed, steps, 2, 2), name="layers")


def slow_stream(seed: int, steps: int = 400) -> Stream:
    """Hundreds of steps of units that hardly forget, with losses at some steps."""

    def loss(t: int, y: Any) -> Tensor | None:
        return squares(t, y) if t % 10 == 9 or t < 3 else None

    syncs = frozenset({steps // 3, steps - steps // 8})
    return Stream(seeded(SlowUnits(), seed), normal(seed, steps, 2, 1), loss, name="long", syncs=syncs)


def frozen_stream(seed: int, steps: int = 14) -> Stream:
    """One parameter is frozen, one is shared by two modules, and one, a scalar, only affects y."""
    return Stream(seeded(PartlyTrained(2, 3), seed), normal(seed, steps, 2, 2), name="partly trained")


def long_dormancy_stream(seed: int, steps: int = 160) -> Stream:
    """A slice is used only at both ends of the stream, with losses while it is dormant; the state row that depends on
    it is read but not written in between."""
    stream = scheduled_stream(seed, steps)
    xs = stream.xs.clone()
    xs[:, :, -3] = 0.0
    xs[:2, :, -3] = xs[-2:, :, -3] = 1.0
    xs[:, :, -2] = 1.0
    read, write = xs[:, :, 2:6], xs[:, :, 6:10]
    read[:, :, 3] = 1.0
    write[:, :, 3] = 0.0
    write[:2, :, 3] = write[-2:, :, 3] = 1.0

    def loss(t: int, y: Any) -> Tensor | None:
        return squares(t, y) if t % 10 == 9 else None

    return Stream(stream.cell, xs, loss, name="long dormancy")


def _sets(t: int, b: int, size: int, period: int) -> list[int]:
    """Masks that differ between samples and steps, so that some rows and slices are dormant for a while."""
    return [int((t // period + 2 * i + b) % (size + 1) < 2) for i in range(size)]


def scheduled_stream(seed: int, steps: int = 14, largest: float = 0.7, period: int = 4) -> Stream:
    """Rows read, rows written and slices used change from step to step and differ between samples.

    Args:
        seed: of the weights and inputs.
        steps: T.
        largest: the largest input; above 0.8 the cell declares all rows as read and written.
        period: half the number of steps for which a slice is dormant.
    """
    rows, experts, batch = 4, 3, 2
    masks = [
        [_sets(t, b, rows, 2) + _sets(t + 1, b + 1, rows, 3) + _sets(t, b, experts, period) for b in range(batch)]
        for t in range(steps)
    ]
    features = normal(seed, steps, batch, 2).clamp(max=largest)
    xs = torch.cat([features, torch.tensor(masks).double()], dim=-1)
    return Stream(seeded(ScheduledCell(2, rows, 2, experts), seed), xs, name="sparse rows")


def dormant_stream(seed: int, steps: int = 30) -> Stream:
    """A mixture of five experts that are used in turn, with losses while they are dormant."""
    moe = RecurrentMoE(2, 2, d_model=4, n_slots=3, n_experts=5, topk=2, expert_hidden=2, ffn_hidden=2)
    chosen = [
        [[t // 5 % 3, (t // 5 + 1) % 3, t // 5 % 3, (t // 7 + b) % 5, (t // 7 + b + 1) % 5] for b in range(2)]
        for t in range(steps)
    ]
    xs = torch.cat([normal(seed, steps, 2, 2), torch.tensor(chosen).double()], dim=-1)
    return Stream(seeded(ForcedMoE(moe, (2, 1, 2)), seed + 11), xs, name="dormant slices")
