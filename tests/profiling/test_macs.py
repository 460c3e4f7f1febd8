"""The counter against counts done by hand, alone and over everything the package runs."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import oracles
from rtrl import BlockRTRL, RecurrentMoE
from rtrl.errors import ConfigError, UnknownOperationError
from rtrl.profiling.macs import MacCounter

F64 = torch.float64


def counted(call: Callable[[], Any]) -> MacCounter:
    with MacCounter() as counter:
        call()
    return counter


def ones(*shape: int, grad: bool = False) -> Tensor:
    return torch.ones(*shape, dtype=F64, requires_grad=grad)


# ------------------------------------------------------------------ one operation at a time

CONTRACTIONS: dict[str, tuple[Callable[[], Any], int]] = {
    "mm": (lambda: ones(2, 3) @ ones(3, 4), 2 * 3 * 4),
    "mm out": (lambda: torch.mm(ones(2, 3), ones(3, 4), out=ones(2, 4)), 2 * 3 * 4),
    "bmm": (lambda: torch.bmm(ones(5, 2, 3), ones(5, 3, 4)), 5 * 2 * 3 * 4),
    "addmm": (lambda: torch.addmm(ones(4), ones(2, 3), ones(3, 4)), 2 * 3 * 4),
    "addmm in place": (lambda: ones(2, 4).addmm_(ones(2, 3), ones(3, 4)), 2 * 3 * 4),
    "baddbmm": (lambda: torch.baddbmm(ones(5, 2, 4), ones(5, 2, 3), ones(5, 3, 4)), 5 * 2 * 3 * 4),
    "addbmm": (lambda: torch.addbmm(ones(2, 4), ones(5, 2, 3), ones(5, 3, 4)), 5 * 2 * 3 * 4),
    "mv": (lambda: torch.mv(ones(2, 3), ones(3)), 2 * 3),
    "addmv": (lambda: torch.addmv(ones(2), ones(2, 3), ones(3)), 2 * 3),
    "vector matrix": (lambda: ones(3) @ ones(3, 4), 3 * 4),
    "dot": (lambda: torch.dot(ones(7), ones(7)), 7),
    "vdot": (lambda: torch.vdot(ones(7), ones(7)), 7),
    "inner": (lambda: torch.inner(ones(2, 3), ones(5, 3)), 2 * 3 * 5),
    "outer": (lambda: torch.outer(ones(3), ones(4)), 3 * 4),
    "outer by broadcasting": (lambda: ones(5, 3, 1) * ones(5, 1, 4), 5 * 3 * 4),
    "addr": (lambda: torch.addr(ones(3, 4), ones(3), ones(4)), 3 * 4),
    "multi_dot": (lambda: torch.linalg.multi_dot([ones(3, 4), ones(4, 5), ones(5, 2)]), 4 * 5 * 2 + 3 * 4 * 2),
    "matmul, both broadcast": (lambda: ones(5, 1, 2, 3) @ ones(1, 6, 3, 4), 5 * 6 * 2 * 3 * 4),
    "matmul, matrix shared": (lambda: ones(5, 2, 3) @ ones(3, 4), 5 * 2 * 3 * 4),
    "matmul, vector": (lambda: ones(5, 2, 3) @ ones(3), 5 * 2 * 3),
    "linear": (lambda: nn.functional.linear(ones(5, 2, 3), ones(4, 3), ones(4)), 5 * 2 * 3 * 4),
    "linear of one vector": (lambda: nn.functional.linear(ones(3), ones(4, 3), ones(4)), 3 * 4),
    "tensordot": (lambda: torch.tensordot(ones(2, 3, 4), ones(4, 3, 5), dims=([1, 2], [1, 0])), 2 * 3 * 4 * 5),
    "einsum": (lambda: torch.einsum("bi,bnij->bnj", ones(2, 3), ones(2, 4, 3, 5)), 2 * 3 * 4 * 5),
    "einsum of three": (lambda: torch.einsum("bi,ij,bj->b", ones(2, 3), ones(3, 3), ones(2, 3)), 2 * 3 * 3 + 2 * 3),
    "einsum outer": (lambda: torch.einsum("i,j->ij", ones(3), ones(4)), 3 * 4),
    "nothing": (lambda: ones(0, 3) @ ones(3, 4), 0),
    "sparse": (lambda: torch.sparse.mm(torch.eye(4, dtype=F64).to_sparse(), ones(4, 3)), 4 * 3),
    "sparse vector": (lambda: torch.eye(4, dtype=F64).to_sparse() @ ones(4), 4),
}


@pytest.mark.parametrize("case", CONTRACTIONS)
def test_contractions_count_their_exact_multiply_adds(case: str) -> None:
    call, expected = CONTRACTIONS[case]
    assert counted(call).macs == expected


def test_inference_mode_hides_nothing() -> None:
    cases = ("mm", "matmul, both broadcast", "linear", "einsum", "tensordot", "outer")
    with torch.inference_mode():
        for case in cases:
            call, expected = CONTRACTIONS[case]
            assert counted(call).macs == expected, case


ELEMENTWISE: dict[str, tuple[Callable[[], Any], int]] = {
    "mul": (lambda: ones(3, 4) * ones(3, 4), 12),
    "mul, one factor broadcast": (lambda: ones(3, 4) * ones(4), 12),
    "mul by a number": (lambda: ones(3, 4) * 2.0, 12),
    "add in place": (lambda: ones(3, 4).add_(1.0), 12),
    "abs in place": (lambda: ones(3, 4).abs_(), 12),
    "div": (lambda: ones(3, 4) / 2.0, 12),
    "addcmul": (lambda: torch.addcmul(ones(3, 4), ones(3, 4), ones(3, 4)), 12),
    "lerp": (lambda: torch.lerp(ones(3, 4), ones(3, 4), 0.5), 12),
    "tanh": (lambda: ones(3, 4).tanh(), 12),
    "softmax": (lambda: ones(3, 4).softmax(dim=-1), 12),
    "layer norm": (lambda: nn.functional.layer_norm(ones(3, 4), (4,)), 12),
    "sum": (lambda: ones(3, 4).sum(), 12),
    "sum of one dimension": (lambda: ones(3, 4).sum(dim=1), 12),
    "mean": (lambda: ones(3, 4).mean(dim=0), 12),
    "cumsum": (lambda: ones(3, 4).cumsum(dim=0), 12),
    "foreach_add": (lambda: torch._foreach_add_([ones(3, 4), ones(5)], [ones(3, 4), ones(5)]), 17),
    "foreach_norm": (lambda: torch._foreach_norm([ones(3, 4), ones(5)]), 17),
    "index_add": (lambda: ones(9, 4).index_add(0, torch.tensor([1, 1, 2]), ones(3, 4)), 12),
    "scatter_add": (lambda: ones(9, 4).scatter_add(0, torch.zeros(3, 4, dtype=torch.int64), ones(3, 4)), 12),
    "index_put, adding": (lambda: ones(9, 4).index_put((torch.tensor([1, 1, 2]),), ones(3, 4), accumulate=True), 12),
    "index_put": (lambda: ones(9, 4).index_put((torch.tensor([1, 2, 3]),), ones(3, 4)), 0),
    "gather": (lambda: ones(3, 4).gather(0, torch.zeros(3, 4, dtype=torch.int64)), 0),
    "where": (lambda: torch.where(ones(3, 4) > 0, ones(3, 4), ones(3, 4)), 0),
    "cat": (lambda: torch.cat([ones(3, 4), ones(3, 4)]).clone().t().contiguous(), 0),
    "random": (lambda: torch.randn(3, 4).normal_().uniform_(), 0),
    "sort": (lambda: torch.randn(3, 4).sort().values.topk(2).indices.unique(), 0),
}


@pytest.mark.parametrize("case", ELEMENTWISE)
def test_other_arithmetic_is_counted_apart(case: str) -> None:
    call, expected = ELEMENTWISE[case]
    counter = counted(call)
    assert (counter.macs, counter.elementwise) == (0, expected)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), *[st.integers(1, 6)] * 3)
def test_a_batched_product_counts_its_loops(lead: list[int], n: int, k: int, m: int) -> None:
    call = lambda: ones(*lead, n, k) @ ones(*lead, k, m)
    assert counted(call).macs == torch.Size(lead).numel() * n * k * m


# ------------------------------------------------------------------ through autograd and vmap


def test_the_backward_pass_of_a_linear_layer_costs_twice_its_forward_pass() -> None:
    layer, x = nn.Linear(3, 4, dtype=F64), ones(5, 3, grad=True)
    forward = counted(lambda: layer(x)).macs
    out = layer(x)
    assert forward == 5 * 3 * 4
    assert counted(lambda: out.backward(ones(5, 4))).macs == 2 * forward
    out = layer(x.detach())
    assert counted(lambda: out.backward(ones(5, 4))).macs == forward  # the weight's gradient alone


def test_the_backward_pass_of_a_matrix_vector_product_is_an_outer_product() -> None:
    weight, x = ones(4, 3, grad=True), ones(3, grad=True)
    out = torch.mv(weight, x)
    assert counted(lambda: out.backward(ones(4))).macs == 4 * 3 + 4 * 3


def test_a_jacobian_by_batched_gradients_costs_one_backward_pass_a_row() -> None:
    weight, x = ones(4, 3, grad=True), ones(5, 3, grad=True)
    out = nn.functional.linear(x, weight)
    eye = torch.eye(4, dtype=F64).unsqueeze(1).expand(4, 5, 4)
    at_x = lambda: torch.autograd.grad(out, x, eye, is_grads_batched=True, retain_graph=True)
    at_both = lambda: torch.autograd.grad(out, [x, weight], eye, is_grads_batched=True, retain_graph=True)
    assert counted(at_x).macs == 4 * (5 * 4 * 3)
    assert counted(at_both).macs == 4 * (2 * 5 * 4 * 3)


def test_vmap_counts_every_sample() -> None:
    weight = ones(4, 3)
    assert counted(lambda: torch.func.vmap(lambda v: weight @ v)(ones(7, 3))).macs == 7 * 4 * 3
    assert counted(lambda: torch.func.vmap(torch.mv)(ones(7, 4, 3), ones(7, 3))).macs == 7 * 4 * 3
    assert counted(lambda: torch.func.vmap(torch.dot)(ones(7, 3), ones(7, 3))).macs == 7 * 3
    assert counted(lambda: torch.func.vmap(torch.outer)(ones(7, 4), ones(7, 3))).macs == 7 * 4 * 3
    assert (
        counted(lambda: torch.func.vmap(torch.func.vmap(torch.mm))(ones(2, 7, 4, 3), ones(2, 7, 3, 5))).macs
        == 2 * 7 * 4 * 3 * 5
    )


def test_a_jacobian_by_vmapped_vjp_costs_one_product_a_row() -> None:
    weight, x = ones(4, 3), ones(3)

    def jacobian() -> Tensor:
        _, vjp = torch.func.vjp(lambda v: weight @ v, x)
        return torch.func.vmap(lambda c: vjp(c)[0])(torch.eye(4, dtype=F64))

    assert counted(jacobian).macs == 4 * 3 + 4 * (4 * 3)


# ------------------------------------------------------------------ the counter itself


@pytest.fixture(scope="module")
def cube() -> Iterator[str]:
    """An operation that no table can know."""
    library = torch.library.Library("rtrl_test", "DEF")
    library.define("cube(Tensor x) -> Tensor")
    library.impl("cube", lambda x: x.clone(), "CPU")
    yield "rtrl_test.cube"
    library._destroy()


def test_an_unknown_operation_is_refused_by_name(cube: str) -> None:
    x = ones(3)
    with MacCounter(), pytest.raises(UnknownOperationError, match=r"register\('rtrl_test.cube'"):
        torch.ops.rtrl_test.cube(x)
    for call in (
        lambda: torch.fft.fft(x),
        lambda: nn.functional.conv1d(ones(1, 2, 5), ones(3, 2, 3)),
        lambda: torch.linalg.qr(ones(2, 2)),
    ):
        with MacCounter(), pytest.raises(UnknownOperationError, match="aten"):
            call()
    square = torch.eye(3, dtype=F64).to_sparse()
    with MacCounter(), pytest.raises(UnknownOperationError, match="sparse"):
        square @ square


def test_a_registered_operation_counts_by_its_rule(cube: str) -> None:
    rule = lambda args, kwargs, out: 2 * args[0].numel()
    for counter in (MacCounter({cube: rule}), MacCounter()):
        counter.register(cube, rule)
        with counter:
            torch.ops.rtrl_test.cube(ones(3))
        assert counter.macs == 6
        assert counter.by_op == {cube: 6}


@pytest.mark.parametrize("name", ["mm", "aten.mm.default", "aten.", "", 3])
def test_a_malformed_name_is_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"namespace\.name"):
        MacCounter().register(name, lambda *_: 0)


def test_nesting_counts_nothing_twice() -> None:
    product = lambda: ones(2, 3) @ ones(3, 4)
    once, inner, outer = MacCounter(), MacCounter(), MacCounter()
    with once, once:
        product()
        with torch.inference_mode(), once:
            product()
    product()
    assert once.macs == 2 * 24
    with outer:
        product()
        with inner:
            product()
    assert (outer.macs, inner.macs) == (2 * 24, 24)
    with FlopCounterMode(display=False) as flops, once, FlopCounterMode(display=False):
        product()
    assert once.macs == 3 * 24
    assert flops.get_total_flops() == 2 * 24


def test_an_error_inside_leaves_no_trace() -> None:
    counter = MacCounter()
    with pytest.raises(RuntimeError, match="shapes"), counter:
        ones(2, 3) @ ones(2, 3)
    ones(2, 3) @ ones(3, 4)
    assert counter.macs == 0


def test_a_counter_sees_its_own_thread_alone() -> None:
    inside = []
    with MacCounter() as here:
        thread = threading.Thread(target=lambda: inside.append(counted(lambda: ones(2, 3) @ ones(3, 4)).macs))
        thread.start()
        thread.join()
    assert (here.macs, inside) == (0, [24])


# ------------------------------------------------------------------ all that the package runs


class Recurrent(nn.Module):
    """A layer of PyTorch as a cell with a state of one row."""

    def __init__(self, layer: type[nn.RNNCell] | type[nn.GRUCell], untapped: bool = False) -> None:
        super().__init__()
        self.layer = layer(3, 4, dtype=F64)
        self.scale = (
            nn.Parameter(ones(4)) if untapped else None
        )  # its products are no linear maps, so it goes the general way

    def init_state(self, batch_size: int) -> Tensor:
        return torch.zeros(batch_size, 1, 4, dtype=F64)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        after = self.layer(x, h[:, 0])
        after = after if self.scale is None else after * self.scale
        return after, after.unsqueeze(1)


def mixture(**options: Any) -> RecurrentMoE:
    generator = torch.Generator().manual_seed(1)
    return RecurrentMoE(3, 2, d_model=4, n_slots=4, n_experts=4, topk=2, generator=generator, dtype=F64, **options)


CELLS: dict[str, Callable[[], nn.Module]] = {
    "mixture": mixture,
    "mixture with its router": lambda: mixture(router_output=True),
    "rnn": lambda: Recurrent(nn.RNNCell),
    "gru": lambda: Recurrent(nn.GRUCell),
    "general": lambda: Recurrent(nn.RNNCell, untapped=True),
}


def whole_run(cell: nn.Module, lazy: bool, block: int) -> None:
    """Everything a learner can be asked for, an optimiser's steps between."""
    generator = torch.Generator().manual_seed(0)
    learner = BlockRTRL(cell, 2, block=block, window=2, lazy=lazy)
    optimiser = torch.optim.Adam(cell.parameters())
    for t in range(8):
        y = learner.step(torch.randn(2, 3, dtype=F64, generator=generator))
        learner.backward((y if isinstance(y, Tensor) else y.output).square().mean())
        if t == 3:
            learner.sync(dormant=False)
            learner.sync()
            optimiser.step()
        if t == 4:
            learner.reset(torch.tensor([True, False]))
        if t == 5:
            learner.load_state_dict(learner.state_dict())
    for name, _ in cell.named_parameters():
        learner.influence(name)
    learner.sync()


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize(
    ("kind", "lazy"), [(kind, lazy) for kind in CELLS for lazy in (True, False) if lazy or "mixture" in kind]
)
def test_a_whole_run_is_counted(kind: str, lazy: bool, block: int) -> None:
    counter = counted(lambda: whole_run(CELLS[kind](), lazy, block))
    assert counter.macs > 0
    assert counter.elementwise > 0
    if block > 1:
        return
    again = counted(lambda: whole_run(CELLS[kind](), lazy, block))
    assert (again.by_op, again.elementwise_by_op) == (counter.by_op, counter.elementwise_by_op)


def test_counts_do_not_depend_on_threads() -> None:
    before = torch.get_num_threads()
    counts = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            counter = counted(lambda: whole_run(CELLS["gru"](), True, 3))
            counts.append((counter.by_op, counter.elementwise_by_op))
    finally:
        torch.set_num_threads(before)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kind", CELLS)
def test_the_oracles_are_counted(kind: str) -> None:
    cell, xs = CELLS[kind](), torch.randn(3, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    loss = lambda t, y: (y if isinstance(y, Tensor) else y.output).square().sum()
    through_time = counted(lambda: oracles.bptt(cell, xs, loss)).macs
    assert 0 < through_time < counted(lambda: oracles.dense_rtrl(cell, xs, loss)).macs


def test_a_dense_step_costs_what_textbook_rtrl_costs() -> None:
    """``h' = tanh(W x + U h)``: a step of block 1 moves the whole influence, ``B·H·H·P``, beside which the rest is
    small."""
    batch, hidden, inputs = 2, 24, 24
    cell = nn.RNNCell(inputs, hidden, dtype=F64)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = cell

        def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
            after = self.layer(x, h[:, 0])
            return after, after.unsqueeze(1)

    learner = BlockRTRL(Plain(), batch, state=torch.zeros(batch, 1, hidden, dtype=F64))
    for _ in range(2):
        learner.step(ones(batch, inputs))
    counter = counted(lambda: learner.step(ones(batch, inputs)))
    moved = batch * hidden * hidden * sum(p.numel() for p in cell.parameters())
    assert moved <= counter.macs <= 1.25 * moved
