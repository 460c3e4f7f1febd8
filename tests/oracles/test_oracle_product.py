"""The ordered product against whole-sequence autograd, its order, its identity and its splits."""

from __future__ import annotations

import pytest
import torch
from cells import F64, make_case
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jacobian

import oracles

Element = tuple[Tensor, Tensor]


def draw(count: int, size: int, batch: tuple[int, ...], seed: int) -> list[Element]:
    g = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(*batch, size, size, generator=g, dtype=F64), torch.randn(*batch, size, generator=g, dtype=F64))
        for _ in range(count)
    ]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max()) and bool(b.any())


@pytest.mark.parametrize("kind", ["tanh", "routed"])
def test_product_is_the_derivative_of_the_whole_stretch(kind: str) -> None:
    case = make_case(kind, steps=5, batch=1)
    h = case.cell.init_state(1)[0]  # type: ignore[operator]

    def one(t: int, state: Tensor) -> tuple[Tensor, Tensor]:
        y, state = case.cell(case.xs[t], state[None])[:2]
        loss = case.loss_fn(t, y)
        assert loss is not None
        return loss, state[0]

    def stretch(state: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros((), dtype=F64)
        for t in range(5):
            loss, state = one(t, state)
            total = total + loss
        return total, state

    elements, state = [], h
    for t in range(5):
        adjoint, dynamics = jacobian(lambda s, t=t: one(t, s), state)  # type: ignore[no-untyped-call]
        elements.append((dynamics, adjoint))
        state = one(t, state)[1].detach()
    by_loss, by_state = jacobian(stretch, h)  # type: ignore[no-untyped-call]
    phi, vector = oracles.ordered_product(elements)
    assert close(phi, by_state) and close(vector, by_loss)
    swapped, _ = oracles.ordered_product(elements[::-1])
    assert not close(swapped, by_state, 1e-3)


def test_two_steps_by_hand() -> None:
    j0, j1 = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    phi, vector = oracles.ordered_product([(j0, torch.tensor([1.0, 1.0])), (j1, torch.tensor([10.0, 100.0]))])
    assert phi.tolist() == [[1.0, 2.0], [3.0, 7.0]]  # J_1 J_0
    assert vector.tolist() == [1.0 + 10.0, 1.0 + 20.0 + 100.0]  # δ_0 + δ_1 J_0


@given(
    count=st.integers(1, 6), cut=st.integers(0, 6), size=st.integers(1, 4), seed=st.integers(0, 2**20),
    batch=st.sampled_from([(), (1,), (3,), (2, 2)]),
)  # fmt: skip
def test_a_split_joins_again(count: int, cut: int, size: int, batch: tuple[int, ...], seed: int) -> None:
    elements = draw(count, size, batch, seed)
    cut = min(cut, count)
    early, e = oracles.ordered_product(elements[:cut], size=size, dtype=F64, batch=batch)
    late, v = oracles.ordered_product(elements[cut:], size=size, dtype=F64, batch=batch)
    phi, vector = oracles.ordered_product(elements)
    assert torch.allclose(late @ early, phi, rtol=0, atol=1e-11 * phi.abs().max().item())
    joined = e + torch.einsum("...i,...ij->...j", v, early)
    assert torch.allclose(joined, vector, rtol=0, atol=1e-11 * vector.abs().max().item())
    assert phi.shape == (*batch, size, size) and vector.shape == (*batch, size)


def test_no_elements() -> None:
    with pytest.raises(ValueError, match="size"):
        oracles.ordered_product([])
    phi, vector = oracles.ordered_product([], size=2, dtype=F64, batch=(3,))
    assert torch.equal(phi, torch.eye(2, dtype=F64).expand(3, 2, 2)) and torch.equal(vector, phi[..., 0] * 0)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(("j", "d"), [((2, 3), (2,)), ((2, 2), (3,)), ((2, 2), (1, 2)), ((1, 2, 2), (2,)), ((2,), ())])
def test_shapes_that_do_not_fit(position: int, j: tuple[int, ...], d: tuple[int, ...]) -> None:
    elements = draw(2, 2, (), 0)
    elements[position] = (torch.zeros(j, dtype=F64), torch.zeros(d, dtype=F64))
    with pytest.raises(ValueError, match="shape"):
        oracles.ordered_product(elements)
