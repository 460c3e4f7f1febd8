"""Counts of a run, the same on every machine: multiply-adds a step, operations dispatched a step, bytes of a graph."""

from typing import Any

import numpy as np
import torch
from rivals import Ours, Textbook, Unrolled
from torch.utils._python_dispatch import TorchDispatchMode

from rtrl.profiling.macs import MacCounter


def macs(side: Ours | Unrolled, steps: int) -> float:
    """Multiply-adds a step, over whole blocks with their closing and the delivery of every gradient."""
    with MacCounter() as counter:
        side.advance(steps)
    return counter.macs / steps


def textbook_macs(side: Textbook) -> tuple[int, int]:
    """Multiply-adds of one textbook step: of the Jacobians and the loss, and of ``S ← J S + B``."""
    with MacCounter() as linearising:
        jacobians = side.linearise()
    with MacCounter() as moving:
        side.move(*jacobians)
    return linearising.macs, moving.macs


class Dispatches(TorchDispatchMode):
    """Counts the operations that are launched inside ``with``; views of memory that is there already are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not getattr(func, "is_view", False)
        return func(*args, **(kwargs or {}))


def dispatches(side: Ours | Unrolled, steps: int) -> float:
    """Operations a step, over whole blocks."""
    with Dispatches() as counter:
        side.advance(steps)
    return counter.count / steps


def graph_bytes(side: Unrolled, steps: int) -> int:
    """Bytes that a graph over ``steps`` steps holds until its backward pass, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in side.cell.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        side.advance(steps)
    return sum(held.values())


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(values) over log(sizes)."""
    assert len(sizes) >= 3
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])
