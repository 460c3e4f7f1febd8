"""A machine that does to a learner all that a user may do, in any order, beside a naive model that keeps the whole
history.

The model is a list of everything that happened; when asked, it runs the oracles over that list. It knows nothing of
blocks or windows.
"""

from typing import Any

import torch
from helpers.running import gradients
from helpers.strategies import normal
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import ScheduledCell, seeded
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor

import oracles
import rtrl

ROWS, WIDTH, EXPERTS, FEATURES = 3, 2, 2, 2
masks = st.tuples(*[st.integers(0, 2**size - 1) for size in (ROWS, ROWS, EXPERTS)])


class LearnerMachine(RuleBasedStateMachine):
    """Steps, losses, deliveries, resets, influences, changed parameters, saves and loads, interleaved."""

    @initialize(
        batch=st.integers(1, 2),
        block=st.integers(1, 4),
        window=st.integers(1, 4),
        lazy=st.booleans() | st.just(True),
        seed=st.integers(0, 99),
    )
    def begin(self, batch: int, block: int, window: int, lazy: bool, seed: int) -> None:
        self.batch, self.seed = batch, seed
        self.options = {"block": block, "window": window, "lazy": lazy}
        self.cell = seeded(ScheduledCell(FEATURES, ROWS, WIDTH, EXPERTS), seed)
        self.learner = rtrl.BlockRTRL(self.cell, batch, **self.options)
        self.base = {name: p.detach().clone() for name, p in self.cell.named_parameters()}
        # the model: all that ever happened
        self.xs: list[Tensor] = []
        self.losses: list[list[Tensor]] = []
        self.resets: list[Tensor] = []
        self.offsets: list[dict[str, Tensor]] = []
        self.pending_reset = torch.zeros(batch, dtype=torch.bool)
        self.now = {name: torch.zeros_like(p) for name, p in self.base.items()}
        self.y: Tensor | None = None  # what the last step returned, while it takes losses
        self.untouched = True  # no step since parameters may have changed

    # ---- the model's answers

    def model(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        def loss(t: int, y: Any) -> Tensor | None:
            return (
                sum(((y * w).sum() + y.square().sum() for w in self.losses[t]), torch.zeros(()))
                if self.losses[t]
                else None
            )

        with torch.no_grad():
            held = {name: p.clone() for name, p in self.cell.named_parameters()}
            for name, p in self.cell.named_parameters():
                p.copy_(self.base[name])
        stream = torch.stack(self.xs)
        found, influences = oracles.dense_rtrl(
            self.cell, stream, loss, resets=torch.stack(self.resets), offsets=self.offsets, return_influence=True
        )
        unrolled = oracles.bptt(self.cell, stream, loss, resets=torch.stack(self.resets), offsets=self.offsets)
        assert_gradients_equal(found, unrolled, may_be_zero=True)
        last = influences[-1]
        for name in last:
            last[name] = last[name] * (~self.pending_reset).reshape(-1, 1, 1)
        with torch.no_grad():
            for name, p in self.cell.named_parameters():
                p.copy_(held[name])
        return found, last

    # ---- what a user may do

    @rule(bits=st.lists(masks, min_size=2, max_size=2), times=st.integers(1, 3))
    def step(self, bits: list[tuple[int, int, int]], times: int) -> None:
        for _ in range(times):
            bits_by_sample = [
                [[m >> i & 1 for i in range(size)] for m, size in zip(b, (ROWS, ROWS, EXPERTS), strict=True)]
                for b in bits[: self.batch]
            ]
            mask = torch.tensor(
                [[bit for part in sample for bit in part] for sample in bits_by_sample], dtype=torch.float64
            )
            x = torch.cat([normal(self.seed + len(self.xs), self.batch, FEATURES), mask], dim=1)
            self.y = self.learner.step(x)
            self.xs.append(x)
            self.losses.append([])
            self.resets.append(self.pending_reset)
            self.offsets.append(self.now)
            self.pending_reset = torch.zeros(self.batch, dtype=torch.bool)

    @precondition(lambda self: self.y is not None)
    @rule(plain=st.booleans())
    def add_a_loss(self, plain: bool) -> None:
        assert self.y is not None
        weight = normal(len(self.xs) + 17 * len(self.losses[-1]), *self.y.shape)
        loss = (self.y * weight).sum() + self.y.square().sum()
        if plain:
            loss.backward()
        else:
            self.learner.backward(loss)
        self.losses[-1].append(weight)

    @rule(dormant=st.booleans())
    def sync(self, dormant: bool) -> None:
        self.learner.sync(dormant=dormant)
        self.y = None

    @rule()
    def sync_and_compare(self) -> None:
        self.learner.sync()
        self.y = None
        if self.xs:
            assert_gradients_equal(gradients(self.cell), self.model()[0], may_be_zero=True)

    @rule()
    def compare_influences(self) -> None:
        found = {name: self.learner.influence(name) for name in self.base}
        self.y = None
        if self.xs:
            assert_influences_equal(found, self.model()[1], may_be_zero=True)

    @rule(which=st.integers(1, 3))
    def reset(self, which: int) -> None:
        rows = torch.tensor([bool(which >> b & 1) for b in range(self.batch)])
        self.learner.reset(None if bool(rows.all()) else rows)
        self.pending_reset = self.pending_reset | rows
        self.y = None

    @rule(dormant=st.booleans(), size=st.sampled_from([-0.1, 0.05]))
    def change_parameters(self, dormant: bool, size: float) -> None:
        self.learner.sync(dormant=dormant)
        self.y = None
        self.now = {
            name: value + size * torch.cos(torch.arange(value.numel(), dtype=value.dtype)).reshape(value.shape)
            for name, value in self.now.items()
        }
        with torch.no_grad():
            for name, p in self.cell.named_parameters():
                p.copy_(self.base[name] + self.now[name])

    @rule()
    def save_and_load(self) -> None:
        saved = self.learner.state_dict()
        self.learner = rtrl.BlockRTRL(self.cell, self.batch, **self.options)
        self.learner.load_state_dict(saved)
        self.y = None

    def teardown(self) -> None:
        if getattr(self, "xs", None):
            self.sync_and_compare()
            self.compare_influences()


TestLearnerMachine = LearnerMachine.TestCase
TestLearnerMachine.settings = settings(stateful_step_count=12)
