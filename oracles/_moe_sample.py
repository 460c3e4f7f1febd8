"""One step of one sample of the cell of `docs/theory/recurrent-moe.md`: one slot, token, head and expert at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _sigmoid(v: Array) -> Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * v)))


def _silu(v: Array) -> Array:
    return v * _sigmoid(v)


def _rms(v: Array) -> Array:
    return np.asarray(v / math.sqrt(float(np.mean(v**2)) + 1e-6))


def _softmax(v: Sequence[float]) -> list[float]:
    e = [math.exp(s - max(v)) for s in v]
    return [s / sum(e) for s in e]


def _largest(scores: Mapping[int, float], k: int) -> list[int]:
    """The k keys of largest score, largest first, the lower key first where scores are equal."""
    return sorted(scores, key=lambda i: (-scores[i], i))[:k]


def _attend(query: Array, keys: Sequence[Array], values: Sequence[Array], n_heads: int) -> Array:
    width = len(query) // n_heads
    out = np.zeros_like(query)
    for head in range(n_heads):
        run = slice(head * width, (head + 1) * width)
        weights = _softmax([float(query[run] @ key[run]) / math.sqrt(width) for key in keys])
        for weight, value in zip(weights, values, strict=True):
            out[run] += weight * value[run]
    return out


def sample_step(
    p: Mapping[str, Array], x: Array, h: Array, n_heads: int, topk: int, read_slots: int, write_slots: int,
    R: list[int] | None, W: list[int] | None, A: list[int] | None,
) -> tuple[Array, Array, list[int], list[int], list[int], Array]:  # fmt: skip
    """One step of one sample, numbered as on the page; x (n, d_in), h (n_slots, d)."""

    def linear(name: str, v: Array) -> Array:
        return np.asarray(p[f"{name}.weight"] @ v + p.get(f"{name}.bias", 0.0))

    slots, d = h.shape
    # 1. Embed
    u = [linear("embed", token) for token in x]
    u_mean = np.asarray(sum(u) / len(u))
    # 2. Read
    E = p["slot_embedding"]
    score = {j: float(linear("read_query", u_mean) @ (h[j] + E[j])) / math.sqrt(d) for j in range(slots)}
    R = _largest(score, read_slots) if R is None else R
    share = dict(zip(R, _softmax([score[j] for j in R]), strict=True))
    z = {j: np.asarray(len(R) * share[j] * (h[j] + E[j])) for j in R}
    # 3. Mixed attention
    a = {j: _rms(z[j]) for j in R}
    tokens = [a[j] for j in R] + [_rms(token) for token in u]
    keys, values = [linear("key", c) for c in tokens], [linear("value", c) for c in tokens]
    z = {j: z[j] + linear("mix", _attend(linear("query", a[j]), keys, values, n_heads)) for j in R}
    # 4. Feed-forward
    z = {j: z[j] + linear("down", _silu(linear("up", _rms(z[j])))) for j in R}
    # 5. Experts
    logits = linear("router", _rms(np.asarray(sum(z[j] for j in R) / len(R))))
    A = _largest({e: float(logits[e]) for e in range(len(logits))}, topk) if A is None else A
    mixed = {j: z[j].copy() for j in R}
    for e, weight in zip(A, _softmax([float(logits[e]) for e in A]), strict=True):
        for j in R:
            hidden = _silu(p["expert_up"][e] @ _rms(z[j]) + p["expert_up_bias"][e])
            mixed[j] += weight * (p["expert_down"][e] @ hidden + p["expert_down_bias"][e])
    z = mixed
    # 6. Write
    omega = {j: float(linear("write_score", _rms(z[j]))[0]) for j in R}
    if W is None and write_slots > len(R):
        raise ValueError(f"write_slots = {write_slots} of only {len(R)} slots read")
    W = _largest(omega, write_slots) if W is None else W
    if not set(W) <= set(R):
        raise ValueError(f"writes {W} must be among the reads {R}")
    h_next = h.copy()
    for j in W:
        proposal = np.tanh(linear("candidate", _rms(z[j])))
        gate = _sigmoid(linear("gate", _rms(z[j])) + omega[j])
        h_next[j] = h[j] + gate * (proposal - h[j])
    # 7. Output head
    z_mean = np.asarray(sum(z[j] for j in R) / len(R))
    m = [_rms(h_next[j] + E[j]) for j in R]
    out_keys, out_values = [linear("out_key", v) for v in m], [linear("out_value", v) for v in m]
    o = z_mean + linear("out_mix", _attend(linear("out_query", _rms(z_mean)), out_keys, out_values, n_heads))
    return linear("head", _rms(o)), h_next, R, W, A, logits
