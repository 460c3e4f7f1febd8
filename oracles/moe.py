"""The cell of `docs/theory/recurrent-moe.md` in plain NumPy loops: a batch, one sample after the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from oracles._moe_sample import Array, sample_step

Index = NDArray[np.int64]


class Step(NamedTuple):
    """One step of a batch: the output, the next state, what was chosen (largest first) and the router's logits."""

    y: Array  # (B, d_out)
    h_next: Array  # (B, n_slots, d)
    reads: Index  # (B, r)
    writes: Index  # (B, w)
    experts: Index  # (B, k)
    router_logits: Array  # (B, n_experts)


def _shapes(p: Mapping[str, Array], d_in: int, slots: int, d: int) -> dict[str, tuple[int, ...]]:
    missing = {"up.weight", "router.weight", "expert_up", "head.weight"} - set(p)
    if missing or p["expert_up"].ndim != 3:
        raise ValueError(f"parameters lack {sorted(missing)} or have an expert_up that is not 3-dimensional")
    f, experts, g, out = len(p["up.weight"]), len(p["router.weight"]), p["expert_up"].shape[1], len(p["head.weight"])
    square = ["read_query", "query", "key", "value", "mix", "candidate", "gate"]
    square += ["out_query", "out_key", "out_value", "out_mix"]
    return {
        "embed.weight": (d, d_in), "embed.bias": (d,), "slot_embedding": (slots, d),
        **{f"{name}.weight": (d, d) for name in square},
        "up.weight": (f, d), "up.bias": (f,), "down.weight": (d, f), "down.bias": (d,), "router.weight": (experts, d),
        "expert_up": (experts, g, d), "expert_up_bias": (experts, g),
        "expert_down": (experts, d, g), "expert_down_bias": (experts, d),
        "write_score.weight": (1, d), "candidate.bias": (d,), "gate.bias": (d,),
        "head.weight": (out, d), "head.bias": (out,),
    }  # fmt: skip


def _forced(name: str, value: ArrayLike | None, batch: int, limit: int, least: int) -> list[list[int] | None]:
    if value is None:
        return [None] * batch
    array = np.asarray(value)
    if array.ndim != 2 or array.shape[0] != batch or array.shape[1] < least:
        raise ValueError(f"{name} must have shape ({batch}, k) with k >= {least}, got {array.shape}")
    if array.size and not (np.issubdtype(array.dtype, np.integer) and array.min() >= 0 and array.max() < limit):
        raise ValueError(f"{name} must be integers from 0 to {limit - 1}")
    rows = [[int(i) for i in row] for row in array]
    if any(len(set(row)) != len(row) for row in rows):
        raise ValueError(f"{name} must not name anything twice")
    return [*rows]


def forward(
    parameters: Mapping[str, ArrayLike],
    x: ArrayLike,
    h: ArrayLike,
    *,
    n_heads: int,
    topk: int,
    read_slots: int,
    write_slots: int,
    reads: ArrayLike | None = None,
    writes: ArrayLike | None = None,
    experts: ArrayLike | None = None,
) -> Step:
    """Compute one step of the mixture cell in float64.

    Equation:
        the seven of `docs/theory/recurrent-moe.md`; `y, h' = cell(x, h)` for every sample by itself.

    Args:
        parameters: name -> array, exactly the names and shapes of the page's table.
        x: inputs (B, n, d_in), or (B, d_in) for n = 1.
        h: state (B, n_slots, d).
        n_heads: number of heads, as on the page.
        topk: number of experts, as on the page.
        read_slots: number of slots read, as on the page.
        write_slots: number of slots written, as on the page.
        reads: integer (B, k), the slots to read; None means those of largest score.
        writes: integer (B, k), the slots to write; None means those of largest score.
        experts: integer (B, k), the experts to use; None means those of largest logit.

    Returns:
        `Step(y, h_next, reads, writes, experts, router_logits)`.

    Raises:
        ValueError: a missing or unknown parameter, a wrong shape or setting, a choice out of range, writes not read.

    Cost:
        Python loops; for small sizes only.
    """
    p = {name: np.asarray(value, dtype=np.float64) for name, value in parameters.items()}
    xs, hs = np.asarray(x, dtype=np.float64), np.asarray(h, dtype=np.float64)
    xs = xs[:, None, :] if xs.ndim == 2 else xs
    if xs.ndim != 3 or hs.ndim != 3 or len(xs) != len(hs) or len(hs) < 1 or xs.shape[1] < 1:
        raise ValueError(f"x must be (B, n, d_in) or (B, d_in) and h (B, n_slots, d), got {xs.shape} and {hs.shape}")
    batch, slots, d = hs.shape
    shapes = _shapes(p, xs.shape[2], slots, d)
    if wrong := sorted(name for name in {*p, *shapes} if name not in p or p[name].shape != shapes.get(name)):
        raise ValueError(f"missing, unknown or of a wrong shape: {wrong}")
    n_experts = len(p["router.weight"])
    if n_heads < 1 or d % n_heads or not 1 <= topk <= n_experts or not 0 <= write_slots <= read_slots <= slots:
        raise ValueError("need n_heads dividing d, 1 <= topk <= n_experts, 0 <= write_slots <= read_slots <= n_slots")
    if read_slots < 1:
        raise ValueError("read_slots must be at least 1")
    R, W = _forced("reads", reads, batch, slots, 1), _forced("writes", writes, batch, slots, 0)
    A = _forced("experts", experts, batch, n_experts, 1)
    steps = [
        sample_step(p, xs[b], hs[b], n_heads, topk, read_slots, write_slots, R[b], W[b], A[b]) for b in range(batch)
    ]
    y, h_next, *chosen, logits = zip(*steps, strict=True)
    R_, W_, A_ = (np.array(c, dtype=np.int64).reshape(batch, -1) for c in chosen)
    return Step(np.stack(y), np.stack(h_next), R_, W_, A_, np.stack(logits))
