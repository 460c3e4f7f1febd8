"""The engine's own derivatives of a block, contracted with one cotangent of the last state, for its audit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rtrl._engine.block import BlockResult
from rtrl._engine.immediate import InfluenceWriter
from rtrl._engine.unrolled import PulledBlock
from rtrl._influence.store import ParameterInfluence
from rtrl._influence.transition import Transition
from rtrl._utils import index_sets


def pull_back_result(
    result: BlockResult, cotangent: Tensor, parameters: Mapping[str, Tensor], sliced: Sequence[str]
) -> tuple[PulledBlock, dict[str, Tensor]]:
    """Pull a cotangent w (B, H) of the last state and the gradients of the losses back through a block's result.

    Returns:
        All of it; and by parameter the share of the cotangent alone, ``w Σ_τ C_τ B_τ``.

    Cost: that of one row of the immediate influence.
    """
    transition = result.transition
    slots = cotangent.unflatten(1, (transition.n, transition.width))
    row = index_sets.gather(slots, transition.rows).flatten(1).unsqueeze(1)  # (B, 1, u·width)
    one = cotangent.new_ones(len(cotangent), 1, 1)
    scalar = Transition(None, None, one, one[:, 0], 1, 1)
    influences, rows = {}, {}
    for name, parameter in parameters.items():
        influences[name] = ParameterInfluence(parameter.shape, name in sliced, len(cotangent), 1, cotangent)
        rows[name] = influences[name].allocate(result.keys[name], 0)
    writer = InfluenceWriter(influences, rows, scalar)
    projected: dict[int, Tensor] = {}  # the linear maps of one group share their cotangents
    for term in result.immediate:
        if id(term.cotangents) not in projected:
            states, adjoint = term.cotangents[:, :, :-1], term.cotangents[:, :, -1:]
            projected[id(term.cotangents)] = torch.cat([row.unsqueeze(1) @ states, adjoint], dim=2)
        replace(term, cotangents=projected[id(term.cotangents)]).add_to(writer)
    for name, whole in result.untapped.items():
        sample = (result.keys[name] // influences[name].slices).to(row.device)
        writer.add(name, row[sample] @ whole)
    immediate = {
        name: influences[name].to_dense().sum(dim=(0, 1)).reshape(parameter.shape)
        for name, parameter in parameters.items()
    }
    gradients = {name: value + result.gradient.get(name, 0.0) for name, value in immediate.items()}
    if result.restarted is not None:
        cotangent = cotangent.masked_fill(result.restarted[:, None], 0.0)
    return PulledBlock(transition.pull_back(cotangent), gradients), immediate
