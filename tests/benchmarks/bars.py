"""What is measured, at which sizes, and the bars it is held to: one place, so that a change of any is seen.

A bar of kind ``count`` is judged in every run, one of kind ``clock`` or ``memory`` at full size alone. Times are taken
by ``pytest --benchmark-only`` and nowhere else.
"""

import math
from dataclasses import dataclass, field

from rtrl._utils.formatting import number


@dataclass(frozen=True)
class Bar:
    """What a measured number must reach.

    Args:
        text: what is measured, in words that go on after the number.
        relation: ``"≥"`` or ``"≤"``, as in ``measured ≥ bound``.
        full, small: the bound at that size; None where it is not judged.
        kind: ``count``, ``clock`` or ``memory``.
        unit: after the number.
        control: whether it is the control of the bar above: built so that it must break that bound.
    """

    text: str
    relation: str
    full: float | None
    small: float | None = None
    kind: str = "count"
    unit: str = " ×"
    control: bool = False

    @property
    def words(self) -> str:
        return f"control: {self.text}" if self.control else self.text

    def bound(self, size: str) -> float | None:
        return self.full if size == "full" else self.small

    def reached(self, value: float | None, size: str) -> bool | None:
        """Whether a value reaches the bound; None without a bound. What is not finite never does."""
        bound = self.bound(size)
        if bound is None:
            return None
        if value is None or not math.isfinite(value):
            return False
        return value >= bound if self.relation == "≥" else value <= bound

    def shown(self, value: float | None) -> str:
        return f"{number(value, 3)}{self.unit}" if value is not None and math.isfinite(value) else "not finite"

    def asked(self, size: str) -> str:
        bound = self.bound(size)
        return "" if bound is None else f"{self.relation} {self.shown(bound)}"

    def verdict(self, reached: bool | None) -> str:
        if reached is None:
            return "not judged at this size"
        if self.control:
            return "breaks it, as it must" if reached else "does not break it"
        return "holds" if reached else "does not hold"


def _clock(text: str, relation: str, full: float, **options: str | bool) -> Bar:
    return Bar(text, relation, full, kind="clock", **options)  # type: ignore[arg-type]


def _both(text: str, relation: str, bound: float, **options: str | bool) -> Bar:
    return Bar(text, relation, bound, bound, **options)  # type: ignore[arg-type]


# A bar is called "claim.what". Counts at small size are what was counted, with a tenth to spare; at full size they are
# the claims.
BARS = {
    "rnn.faster": _clock("faster per step than textbook RTRL", "≥", 100),
    "rnn.limit": _clock(
        "of the limit that 2·(H·P·(1 + H/block) + H³) operations set at the rate of a matrix product",
        "≥",
        0.40,
        unit="",
    ),
    "rnn.fewer": Bar("fewer multiply-adds per step than textbook RTRL", "≥", 40, 5.8),
    "rnn.formula": _both("multiply-adds per step, in units of H·P·(1 + H/block) + H³", "≤", 2.25, unit=""),
    "rnn.control": _both("the same units at block = 1", "≥", 2.25, unit="", control=True),
    "jax.32": _clock("faster per step than jitted JAX RTRL, H = 32", "≥", 1),
    "jax.64": _clock("faster per step than jitted JAX RTRL, H = 64", "≥", 2),
    "jax.128": _clock("faster per step than jitted JAX RTRL, H = 128", "≥", 10),
    "jax.256": _clock("faster per step than jitted JAX RTRL, H = 256", "≥", 50),
    "gru.faster.128": _clock("faster per step than textbook RTRL, H = 128", "≥", 60),
    "gru.faster.256": _clock("faster per step than textbook RTRL, H = 256", "≥", 60),
    "gru.time": _clock("exponent of the time per step over H; H·P has 3, H²·P has 4", "≤", 3.3, unit=""),
    "gru.time.control": _clock("the same of textbook RTRL", "≥", 3.3, unit="", control=True),
    "gru.fewer": Bar("fewer multiply-adds per step than textbook RTRL, the largest H", "≥", 40, 6.2),
    "gru.control": Bar("the same at block = 1", "≤", 40, 6.2, control=True),
    "mixture.faster": _clock("faster per step than full RTRL over all parameters", "≥", 300),
    "mixture.fewer": Bar("fewer multiply-adds per step than full RTRL over all parameters", "≥", 500, 25),
    "mixture.control": Bar("the same, if nothing is declared and block = 1", "≤", 500, 25, control=True),
    "batch.macs": _both("multiply-adds per sample at batch 3, in units of batch 1, block = 1", "≤", 1.1, unit=""),
    "batch.control": _both(
        "the same, if every sample declares the union over the batch", "≥", 1.1, unit="", control=True
    ),
    "batch.blocks": _both("the same at block = 4, where samples touch unlike numbers of slots", "≤", 1.45, unit=""),
    "batch.time": _clock("time per sample at batch 8, in units of batch 1", "≤", 1.0, unit=""),
    "cells.rnn": _clock("time of an eager BPTT step, RNNCell", "≤", 1.5),
    "cells.gru": _clock("time of an eager BPTT step, GRUCell", "≤", 1.5),
    "cells.lstm": _clock("time of an eager BPTT step, LSTMCell", "≤", 1.5),
    "cells.operations": _both("operations launched by an eager BPTT step, the worst of the three", "≤", 1.4),
    "cells.control": _both("the same at block = 1, the best of the three", "≥", 1.4, control=True),
    "growth.H": _both("exponent of the multiply-adds per step over H, inputs = H = block", "≤", 3.1, unit=""),
    "growth.H.control": _both("the same at block = 1", "≥", 3.6, unit="", control=True),
    "growth.P": _both("exponent over P, H and block fixed", "≤", 1.02, unit=""),
    "growth.P.slope": _both("multiply-adds per step for one parameter more, in units of H", "≤", 2.3, unit=""),
    "growth.P.control": _both("the same at block = 1", "≥", 2.3, unit="", control=True),
    "growth.T": _both("exponent of all multiply-adds over T, exact gradients after every block", "≤", 1.01, unit=""),
    "growth.T.control": _both("the same by BPTT over all that was", "≥", 1.5, unit="", control=True),
    "growth.bytes": _both("exponent of the bytes held over T, to nine places", "≤", 0.0, unit=""),
    "growth.bytes.control": _both("the same of BPTT", "≥", 0.95, unit="", control=True),
    "growth.block": _both("worst deviation from a + b/block, over blocks of 2 … 2 H", "≤", 0.02, unit=""),
    "growth.block.slope": _both("b, in units of H²·P", "≤", 1.05, unit=""),
    "growth.experts": _both("exponent of the multiply-adds per step over the number of experts", "≤", 0.3, unit=""),
    "growth.experts.control": _both("the same, if nothing is declared and block = 1", "≥", 0.8, unit="", control=True),
    "catchup.fewer.100": _both("fewer multiply-adds than step by step, after 100 steps", "≥", 14),
    "catchup.control": _both("fewer after 100 steps of an expert of H parameters", "≤", 14, control=True),
    "catchup.faster.100": _clock("faster, after 100 steps", "≥", 14),
    "catchup.fewer.1000": _both("fewer multiply-adds, after 1000 steps", "≥", 20),
    "catchup.faster.1000": _clock("faster, after 1000 steps", "≥", 20),
    "lazy.fewer": _both("fewer multiply-adds with lazy=True than with lazy=False, 32 experts", "≥", 6.5),
    "lazy.control": _both("the same, if all experts are used at every step", "≤", 1.01, control=True),
    "lazy.growth": _both("exponent of the multiply-adds per step over the number of experts", "≤", 0.1, unit=""),
    "lazy.growth.control": _both("the same with lazy=False", "≥", 0.8, unit="", control=True),
    "rows.macs": _both("multiply-adds per step, in units of eager BPTT, the worst of eight cells", "≤", 4),
    "rows.macs.control": _both("the same with structure=off, the best of four", "≥", 4, control=True),
    "rows.bytes": _both(
        "bytes held, in units of 3 numbers per parameter element and entry of its row, and 20 per step of the block "
        "and unit, the worst of eight",
        "≤",
        1.0,
        unit="",
    ),
    "rows.bytes.control": _both("the same with structure=off, the best of four", "≥", 1.0, unit="", control=True),
    "rows.bytes.large": Bar("the same at the sizes whose times are taken, the worst of 32", "≤", 1.0, unit=""),
    "rows.growth": _both(
        "exponent of the multiply-adds per step over P, inputs = H, the worst of four", "≤", 1.1, unit=""
    ),
    "rows.growth.control": _both("the same with structure=off, the best of four", "≥", 1.3, unit="", control=True),
    "rows.growth.bytes": _both("exponent of the bytes held over P, the worst of four", "≤", 1.1, unit=""),
    "rows.growth.bytes.control": _both(
        "the same with structure=off, the best of four", "≥", 1.3, unit="", control=True
    ),
    "rows.layers": Bar("bytes of two independent layers, in units of structure=off", "≤", 0.55, 0.6, unit=""),
    "rows.layers.control": Bar("the same, if the upper layer feeds back", "≥", 0.55, 0.6, unit="", control=True),
    "rows.time.minGRU": _clock("time of an eager BPTT step, minGRU, the worst of eight sizes", "≤", 1.5),
    "rows.time.eLSTM": _clock("time of an eager BPTT step, element-wise LSTM, the worst of eight sizes", "≤", 1.5),
    "rows.time.LRU": _clock("time of an eager BPTT step, LRU, the worst of eight sizes", "≤", 1.5),
    "rows.time.RTU": _clock("time of an eager BPTT step, RTU, the worst of eight sizes", "≤", 1.5),
    "rows.off.time": _clock("faster per step than with structure=off, H = 512, the worst of four", "≥", 40),
    "rows.off.bytes": _clock("fewer bytes held than with structure=off, H = 512, the worst of four", "≥", 150),
    "updates.operations": _both("operations launched by TBPTT(1), PyTorch's cells, the worst of four", "≤", 2.1),
    "updates.operations.rows": _both("the same of cells with independent rows, the worst of two", "≤", 8.4),
    "updates.rnn.16": _clock("time of TBPTT(1), RNNCell, H = 16", "≤", 2.5),
    "updates.rnn.32": _clock("time of TBPTT(1), RNNCell, H = 32", "≤", 2.5),
    "updates.gru.16": _clock("time of TBPTT(1), GRUCell, H = 16", "≤", 2.5),
    "updates.gru.32": _clock("time of TBPTT(1), GRUCell, H = 32", "≤", 2.5),
    "updates.minGRU.128": _clock("time of TBPTT(1), minGRU, H = 128", "≤", 2.5),
    "updates.RTU.128": _clock("time of TBPTT(1), RTU, H = 128", "≤", 2.5),
    "updates.eLSTM.128": _clock("time of exact RTRL by hand, element-wise LSTM, H = 128", "≤", 1.5),
    "updates.eLSTM.512": _clock("time of exact RTRL by hand, element-wise LSTM, H = 512", "≤", 1.5),
    "unroll.operations": _both("operations launched by an eager BPTT step, the worst of two", "≤", 0.42),
    "unroll.rnn.jax": _clock("faster per step than jitted JAX RTRL, RNNCell", "≥", 1.5),
    "unroll.rnn.eager": _clock("time of an eager BPTT step, RNNCell", "≤", 0.6),
    "unroll.gru.jax": _clock("faster per step than jitted JAX RTRL, GRUCell", "≥", 1.5),
    "unroll.gru.eager": _clock("time of an eager BPTT step, GRUCell", "≤", 0.6),
    "user.macs": _both("multiply-adds of the same cell made by from_torch", "≤", 1.5),
    "user.faster": _clock("faster per step than textbook RTRL", "≥", 100),
    "user.limit": _clock(
        "of the limit that 2·(H·P·(1 + H/block) + H³) operations set at the rate of a matrix product",
        "≥",
        0.45,
        unit="",
    ),
    "user.module": _clock("time of the same cell made by from_torch", "≤", 1.15),
    "stream.bytes": _both("bytes the learner holds at the end, in units of those after warm-up", "≤", 1.0, unit=""),
    "stream.bytes.control": _both("the same of a BPTT that keeps all steps", "≥", 1.01, unit="", control=True),
    "stream.rss": Bar("the largest RSS after warm-up, in units of the one then", "≤", 1.01, kind="memory", unit=""),
    "stream.rss.control": Bar(
        "the same of a BPTT that keeps all steps", "≥", 1.01, kind="memory", unit="", control=True
    ),
}

CLAIMS = {
    "rnn": "a tanh network in blocks of H steps takes about 2·H·P + H³ multiply-adds per step, textbook RTRL H²·P",
    "jax": "a tanh network steps faster than jitted RTRL in JAX",
    "gru": "a GRU in blocks of 4·H steps is faster than textbook RTRL, and its time grows with H³ at most",
    "mixture": "a mixture of experts is faster than full RTRL over all its parameters",
    "batch": "a sample in a batch costs about what it costs alone",
    "catchup": "a slice that was dormant for many dense steps is brought up to date at a fraction of the steps' cost",
    "lazy": "dormant slices cost less when they are brought up to date on demand than when they are at every block",
    "cells": "a step of a small cell takes at most 1.5 times as long as one of eager BPTT",
    "growth": "costs grow as the formulas say",
    "rows": "a cell with independent rows takes exact gradients at the price of a forward and a backward pass",
    "updates": "an update after every step takes little longer than one of backpropagation through one step",
    "unroll": "with its sequences at hand, a small cell steps faster than eager BPTT and than jitted RTRL in JAX",
    "user": "a tanh network that a user wrote is as fast as PyTorch's own",
    "stream": "memory does not grow with the length of the stream",
}


@dataclass(frozen=True)
class Mixture:
    """``RecurrentMoE`` and how it is run. ``warm`` is the number of blocks before anything is measured."""

    d_model: int
    n_slots: int
    n_experts: int
    block: int
    window: int = 2
    warm: int = 2

    @property
    def cell(self) -> tuple[int, int, int]:
        return self.d_model, self.n_slots, self.n_experts


@dataclass(frozen=True)
class Sizes:
    """What is measured at a size."""

    rnn: int
    peers: tuple[int, ...]
    gru: tuple[int, ...]
    mixture: Mixture
    batch: Mixture
    catch_up: int
    cells: int
    growth: tuple[int, ...]
    growth_blocks: tuple[int, ...]
    rows: tuple[int, int, int]
    """H, inputs and block."""
    rows_growth: tuple[int, ...]
    rows_layers: tuple[int, int, int]
    stream_steps: int
    rounds: int
    peer_steps: dict[int, int] = field(default_factory=dict)
    """H → steps of RTRL in JAX that one round takes; H steps where nothing is said."""


SIZES = {
    "small": Sizes(
        rnn=32,
        peers=(32, 64),
        gru=(16, 24, 32),
        mixture=Mixture(16, 8, 16, block=64),
        batch=Mixture(8, 6, 8, block=8, window=8),
        catch_up=64,
        cells=32,
        growth=(12, 16, 24, 32),
        growth_blocks=(2, 4, 8),
        rows=(16, 12, 16),
        rows_growth=(12, 16, 24),
        rows_layers=(16, 16, 16),
        stream_steps=1_280,
        rounds=3,
    ),
    "full": Sizes(
        rnn=256,
        peers=(32, 64, 128, 256),
        gru=(128, 192, 256),
        mixture=Mixture(64, 16, 64, block=1024, window=1, warm=1),
        batch=Mixture(32, 8, 16, block=32, window=8, warm=4),
        catch_up=1024,
        cells=32,
        growth=(12, 16, 24, 32, 48, 64),
        growth_blocks=(2, 4, 8, 16, 32),
        rows=(128, 32, 64),
        rows_growth=(32, 64, 128),
        rows_layers=(256, 256, 16),
        stream_steps=20_000,
        rounds=7,
        peer_steps={128: 32, 256: 8},
    ),
}
BATCH_COUNTED = Mixture(8, 6, 8, block=1, window=8, warm=5)
"""The mixture on which the multiply-adds of a batch are counted, at either size."""
LONG_STREAM_STEPS = 1_000_000
