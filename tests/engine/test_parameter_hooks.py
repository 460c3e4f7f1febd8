"""Hooks on parameters see the whole gradient once, when it is delivered."""

import pytest
import torch
from torch import Tensor, nn

import rtrl
from rtrl.learners import BPTT, RFLO, TBPTT, UORO, DenseRTRL, DiagonalRTRL, Learner, SnAp

F64 = torch.float64
XS = torch.randn(7, 2, 3, generator=torch.Generator().manual_seed(0), dtype=F64)


def make_cell() -> nn.Module:
    torch.manual_seed(0)
    return rtrl.from_torch(nn.RNNCell(3, 4), nn.Linear(4, 1)).double()


def run(learner: Learner) -> None:
    for x in XS:
        learner.backward(learner.step(x).square().sum())
    learner.sync()


def grads(learner: Learner) -> dict[str, Tensor]:
    return {name: p.grad for name, p in learner.cell.named_parameters() if p.grad is not None}


MAKERS = {
    "BlockRTRL": lambda cell: rtrl.BlockRTRL(cell, 2, block=3),
    "BPTT": lambda cell: BPTT(cell, 2),
    "TBPTT": lambda cell: TBPTT(cell, 2, horizon=3),
    "DenseRTRL": lambda cell: DenseRTRL(cell, 2),
    "SnAp": lambda cell: SnAp(cell, 2, order=1),
    "UORO": lambda cell: UORO(cell, 2, generator=torch.Generator().manual_seed(0)),
    "RFLO": lambda cell: RFLO(cell, 2, leak=0.5),
    "DiagonalRTRL": lambda cell: DiagonalRTRL(cell, 2),
}


@pytest.mark.parametrize("name", MAKERS)
def test_hooks_see_the_whole_gradient_once(name):
    plain = MAKERS[name](make_cell())
    run(plain)
    hooked = MAKERS[name](make_cell())
    weight, seen, after = hooked.cell.cell.weight_hh, [], []
    mask = torch.eye(4, dtype=F64)
    weight.register_hook(lambda grad: seen.append(grad.clone()) or grad * mask)
    weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    run(hooked)
    expected = grads(plain)
    assert len(seen) == len(after) == 1
    torch.testing.assert_close(seen[0], expected["cell.weight_hh"])
    torch.testing.assert_close(after[0], expected["cell.weight_hh"] * mask)
    expected["cell.weight_hh"] = expected["cell.weight_hh"] * mask
    torch.testing.assert_close(grads(hooked), expected)
    run(hooked)  # it accumulates, and the hook is still there
    assert len(seen) == 2


@pytest.mark.parametrize("name", ["BlockRTRL", "BPTT"])
def test_a_hook_that_raises_leaves_everything_as_it_was(name):
    plain = MAKERS[name](make_cell())
    run(plain)
    learner = MAKERS[name](make_cell())
    parameters = dict(learner.cell.named_parameters())
    parameters["readout.weight"].grad = torch.ones(1, 4, dtype=F64)
    kept = parameters["readout.weight"].grad

    def fail(grad: Tensor) -> None:
        raise ValueError("not today")

    parameters["readout.weight"].register_hook(lambda grad: grad)  # delivered before the error
    handle = parameters["cell.weight_ih"].register_hook(fail)
    with pytest.raises(ValueError, match="not today"):
        run(learner)
    assert parameters["readout.weight"].grad is kept
    assert bool((kept == 1).all())
    assert grads(learner).keys() == {"readout.weight"}
    handle.remove()
    learner.sync()
    expected = grads(plain)
    expected["readout.weight"] = expected["readout.weight"] + 1
    torch.testing.assert_close(grads(learner), expected)


@pytest.mark.parametrize("by_learner", [True, False])
def test_a_parameter_penalty_fires_the_hooks_as_autograd_does(by_learner):
    plain = MAKERS["BlockRTRL"](make_cell())
    hooked = MAKERS["BlockRTRL"](make_cell())
    seen, after = [], []
    weight = hooked.cell.cell.weight_hh
    weight.register_hook(lambda grad: seen.append(grad.clone()) or 2 * grad)
    weight.register_post_accumulate_grad_hook(lambda p: after.append(p.grad.clone()))
    for learner in (plain, hooked):
        for x in XS:
            y = learner.step(x)
            loss = y.square().sum() + learner.cell.cell.weight_hh.square().sum()
            if by_learner:
                learner.backward(loss)
            else:
                loss.backward()
        learner.sync()
    expected = grads(plain)
    expected["cell.weight_hh"] = 2 * expected["cell.weight_hh"]
    torch.testing.assert_close(grads(hooked), expected)
    assert len(seen) == len(after) == len(XS) + 1  # each penalty, and the rest at sync
    torch.testing.assert_close(seen[0], 2 * weight.detach())
    torch.testing.assert_close(after[-1], expected["cell.weight_hh"])


def test_a_hook_that_raises_at_a_penalty_leaves_every_grad_as_it_was():
    learner = MAKERS["BlockRTRL"](make_cell())
    weight = learner.cell.cell.weight_hh

    def fail(parameter: Tensor) -> None:
        raise ValueError("not today")

    weight.register_post_accumulate_grad_hook(fail)
    y = learner.step(XS[0])
    with pytest.raises(ValueError, match="not today"):
        learner.backward(y.square().sum() + weight.square().sum())
    assert weight.grad is None
    assert y.grad is None


@pytest.mark.parametrize("failing", ["cell.weight_ih", "cell.weight_hh", "readout.weight"])
def test_a_hook_that_raises_takes_back_what_was_added_to_others(failing):
    learner = MAKERS["BlockRTRL"](make_cell())
    parameters = dict(learner.cell.named_parameters())
    handles = []
    for name in ("cell.weight_ih", "cell.weight_hh", "readout.weight"):
        p = parameters[name]
        p.grad = torch.ones_like(p)

        def hook(grad: Tensor, name: str = name) -> None:
            grad.mul_(3.0)  # a hook may change what it is given
            if name == failing:
                raise ValueError("not today")

        handles.append(p.register_hook(hook))
    with pytest.raises(ValueError, match="not today"):
        run(learner)
    assert all(bool((p.grad == 1).all()) for p in parameters.values() if p.grad is not None)
    for handle in handles:
        handle.remove()
    learner.sync()
    plain = MAKERS["BlockRTRL"](make_cell())
    run(plain)
    for name, expected in grads(plain).items():
        before = 1.0 if parameters[name].ndim == 2 else 0.0
        torch.testing.assert_close(parameters[name].grad - before, expected)
