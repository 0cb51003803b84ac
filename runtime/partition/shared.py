"""Gradients of parameters that several stages use: each adds its share, all get the sum.

A function with a backward of its own may read a parameter in a stage that is not the one which
computes its gradient, and so may what is recomputed. All of them get it, and renew their copies.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt.plan import Role
from graphopt.runtime.partition.engine import PipelineEngine
from graphopt.runtime.partition.messages import arriving
from graphopt.runtime.ranks.ranks import Ranks


def add_up(
    engine: PipelineEngine, ranks: Ranks, shares: Mapping[str, Tensor], mine: set[str]
) -> dict[str, Tensor]:
    """The gradients of shared parameters; a collective along ``pp``, once per step.

    Args:
        engine: knows how shares are added up.
        ranks: along ``pp``.
        shares: those of this rank's stages.
        mine: parameters that this rank's stages use.
    """
    sums = engine.sums
    assert sums is not None
    nodes = sums.module.graph.find_nodes(op="placeholder")
    values = []
    for port, node in zip(sums.inputs, nodes, strict=True):
        form = node.meta["val"]
        own = shares.get(port.name)
        value = torch.zeros(tuple(form.shape), dtype=form.dtype, device=ranks.device)
        values.append(value if own is None else value.copy_(own))
    # Exactly one rank has each share, so adding zeros gives everybody its bits.
    with arriving(ranks, "the gradients of parameters that several stages use"):
        for work in [ranks.group.inner.allreduce([value]) for value in values]:
            work.wait()
    found = sums.module(*values)
    slots = engine.plan.signature.outputs
    gradients = {}
    for port, value in zip(sums.outputs, found, strict=True):
        slot = slots[port.position]
        if slot.role is Role.GRAD and slot.name in mine:
            gradients[slot.name] = value
    return gradients


def spread(
    engine: PipelineEngine,
    ranks: Ranks,
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    mine: set[str],
) -> dict[str, Tensor]:
    """Gradients that other ranks compute, of parameters that this one reads.

    A collective along ``pp``, once per step.

    Args:
        engine: knows which these are.
        ranks: along ``pp``.
        gradients: of this rank's stages.
        parameters: of the model, by name.
        mine: parameters that this rank's stages use.
    """
    values = {
        name: gradients[name].clone() if name in gradients else torch.zeros_like(parameters[name])
        for name in engine.spread
    }
    with arriving(ranks, "the gradients of parameters that other stages read"):
        for work in [ranks.group.inner.allreduce([value]) for value in values.values()]:
            work.wait()
    return {name: value for name, value in values.items() if name in mine}
