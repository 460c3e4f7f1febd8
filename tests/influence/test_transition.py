"""The affine monoid of steps: its laws, and equality with step-by-step products of full matrices."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.full_matrices import written_out
from helpers.strategies import normal, seeds
from helpers.tolerances import worst
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import oracles
from rtrl._influence.transition import Transition, compose, flush_subnormals, identity


@st.composite
def index_sets(draw: Callable[..., Any], batch: int, n: int, k: int) -> Tensor:
    """LongTensor (batch, k), no repeats within a sample."""
    return torch.tensor([draw(st.permutations(range(n)))[:k] for _ in range(batch)], dtype=torch.int64).reshape(
        batch, k
    )


@st.composite
def element(draw: Callable[..., Any], batch: int, n: int, width: int) -> Transition:
    """Any element: sparse or dense, different rows a sample, any columns that contain the rows."""
    seed = draw(seeds)
    if draw(st.booleans()):
        u, c = n, n
        rows = cols = None
    else:
        c = draw(st.integers(0, n))
        u = draw(st.integers(0, c))
        cols = draw(index_sets(batch, n, c))
        rows = torch.stack([own[torch.tensor(draw(st.permutations(range(c))), dtype=torch.int64)][:u] for own in cols])
        if c == n and draw(st.booleans()):
            cols = None
    jacobian, adjoint = normal(seed, batch, u * width, c * width), normal(seed + 1, batch, c * width)
    return Transition(rows, cols, jacobian, adjoint, n, width)


@st.composite
def elements(draw: Callable[..., Any], count: int | None = None) -> list[Transition]:
    batch, n, width = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 2))
    size = draw(st.integers(1, 6)) if count is None else count
    return [draw(element(batch, n, width)) for _ in range(size)]


def assert_same(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert worst(actual[0], expected[0], dim=(1, 2)) <= 1
    assert worst(actual[1], expected[1], dim=1) <= 1


@given(elements())
def test_composing_equals_step_by_step_products(items: list[Transition]) -> None:
    product = items[0]
    for item in items[1:]:
        product = compose(product, item)
    assert_same(written_out(product), oracles.ordered_product([written_out(item) for item in items]))


@given(elements(count=3))
def test_associativity(items: list[Transition]) -> None:
    a, b, c = items
    assert_same(written_out(compose(compose(a, b), c)), written_out(compose(a, compose(b, c))))


@given(elements(count=1))
def test_identity_is_neutral_on_both_sides(items: list[Transition]) -> None:
    (item,) = items
    none = identity(item.jacobian.shape[0], item.n, item.width, item.jacobian)
    for product in (compose(none, item), compose(item, none)):
        for actual, expected in zip(written_out(product), written_out(item), strict=True):
            assert torch.equal(actual, expected)


def test_the_identity_is_of_no_rows_and_no_columns() -> None:
    none = identity(3, 4, 2, torch.empty(0, dtype=torch.float32, device="meta"))
    for index in (none.rows, none.cols):
        assert index is not None
        assert (tuple(index.shape), index.dtype, index.device.type) == ((3, 0), torch.int64, "meta")
    assert (tuple(none.jacobian.shape), none.jacobian.dtype, none.jacobian.device.type) == (
        (3, 0, 0),
        torch.float32,
        "meta",
    )
    assert (tuple(none.adjoint.shape), none.adjoint.dtype, none.adjoint.device.type) == ((3, 0), torch.float32, "meta")
    assert (none.n, none.width, none.apply_macs) == (4, 2, 0)


def test_the_monoid_is_not_commutative() -> None:
    """The control of every order test: swapped factors must be told apart."""
    a, b = (Transition(None, None, normal(s, 1, 2, 2), normal(s + 9, 1, 2), 2, 1) for s in (1, 2))
    expected = oracles.ordered_product([written_out(a), written_out(b)])
    assert_same(written_out(compose(a, b)), expected)
    with pytest.raises(AssertionError):
        assert_same(written_out(compose(b, a)), expected)


@given(elements(count=2))
def test_composition_stays_row_sparse(items: list[Transition]) -> None:
    """No sample of the result has more rows than the two elements have together, and none twice."""
    a, b = items
    product = compose(a, b)
    bound = sum(item.n if item.rows is None else item.rows.shape[1] for item in items)
    u = product.n if product.rows is None else product.rows.shape[1]
    assert u <= min(bound, product.n)
    for index in (product.rows, product.cols):
        if index is not None:
            assert all(len(set(own)) == len(own) for own in index.tolist())
    if product.rows is not None and product.cols is not None:
        assert all(set(r) <= set(c) for r, c in zip(product.rows.tolist(), product.cols.tolist(), strict=True))


def test_composition_takes_no_more_rows_and_columns_than_it_must() -> None:
    """Those of either element, and of the sample that has most of them."""

    def sparse(rows: list[list[int]], cols: list[list[int]]) -> Transition:
        return Transition(
            torch.tensor(rows),
            torch.tensor(cols),
            normal(1, 2, len(rows[0]), len(cols[0])),
            normal(2, 2, len(cols[0])),
            5,
            1,
        )

    product = compose(sparse([[0], [0]], [[0, 1], [0, 1]]), sparse([[1], [0]], [[1, 2], [0, 1]]))
    assert product.rows is not None
    assert product.cols is not None
    assert set(product.rows[0].tolist()) == {0, 1}
    assert set(product.cols[0].tolist()) == {0, 1, 2}
    assert product.rows.shape == (2, 2)
    assert product.cols.shape == (2, 3)
    assert product.apply_macs == 2 * 3


@given(elements(count=1), seeds, st.data())
def test_apply_and_pull_back_are_products_with_the_full_matrices(
    items: list[Transition], seed: int, data: st.DataObject
) -> None:
    (item,) = items
    phi, v = written_out(item)
    batch = phi.shape[0]
    chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4))
    sample = torch.tensor(chosen)
    influence = normal(seed, len(chosen), phi.shape[1], 3)
    assert worst(item.select_samples(sample).apply(influence), phi[sample] @ influence, dim=1) <= 1
    everyone = normal(seed, batch, phi.shape[1], 3)
    assert worst(item.apply(everyone), phi @ everyone, dim=1) <= 1
    w = normal(seed + 1, batch, phi.shape[1])
    through = (w.unsqueeze(1) @ phi).squeeze(1)
    assert worst(item.pull_back(w), v + through, dim=1) <= 1
    assert worst(item.pull_back(w, with_adjoint=False), through, dim=1) <= 1
    assert worst(item.pull_back(None), v, dim=1) <= 1


@given(elements(), seeds)
def test_transitions_apply_in_place_in_turn_to_some_columns(items: list[Transition], seed: int) -> None:
    phi = oracles.ordered_product([written_out(item) for item in items])[0]
    columns = normal(seed, phi.shape[0], phi.shape[1], 5)
    expected = torch.cat([columns[:, :, :1], phi @ columns[:, :, 1:4], columns[:, :, 4:]], dim=2)
    for item in items:
        item.apply_(columns[:, :, 1:4])
    assert worst(columns, expected, dim=1) <= 1


@given(elements(count=2), seeds)
def test_arguments_are_left_alone(items: list[Transition], seed: int) -> None:
    """A remembered node must not be changed by what is made of it."""
    before = [[None if t is None else t.clone() for t in (i.rows, i.cols, i.jacobian, i.adjoint)] for i in items]
    product = compose(*items)
    product.jacobian.add_(1.0)
    items[0].apply(normal(seed, *items[0].jacobian.shape[:1], items[0].n * items[0].width, 2)).add_(1.0)
    items[0].pull_back(None).add_(1.0)
    for item, old in zip(items, before, strict=True):
        for now, then in zip((item.rows, item.cols, item.jacobian, item.adjoint), old, strict=True):
            assert then is None or torch.equal(now, then)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_contracting_jacobians_never_become_subnormal(dtype: torch.dtype) -> None:
    """They sink to zero instead, for a CPU is many times slower on them. What is larger stays to the last bit."""
    tiny = torch.finfo(dtype).tiny
    item = Transition(None, None, 0.01 * normal(0, 1, 8, 8).to(dtype), normal(1, 1, 8).to(dtype), 8, 1)
    product, plain, subnormal = item, item.jacobian, False
    for _ in range(400):
        product, plain = compose(product, item), item.jacobian @ plain
        subnormal |= bool(((plain != 0) & (plain.abs() < tiny)).any())
        assert not bool(((product.jacobian != 0) & (product.jacobian.abs() < tiny)).any())
        if float(product.jacobian.abs().min()) > 0:
            assert torch.equal(product.jacobian, plain)
    assert subnormal, "the control: without care they do"
    assert not product.jacobian.count_nonzero()


@pytest.mark.parametrize("kinds", ["sparse sparse", "sparse dense", "dense sparse"])
def test_products_of_sparse_transitions_never_become_subnormal(kinds: str) -> None:
    def item(kind: str) -> Transition:
        size, rows = (4, None) if kind == "dense" else (2, torch.tensor([[0, 1]]))
        jacobian = 1e-20 * normal(size, 1, size, size).float()
        return Transition(rows, rows, jacobian, torch.zeros(1, size), 4, 1)

    first, second = map(item, kinds.split())
    product = compose(first, second).jacobian
    assert not bool(((product != 0) & (product.abs() < torch.finfo(torch.float32).tiny)).any())


def test_flushing_hides_neither_nan_nor_infinity() -> None:
    values = torch.tensor([math.nan, math.inf, -math.inf, 1.0, 1e-40, -1e-38, 0.0])
    out = flush_subnormals(values)
    assert out[0].isnan()
    assert out[1:].tolist() == [math.inf, -math.inf, 1.0, 0.0, 0.0, 0.0]
