"""Steps of published cells, written from their papers: one sample, one unit after the other, numbers alone."""

import cmath
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parameters = Mapping[str, Array]


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def dot(row: Array, x: Array) -> float:
    return sum(float(a) * float(b) for a, b in zip(row, x, strict=True))


def min_gru(p: Parameters, x: Array, h: Array, positive: bool) -> tuple[Array, Array]:
    """Feng et al. 2024, section 3.1.2 and, where positive, appendix B.2.1: z = σ(Linear(x)), h̃ = g(Linear(x))."""
    n = len(h)
    after = np.zeros(n)
    for i in range(n):
        z = sigmoid(dot(p["gates.weight"][i], x) + p["gates.bias"][i])
        candidate = dot(p["gates.weight"][n + i], x) + p["gates.bias"][n + i]
        if positive:
            candidate = candidate + 0.5 if candidate >= 0 else sigmoid(candidate)
        after[i] = (1 - z) * h[i] + z * candidate
    return after, after


def element_wise_lstm(p: Parameters, x: Array, c: Array, output_gate: bool) -> tuple[Array, Array]:
    """Irie et al. 2024, the element-wise LSTM of section 3.2: the input gate is 1 − f, the output gate sees the new
    cell through a full matrix."""
    n = len(c)
    after = np.zeros(n)
    for i in range(n):
        forget = sigmoid(dot(p["gates.weight"][i], x) + p["forget_recurrent"][i] * c[i] + p["gates.bias"][i])
        new = dot(p["gates.weight"][n + i], x) + p["candidate_recurrent"][i] * c[i] + p["gates.bias"][n + i]
        after[i] = forget * c[i] + (1 - forget) * math.tanh(new)
    if not output_gate:
        return after, after
    y = np.zeros(n)
    for i in range(n):
        out = dot(p["gates.weight"][2 * n + i], x) + dot(p["output_recurrent.weight"][i], after)
        y[i] = sigmoid(out + p["gates.bias"][2 * n + i]) * after[i]
    return y, after


def linear_recurrent_unit(p: Parameters, x: Array, h: Array) -> tuple[Array, Array]:
    """Orvieto et al. 2023, section 3, and Zucchet et al. 2023, section 3.3, in complex numbers:
    h' = λ h + γ B x, y = Re(C h') + D x, λ = exp(−exp(ν) + i exp(θ))."""
    n = len(h)
    after = []
    for i in range(n):
        rate = cmath.exp(complex(-math.exp(p["nu_log"][i]), math.exp(p["theta_log"][i])))
        drive = complex(dot(p["input.weight"][2 * i], x), dot(p["input.weight"][2 * i + 1], x))
        after.append(rate * complex(*h[i]) + math.exp(p["gamma_log"][i]) * drive)
    y = []
    for o in range(len(p["skip.weight"])):
        row = p["output.weight"][o]
        read = sum(complex(row[2 * i], -row[2 * i + 1]) * after[i] for i in range(n))
        y.append(read.real + dot(p["skip.weight"][o], x))
    return np.array(y), np.array([[z.real, z.imag] for z in after])


def trace_unit(p: Parameters, x: Array, h: Array, linear: bool) -> tuple[Array, Array]:
    """Elelimy et al. 2024, section 3: a rotation and a shrinking of pairs, with tanh in the recurrence (nonlinear) or
    after it (linear); γ = √(1 − r²)."""
    after, y = np.zeros_like(h), np.zeros_like(h)
    for i in range(len(h)):
        r, theta = math.exp(-math.exp(p["nu_log"][i])), math.exp(p["theta_log"][i])
        gamma = math.sqrt(1 - r**2)
        one = r * math.cos(theta) * h[i, 0] - r * math.sin(theta) * h[i, 1] + gamma * dot(p["input.weight"][2 * i], x)
        two = r * math.cos(theta) * h[i, 1] + r * math.sin(theta) * h[i, 0]
        two += gamma * dot(p["input.weight"][2 * i + 1], x)
        y[i] = math.tanh(one), math.tanh(two)
        after[i] = (one, two) if linear else y[i]
    return y.flatten(), after
