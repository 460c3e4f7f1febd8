"""``RecurrentMoE``, ``Stack``, ``from_torch`` and ``grouped_linear`` refuse what they cannot take."""

import pytest
import torch
from helpers.adversarial_inputs import D_IN, F64, NOT_INTEGERS, B
from torch import nn

import rtrl
from rtrl import Sparsity
from rtrl.cells import Stack, from_torch, grouped_linear
from rtrl.errors import ConfigError, ShapeError, SparsityError

MIXTURE = rtrl.RecurrentMoE(D_IN, 2, 4, 4, 4, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
X, H = torch.ones(B, D_IN, dtype=F64), MIXTURE.init_state(B)
PAIR = torch.tensor([[0, 1], [2, 3]])
CALLS = [
    ("x width", (X[:, :2], H), ShapeError, r"x must have shape \(B, 3\) or .*got \(2, 2\)"),
    ("x vector", (X[0], H), ShapeError, r"got \(3,\)"),
    ("x four-dimensional", (X[None, None], H), ShapeError, r"got \(1, 1, 2, 3\)"),
    ("no tokens", (X[:, None][:, :0], H), ShapeError, r"n ≥ 1, got \(2, 0, 3\)"),
    ("x dtype", (X.float(), H), ShapeError, "x is torch.float32 on cpu, the parameters are torch.float64"),
    ("x device", (X.to("meta"), H), ShapeError, "x is torch.float64 on meta"),
    ("h slots", (X, H[:, :3]), ShapeError, r"h must have shape \(2, 4, 4\), got \(2, 3, 4\)"),
    ("h batch", (X, H[:1]), ShapeError, r"h must have shape \(2, 4, 4\), got \(1, 4, 4\)"),
    ("h dtype", (X, H.float()), ShapeError, "h is torch.float32"),
    ("h device", (X, H.to("meta")), ShapeError, "h is torch.float64 on meta"),
    (
        "no reads",
        (X, H, Sparsity(None, PAIR, {"expert_up": PAIR})),
        SparsityError,
        r"must have reads, writes and active\['expert_up'\]",
    ),
    ("no writes", (X, H, Sparsity(PAIR, None, {"expert_up": PAIR})), SparsityError, "must have reads, writes"),
    ("no experts", (X, H, Sparsity(PAIR, PAIR)), SparsityError, "must have reads, writes"),
    (
        "empty reads",
        (X, H, MIXTURE.choices(PAIR[:, :0], PAIR[:, :0], PAIR)),
        SparsityError,
        "must read at least one slot",
    ),
    ("empty experts", (X, H, MIXTURE.choices(PAIR, PAIR, PAIR[:, :0])), SparsityError, "use at least one expert"),
    (
        "writes not read",
        (X, H, MIXTURE.choices(PAIR, PAIR.flip(0), PAIR)),
        SparsityError,
        "replay writes a slot that it does not read",
    ),
    (
        "one write of two not read",
        (X, H, MIXTURE.choices(PAIR, torch.tensor([[0, 2], [2, 3]]), PAIR)),
        SparsityError,
        "replay writes a slot that it does not read",
    ),
    (
        "reads out of range",
        (X, H, MIXTURE.choices(PAIR + 1, PAIR + 1, PAIR)),
        SparsityError,
        "reads must lie in 0 … 3, got 1 … 4",
    ),
    (
        "experts out of range",
        (X, H, MIXTURE.choices(PAIR, PAIR, PAIR - 1)),
        SparsityError,
        "experts must lie in 0 … 3, got -1 … 2",
    ),
    (
        "reads repeated",
        (X, H, MIXTURE.choices(PAIR // 2, PAIR // 2, PAIR)),
        SparsityError,
        "reads repeats an index within sample 0",
    ),
    ("writes repeated", (X, H, MIXTURE.choices(PAIR, PAIR[:, [0, 0]], PAIR)), SparsityError, "writes repeats an index"),
    (
        "experts repeated",
        (X, H, MIXTURE.choices(PAIR, PAIR, PAIR[:, [0, 0]])),
        SparsityError,
        "experts repeats an index",
    ),
    ("dtype of reads", (X, H, MIXTURE.choices(PAIR.int(), PAIR, PAIR)), SparsityError, "reads must be a LongTensor"),
    (
        "batch of experts",
        (X, H, MIXTURE.choices(PAIR, PAIR, PAIR[:1])),
        SparsityError,
        r"must have shape \(2, k\), got \(1, 2\)",
    ),
]


@pytest.mark.parametrize(("arguments", "error", "match"), [pytest.param(*case, id=id) for id, *case in CALLS])
def test_the_mixture_refuses_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match) as caught:
        MIXTURE(*arguments)
    assert type(caught.value) is error


@pytest.mark.parametrize("arguments", [([1.0], H), (X, None)], ids=["x", "h"])
def test_the_mixture_refuses_arguments_of_another_kind(arguments):
    with pytest.raises(ShapeError, match="must be a tensor"):
        MIXTURE(*arguments)


@pytest.mark.parametrize("replay", [PAIR, Sparsity([0], PAIR, {"expert_up": PAIR})], ids=["tensor", "list of reads"])
def test_the_mixture_refuses_a_replay_of_another_kind(replay):
    with pytest.raises(SparsityError):
        MIXTURE(X, H, replay)


SIZES = {
    "d_in": 3,
    "d_out": 2,
    "d_model": 4,
    "n_slots": 4,
    "n_experts": 4,
    "topk": 1,
    "n_heads": 2,
    "read_slots": 2,
    "write_slots": 2,
}


@pytest.mark.parametrize("size", [size for size in NOT_INTEGERS if size is not None], ids=repr)
@pytest.mark.parametrize("name", [*SIZES, "expert_hidden", "ffn_hidden"])
def test_the_mixture_refuses_sizes_that_are_no_positive_integers(name, size):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer, got {size!r}"):
        rtrl.RecurrentMoE(**{**SIZES, name: size})


@pytest.mark.parametrize(
    ("sizes", "match"),
    [
        ({"topk": 5}, r"topk \(5\) cannot exceed n_experts \(4\)"),
        ({"read_slots": 5}, "need write_slots ≤ read_slots ≤ n_slots, got 2, 5, 4"),
        ({"write_slots": 3}, "need write_slots ≤ read_slots ≤ n_slots, got 3, 2, 4"),
        ({"n_heads": 3}, r"d_model \(4\) must be divisible by n_heads \(3\)"),
    ],
)
def test_the_mixture_refuses_sizes_that_do_not_fit_together(sizes, match):
    with pytest.raises(ConfigError, match=match):
        rtrl.RecurrentMoE(**{**SIZES, **sizes})


@pytest.mark.parametrize("size", NOT_INTEGERS, ids=repr)
def test_the_mixture_refuses_impossible_batches(size):
    with pytest.raises(ConfigError, match="batch_size must be a positive integer"):
        MIXTURE.init_state(size)


def test_other_makers_of_cells_refuse_what_they_cannot_take():
    with pytest.raises(ConfigError, match="at least one layer"):
        Stack([])
    with pytest.raises(ConfigError, match=r"from_torch takes nn\.RNNCell, .* got Linear"):
        from_torch(nn.Linear(1, 1))
    with pytest.raises(ShapeError, match="grouped_linear expects"):
        grouped_linear(X, X, None, PAIR)
