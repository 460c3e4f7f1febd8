"""Steps of a cell that knows its derivatives (``rtrl.cells.analytic``), as the engine takes those of any cell."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from rtrl._engine import checks
from rtrl._engine.linearization import LinearTap
from rtrl._engine.output_jacobian import UnitwiseOutputJacobian
from rtrl._engine.taps import Tap
from rtrl._utils import pytrees
from rtrl._utils.functional_call import functional_call
from rtrl.cells.analytic import AnalyticStep
from rtrl.errors import CellError


def taps_of(form: AnalyticStep, names: Mapping[int, str]) -> list[LinearTap]:
    """The linear maps of a step, as taps with their responses.

    Args:
        names: id of a parameter → its name; others are not trained.
    """
    found: list[LinearTap] = []
    responses: dict[int, UnitwiseOutputJacobian] = {}
    for tap in form.taps:
        response = responses.setdefault(id(tap.response), UnitwiseOutputJacobian(tap.response))
        shape = (1, 1, tap.weight.shape[0])
        inputs = tap.inputs.detach()[:, None, None]
        for parameter, right in ((tap.weight, inputs), (tap.bias, None)):
            if parameter is not None and id(parameter) in names:
                use = Tap(names[id(parameter)], None, right, form.h_next, shape)
                found.append(LinearTap(use, response, None))
    return found


def jacobian(form: AnalyticStep, places: Tensor | slice) -> Tensor:
    """``∂h'/∂h`` of the samples ``places`` written out: (E, S·U, S·U).

    Cost: ``E·S·G·U²`` multiplications a tap of the state.
    """
    parts = form.h_next.flatten(1).shape[1] // form.h_next.shape[-1]
    u = form.h_next.shape[-1]
    weights = [(tap, tap.weight.detach().view(-1, u, u)) for tap in form.taps if tap.part is not None]
    direct = None if form.direct is None else form.direct[places]
    count = form.h_next[places].shape[0]
    whole = form.h_next.new_empty(count, parts, u, parts, u)
    for part in range(parts):
        block = whole[:, :, :, part]  # (E, S, U, U)
        empty = True
        for tap, weight in weights:
            if tap.part != part:
                continue
            response = tap.response[places]
            for g in range(weight.shape[0]):
                gate = response[:, :, g, :, None]
                if empty:
                    torch.mul(gate, weight[g], out=block)
                else:
                    block.addcmul_(gate, weight[g])
                empty = False
        if empty:
            block.zero_()
        if direct is not None:
            block.diagonal(dim1=2, dim2=3).add_(direct[:, :, part])
    return whole.view(count, parts * u, parts * u)


def check_analytic_step(cell: nn.Module, parameters: Mapping[str, nn.Parameter], x: Any, h: Tensor, step: int) -> None:
    """Hold a cell's own derivatives against autograd at a generic point, along a random direction.

    Args:
        parameters: name → trainable parameter. x, h: N samples.

    Raises:
        CellError: they disagree.

    Cost: two forward passes and two backward passes.
    """
    generator = torch.Generator().manual_seed(1)  # of its own: the user's random numbers stay as they are

    def drawn(shape: torch.Size, like: Tensor) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(like)

    def near(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value.detach()
        return value.detach() + 0.1 * drawn(value.shape, value) * (1 + value.detach().abs())

    theta = {name: near(p).requires_grad_(name in parameters) for name, p in cell.named_parameters()}
    h = near(h).requires_grad_()
    y, after = functional_call(cell, theta, (x, h))[:2]
    form = functional_call(_Linearize(cell), {f"cell.{name}": p for name, p in theta.items()}, (x, h))
    if form is None:
        return
    outputs, own_outputs = ([t for t in pytrees.tensors(tree) if t.is_floating_point()] for tree in (y, form.y))
    pairs = [("the next state", form.h_next, after), *(("y", a, b) for a, b in zip(own_outputs, outputs, strict=False))]
    for what, own, wanted in pairs:
        if not checks.nearly_equal(own.detach(), wanted.detach()):
            raise CellError(f"step {step}: analytic_step computes another value of {what} than the cell itself")

    weights = [drawn(t.shape, t) for t in (after, *outputs)]
    names = [name for name in theta if name in parameters]
    targets = [h, *(theta[name] for name in names)]
    wanted_grads = torch.autograd.grad([after, *outputs], targets, weights, allow_unused=True)
    ends = [t for t in own_outputs if t.requires_grad]
    if ends:
        own_weights = [w for w, t in zip(weights[1:], own_outputs, strict=False) if t.requires_grad]
        pulled, *rest = torch.autograd.grad(ends, [form.h_next, *targets], own_weights, allow_unused=True)
    else:
        pulled, rest = None, []
    adjoint = weights[0] if pulled is None else weights[0] + pulled
    found = [torch.zeros_like(t) if grad is None else grad for t, grad in zip_longest(targets, rest)]
    places = {id(theta[name]): i + 1 for i, name in enumerate(names)}
    with torch.no_grad():
        _pull(form, adjoint.flatten(1), found, places)
    for name, own, wanted in zip(["the state", *map(repr, names)], found, wanted_grads, strict=True):
        expected = torch.zeros_like(own) if wanted is None else wanted
        if not checks.nearly_equal(own.flatten()[None], expected.flatten()[None]):
            raise CellError(
                f"step {step}: analytic_step gives another derivative with respect to {name} than autograd does"
            )


def _pull(form: AnalyticStep, adjoint: Tensor, found: list[Tensor], places: Mapping[int, int]) -> None:
    """Pull an adjoint (N, S·U) at the next state back: to the state, found[0], and the parameters at their places."""
    n, u = adjoint.shape[0], form.h_next.shape[-1]
    back = torch.zeros(n, adjoint.shape[1] // u, u, dtype=adjoint.dtype, device=adjoint.device)
    if form.direct is not None:
        back += torch.einsum("nsi,nsti->nti", adjoint.view(n, -1, u), form.direct)
    for tap in form.taps:
        left = UnitwiseOutputJacobian(tap.response).left(adjoint.unsqueeze(1), slice(None)).reshape(n, -1)
        if tap.part is not None:
            back[:, tap.part] += left @ tap.weight
        if id(tap.weight) in places:
            found[places[id(tap.weight)]] += left.T @ tap.inputs
        if tap.bias is not None and id(tap.bias) in places:
            found[places[id(tap.bias)]] += left.sum(dim=0)
    found[0] += back.view(found[0].shape)


class _Linearize(nn.Module):
    """A cell's ``analytic_step`` as a forward pass, so that it can be run with other parameters."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Any, h: Tensor) -> AnalyticStep | None:
        form: AnalyticStep | None = self.cell.analytic_step(x, h)  # type: ignore[operator]
        return form
