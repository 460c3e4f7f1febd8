"""RTRL within each layer, against each layer's own recursion; and what learners with a pattern hold."""

import copy
from typing import Any

import pytest
import torch
from helpers.complex_cells import ComplexCell, complex_loss
from helpers.running import run
from helpers.tolerances import assert_gradients_equal, assert_influences_equal
from helpers.toy_cells import seeded
from torch import Tensor, nn

import oracles
import rtrl
from rtrl.cells import MinGRU
from rtrl.errors import ConfigError
from rtrl.learners import RFLO, DiagonalRTRL, LayerLocal, SnAp
from rtrl.testing import LearnerSpec, LocalToLayers, Stream, check_learner

B, T = 2, 6


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def squares(t: int, y: Tensor) -> Tensor:
    return (y - 0.1 * t).square().sum()


def stack() -> nn.Module:
    below, above = rtrl.from_torch(nn.GRUCell(2, 3)), rtrl.from_torch(nn.RNNCell(2, 2))
    return seeded(rtrl.Stack([below, nn.Linear(3, 2), above, nn.Linear(2, 1)]), 0)


def by_hand(cell: Any, xs: Tensor) -> dict[str, Tensor]:
    """Each layer's traces by itself; losses pass down through the layers of one step, whose states are constants."""
    layers = list(cell.layers)
    h = [layers[0].init_state(1)[0], layers[2].init_state(1)[0]]
    owned = [dict(layers[k].named_parameters(prefix=f"layers.{k}")) for k in (0, 2)]
    traces = [{n: torch.zeros(len(h[k]), p.numel(), dtype=p.dtype) for n, p in owned[k].items()} for k in (0, 1)]
    total = {name: torch.zeros_like(p) for name, p in cell.named_parameters()}
    for t, x in enumerate(xs):
        states = [state.detach().requires_grad_() for state in h]
        y, low = layers[0](x[None], states[0][None])
        into_high = layers[1](y)
        y, high = layers[2](into_high, states[1][None])
        loss = squares(t, layers[3](y))
        inputs = [*states, *cell.parameters()]
        *adjoints, _ = grads = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        for (name, _), direct in zip(cell.named_parameters(), grads[2:], strict=True):
            total[name] = total[name] + direct
        for k, after in enumerate((low[0], high[0])):
            for name in owned[k]:
                total[name] = total[name] + (adjoints[k] @ traces[k][name]).view_as(total[name])
            rows = [torch.autograd.grad(e, [states[k], *owned[k].values()], retain_graph=True) for e in after]
            dynamics, *immediate = (torch.stack([row[i].flatten() for row in rows]) for i in range(len(rows[0])))
            for name, own in zip(owned[k], immediate, strict=True):
                traces[k][name] = dynamics @ traces[k][name] + own
            h[k] = after.detach()
    return total


def test_it_is_the_recursion_of_each_layer_by_itself() -> None:
    cell, xs = stack(), noise(T, 1, 2)
    found = run(cell, xs, squares, make=LayerLocal)
    assert_gradients_equal(found.gradients, by_hand(cell, xs[:, 0]))
    exact, influences = oracles.dense_rtrl(cell, xs, squares, return_influence=True)
    above = {name: value for name, value in exact.items() if name.startswith(("layers.2", "layers.3"))}
    assert_gradients_equal({name: found.gradients[name] for name in above}, above)
    for name in ("layers.0.cell.weight_ih", "layers.1.weight"):
        assert float((found.gradients[name] - exact[name]).norm()) > 1e-3 * float(exact[name].norm())
        assert bool((influences[-1][name][:, 3:] != 0).any()) and not bool(found.influences[name][:, 3:].any())


def test_one_layer_is_exact_and_layers_can_be_named() -> None:
    xs = noise(T, B, 2)
    one = seeded(rtrl.from_torch(nn.GRUCell(2, 3)), 0)
    assert_gradients_equal(run(one, xs, squares, make=LayerLocal).gradients, oracles.bptt(one, xs, squares))
    cell = stack()
    expected = run(cell, xs, squares, make=LayerLocal)
    named = {"layers.0": [0, 1, 2], "layers.2": torch.tensor([3, 4])}
    found = run(cell, xs, squares, make=lambda *a, **k: LayerLocal(*a, layers=named, **k), saves={2}, syncs={1: True})
    assert_gradients_equal(found.gradients, expected.gradients)
    whole = run(cell, xs, squares, make=lambda *a, **k: LayerLocal(*a, layers={"": range(5)}, **k))
    assert_gradients_equal(whole.gradients, oracles.bptt(cell, xs, squares))


def test_layers_of_other_cells() -> None:
    listed = rtrl.from_torch([nn.GRUCell(2, 3), nn.LSTMCell(3, 2)])
    assert {n: e.tolist() for n, e in listed.layer_entries().items()} == {"cell.0.": [0, 1, 2], "cell.1.": [3, 4, 5, 6]}
    layered = rtrl.from_torch(nn.LSTM(2, 1, num_layers=2)).layer_entries()
    assert layered["cell.weight_hh_l0"].tolist() == [0, 1] and layered["cell.bias_ih_l1"].tolist() == [2, 3]
    turning = rtrl.Stack([ComplexCell(2, 2), nn.Identity()])
    turning.layers[1].forward = lambda y: y  # type: ignore[method-assign, assignment]
    learner = LayerLocal(turning, B)
    assert learner.cell.layer_entries()["layers.0."].tolist() == list(range(4))
    xs = noise(T, B, 2)
    found, expected = run(turning, xs, complex_loss, make=LayerLocal), oracles.bptt(turning, xs, complex_loss)
    for name, value in expected.items():
        torch.testing.assert_close(found.gradients[name], value, rtol=1e-10, atol=1e-13)


def test_frozen_layers_keep_the_others_right() -> None:
    cell, xs = stack(), noise(T, B, 2)
    learner = LayerLocal(cell, B)
    cell.layers[0].requires_grad_(False)  # type: ignore[index]
    for x in xs[:2]:
        learner.step(x)
        learner.sync()
    cell.layers[0].requires_grad_(True)  # type: ignore[index]
    learner.step(xs[2])
    mask = learner.mask("layers.0.cell.weight_hh")
    assert mask.shape == (5, 27) and bool(mask[:3].all()) and not bool(mask[3:].any())
    assert bool(learner.influence("layers.2.cell.weight_hh")[:, 3:].any())


def test_wrong_layers_are_refused() -> None:
    for layers, message in (({"head": [0]}, "no parameter's name begins with 'head'"), ({"layers.0": [9]}, "0 … 4")):
        with pytest.raises(ConfigError, match=message):
            LayerLocal(stack(), B, layers=layers)
    saved = LayerLocal(stack(), B, layers={"": range(5)})
    for x in noise(2, B, 2):
        saved.step(x)
    saved.sync()
    with pytest.raises(ConfigError, match="other layers"):
        LayerLocal(stack(), B).load_state_dict(saved.state_dict())
    for layers in ([0], {"layers.0.": [7]}):
        with pytest.raises(ConfigError, match="layers"):
            LocalToLayers(layers).reference(Stream(stack(), noise(3, B, 2)), None)  # type: ignore[arg-type]


def test_the_law_tells_it_from_exact_rtrl() -> None:
    streams = [Stream(stack(), noise(T, B, 2), name="layers")]
    for layers, passes in (({"layers.0.": range(3), "layers.2.": range(3, 5)}, True), ({"": range(5)}, False)):
        spec = LearnerSpec(LayerLocal, law=LocalToLayers(layers), streams=streams)
        report = check_learner(spec, checks=["influence"], on_fail="return")
        assert report.passed == passes


@pytest.mark.parametrize("make", [SnAp, DiagonalRTRL, lambda *a: RFLO(*a, leak=0.2)])
def test_entries_that_no_parameter_drives_are_not_held(make: Any) -> None:
    """O(P): two of these cells twice as wide hold twice the entries per parameter, not four times."""
    held = []
    for hidden in (4, 8):
        cell = MinGRU(3, hidden).double()
        learner = make(cell, 1)
        for x in noise(2, 1, 3):
            learner.backward(learner.step(x).sum())
        learner.sync()
        parameters = sum(p.numel() for p in cell.parameters())
        sizes = learner.retained_bytes()
        assert sizes["influence"] == 8 * parameters  # one number each
        held.append((sizes["influence"] + sizes["pattern"]) / parameters)
        again = copy.deepcopy(learner)
        assert_influences_equal(
            {n: again.influence(n) for n, _ in cell.named_parameters()},
            {n: learner.influence(n) for n, _ in cell.named_parameters()},
            may_be_zero=True,
        )
    assert held[0] == held[1] == 12
