"""The store of one parameter's influence, row by row: what it refuses to load, which rows it uses again, what it adds
up."""

import re
from typing import Any

import pytest
import torch
from helpers.strategies import normal
from torch import Tensor

from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl.errors import ConfigError

SLICES, WIDTH, BATCH, STATE = 3, 2, 2, 4
LIKE = torch.empty(0, dtype=torch.float64)


def sliced() -> ParameterInfluence:
    return ParameterInfluence(torch.Size([SLICES, WIDTH]), True, BATCH, STATE, LIKE)


def whole() -> ParameterInfluence:
    return ParameterInfluence(torch.Size([SLICES, WIDTH]), False, BATCH, STATE, LIKE)


def filled(keys: list[int], now: int = 5) -> ParameterInfluence:
    """Rows of these keys, with numbers in them."""
    influence = sliced()
    rows = influence.allocate(torch.tensor(keys), now)
    influence.values[rows] = normal(1, len(keys), STATE, WIDTH)
    return influence


# ---------------------------------------------------------------------- loading

FIT = "the saved influence is damaged: its rows do not fit their samples, slices and last blocks"
ROWS = "the saved influence is damaged: a slice refers to a row that does not exist"
SHAPE = "the saved influence has rows of shape {} for {} slices, this learner needs (4, 2) for 6"
DAMAGE: dict[str, tuple[str, Any, str]] = {
    "short samples": ("sample", lambda t: t[:1], FIT),
    "short slices": ("slice", lambda t: t[:1], FIT),
    "short last blocks": ("last_block", lambda t: t[:1], FIT),
    "samples of two dimensions": ("sample", lambda t: t[:, None], FIT),
    "samples of another kind": ("sample", lambda t: t.int(), FIT),
    "slices of another kind": ("slice", lambda t: t.int(), FIT),
    "last blocks of another kind": ("last_block", lambda t: t.double(), FIT),
    "rows of another kind": ("row", lambda t: t.int(), ROWS),
    "a row too far": ("row", lambda t: t.clamp(min=2), ROWS),
    "another precision": (
        "values",
        lambda t: t.float(),
        "the saved influence is torch.float32, this learner needs torch.float64",
    ),
    "another state": ("values", lambda t: t[:, 1:], SHAPE.format("(3, 2)", 6)),
    "other slices": ("values", lambda t: t[..., :1], SHAPE.format("(4, 1)", 6)),
    "another batch": ("row", lambda t: t[:3], SHAPE.format("(4, 2)", 3)),
}


@pytest.mark.parametrize(("part", "damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_what_does_not_fit_is_refused(part: str, damage: Any, message: str) -> None:
    saved = filled([1, 5]).state_dict()
    saved[part] = damage(saved[part])
    mine = filled([0])
    before = mine.state_dict()
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        mine.load_state_dict(saved)
    assert all(bool((before[k] == v).all()) for k, v in mine.state_dict().items() if isinstance(v, Tensor))


def test_what_was_saved_is_loaded_as_a_copy() -> None:
    saved = filled([1, 5]).state_dict()
    mine = filled([0])
    mine.load_state_dict(saved)
    again = mine.state_dict()
    assert list(again) == ["sliced", "values", "sample", "slice", "last_block", "row"]
    assert again["sliced"] is True
    for name in ("values", "sample", "slice", "last_block", "row"):
        assert torch.equal(again[name], saved[name])
        held = mine._row if name == "row" else getattr(mine, name)
        assert len({t.data_ptr() for t in (held, saved[name], again[name])}) == 3


def test_what_was_saved_elsewhere_is_loaded_onto_the_device_of_the_learner() -> None:
    mine = ParameterInfluence(torch.Size([SLICES, WIDTH]), True, BATCH, STATE, LIKE.to("meta"))
    mine.load_state_dict(filled([1, 5]).state_dict())
    assert {str(t.device) for t in (mine.values, mine.sample, mine.slice)} == {"meta"}
    assert {str(t.device) for t in (mine.last_block, mine._row)} == {"cpu"}
    assert mine.values.shape == (2, STATE, WIDTH)


def test_a_store_without_rows_may_be_saved_and_loaded() -> None:
    mine = filled([0])
    mine.load_state_dict(sliced().state_dict())
    assert mine.active_rows().numel() == 0
    assert mine.values.shape == (0, STATE, WIDTH)


def test_a_parameter_without_slices_has_a_store_without_rows() -> None:
    influence = ParameterInfluence(torch.Size([0, WIDTH]), True, BATCH, STATE, LIKE)
    assert influence.values.shape == (0, STATE, 0)
    assert influence.to_dense().shape == (BATCH, STATE, 0)


# ---------------------------------------------------------------------- rows


def test_rows_are_allocated_once_used_again_when_cleared_and_start_at_zero() -> None:
    influence = filled([1, 5], now=5)
    assert influence.sample.tolist() == [0, 1]
    assert influence.slice.tolist() == [1, 2]
    assert influence.last_block.tolist() == [5, 5]
    assert influence.active_rows().tolist() == [0, 1]
    assert influence.allocate(torch.tensor([5, 1]), 6).tolist() == [1, 0]  # nothing new: the last blocks stay
    assert influence.last_block.tolist() == [5, 5]

    influence.clear_samples(torch.tensor([True, False]))
    assert influence.active_rows().tolist() == [1]
    assert bool(influence.values[0].count_nonzero())  # the numbers are still there, but of no sample
    assert influence.allocate(torch.tensor([5, 0, 2]), 7).tolist() == [1, 0, 2]  # one row again, and one more
    assert influence.active_rows().tolist() == [0, 1, 2]
    assert influence.sample.tolist() == [0, 1, 0]
    assert influence.slice.tolist() == [0, 2, 2]
    assert influence.last_block.tolist() == [7, 5, 7]
    assert not bool(influence.values[[0, 2]].count_nonzero())
    assert bool(influence.values[1].count_nonzero())


def test_bytes_are_those_of_all_its_tensors() -> None:
    assert filled([1, 5]).n_bytes == 8 * (2 * STATE * WIDTH + 3 * 2 + BATCH * SLICES)


def test_the_dense_form_has_every_row_at_its_sample_and_slice() -> None:
    influence = filled([1, 5])
    expected = torch.zeros(BATCH, STATE, SLICES, WIDTH, dtype=torch.float64)
    expected[0, :, 1], expected[1, :, 2] = influence.values
    assert torch.equal(influence.to_dense(), expected.flatten(2))


# ---------------------------------------------------------------------- sums and products


@pytest.mark.parametrize("keys", [[0, 1, 3, 4, 5], [4, 1]], ids=["all rows", "some rows"])
def test_gradients_are_added_slice_by_slice_over_the_samples(keys: list[int]) -> None:
    influence = filled([0, 1, 3, 4, 5])
    gradient = normal(3, SLICES, WIDTH)
    expected = gradient.clone()
    rows = influence.allocate(torch.tensor(keys), 9)
    adjoints = normal(2, len(keys), STATE)
    for weight, row in zip(adjoints, rows.tolist(), strict=True):
        expected[influence.slice[row]] += weight @ influence.values[row]
    influence.accumulate_grad(rows, adjoints, gradient)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-12)


def test_no_rows_add_nothing_to_a_gradient() -> None:
    influence, gradient = filled([0]), normal(3, SLICES, WIDTH)
    before = gradient.clone()
    influence.accumulate_grad(torch.empty(0, dtype=torch.int64), normal(2, 0, STATE), gradient)
    assert torch.equal(gradient, before)


def transition(rows: Tensor | None) -> Transition:
    """Over a state of two rows of two entries; of the rows named, or of all."""
    size = STATE if rows is None else rows.shape[1] * 2
    return Transition(rows, rows, normal(4, BATCH, size, size), normal(5, BATCH, size), 2, 2)


@pytest.mark.parametrize("rows", [None, torch.tensor([[1], [0]])], ids=["all of the state", "a row of it"])
@pytest.mark.parametrize("samples", [[1, 0], [1]], ids=["both samples", "one sample"])
@pytest.mark.parametrize("make", [sliced, whole])
def test_adding_reaches_the_rows_named_and_no_others(make: Any, samples: list[int], rows: Tensor | None) -> None:
    influence = make()
    influence.allocate(torch.arange(BATCH * influence.slices), 0)
    influence.values = normal(1, *influence.values.shape)
    named = influence.allocate(torch.tensor(samples) * influence.slices, 0).sort().values  # the first slice of each
    block = transition(rows)
    immediate = normal(6, len(named), block.jacobian.shape[1], influence.values.shape[2])
    expected = influence.values.clone()
    for i, row in enumerate(named.tolist()):
        b = int(influence.sample[row])
        at = slice(None) if rows is None else slice(2 * int(rows[b, 0]), 2 * int(rows[b, 0]) + 2)
        expected[row, at] += immediate[i]
    influence.add(named, block, immediate)
    torch.testing.assert_close(influence.values, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keys", [[0, 1, 2], [0, 1, 3], [1, 3, 4], [0, 2, 1]], ids=str)
def test_products_are_added_to_the_rows_named_in_one_piece_or_not(keys: list[int]) -> None:
    influence = filled([0, 1, 2, 3, 4, 5])
    rows = influence.allocate(torch.tensor(keys), 0)
    left, right = normal(7, len(keys), 3, STATE), normal(8, len(keys), 3, WIDTH)
    expected = influence.values.clone()
    for i, row in enumerate(rows.tolist()):
        expected[row] += left[i].T @ right[i]
    influence.add_products(rows, transition(None), left, right, False)
    torch.testing.assert_close(influence.values, expected, rtol=1e-12, atol=1e-12)
