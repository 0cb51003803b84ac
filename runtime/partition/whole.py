"""The whole model on every rank again: weights, buffers and optimizer states of all stages.

Each rank trains its own stages and leaves the other parameters as they were. They are brought up to
date when somebody looks: when the model is called, or its state or the optimizer's is saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _broadcast_coalesced
from torch.optim import Optimizer

from graphopt.plan.partition import Stages
from graphopt.runtime.owned_step import OwnedStep
from graphopt.runtime.partition.messages import arriving
from graphopt.runtime.ranks.ranks import Ranks

if TYPE_CHECKING:
    from graphopt.runtime.partition.steps import Steps


def update_model(model: nn.Module, part: Stages, ranks: Ranks) -> None:
    """Give every rank the parameters and buffers of all stages; a collective along ``pp``."""
    _all_here(ranks)
    named: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    done: set[str] = set()
    for stage in part.stages:
        names = [n for n in stage.parameters if n in named and n not in done]
        done.update(names)
        if names:
            values = [named[n].detach() for n in names]
            what = f"the weights of stage {part.stages.index(stage)}"
            with torch.no_grad(), arriving(ranks, what):
                _broadcast_coalesced(ranks.group.inner, values, 256 << 20, stage.rank)


def _all_here(ranks: Ranks) -> None:
    """Name the rank that does not take part, instead of waiting in a collective for ever."""
    ranks.group.agreement.agree("the whole model, which all ranks along pp put together", "")


def whole_state(
    model: nn.Module, optimizer: Optimizer, part: Stages, ranks: Ranks, own: dict[str, Any]
) -> dict[str, Any]:
    """The state of an optimizer with that of all parameters; a collective along ``pp``.

    Args:
        model: whose parameters it renews.
        optimizer: of this rank.
        part: the stages.
        ranks: along ``pp``.
        own: the state that it gives.
    """
    _all_here(ranks)
    mine = set(names_of(part, ranks.group.rank()))
    order = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: n for n, p in model.named_parameters()}
    positions = {names[p]: i for i, p in enumerate(order)}
    states = {n: own["state"][i] for n, i in positions.items() if n in mine and i in own["state"]}
    found: list[Any] = [None] * ranks.size
    sent = {name: _on_cpu(state) for name, state in states.items()}
    with arriving(ranks, "the optimizer's state"):
        dist.all_gather_object(found, sent, group=ranks.group.inner)
    state = {positions[n]: value for some in reversed(found) for n, value in some.items()}
    state.update({positions[n]: value for n, value in states.items()})
    return {**own, "state": dict(sorted(state.items()))}


def forget_others(model: nn.Module, optimizer: Optimizer, part: Stages, rank: int) -> None:
    """Drop optimizer states of other stages, which a loaded whole one has."""
    mine = set(names_of(part, rank))
    for name, parameter in model.named_parameters():
        if name not in mine:
            optimizer.state.pop(parameter, None)


def names_of(part: Stages, rank: int) -> list[str]:
    """What the stages of a rank read, by name."""
    return [name for stage in part.stages if stage.rank == rank for name in stage.parameters]


def joined(state: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """What the methods of all ranks keep, of a name on several ranks the first one's.

    A collective along ``pp``.

    Args:
        state: of this rank.
        ranks: along ``pp``.
    """
    found: list[Any] = [None] * ranks.size
    with arriving(ranks, "the state of other stages"):
        mine = {name: (str(value.device.type), value.cpu()) for name, value in state.items()}
        dist.all_gather_object(found, mine, group=ranks.group.inner)
    whole = {name: value for some in reversed(found) for name, value in some.items()}
    return {
        name: value if kind == "cpu" else value.to(ranks.device)
        for name, (kind, value) in sorted(whole.items())
    }


def _on_cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.cpu() if isinstance(v, Tensor) else v for k, v in state.items()}


def watched(owned: OwnedStep, steps: Steps, settle: Callable[[], None]) -> list[Any]:
    """Have the model brought up to date before its state, or the optimizer's, is read.

    Returns:
        Handles that undo it.
    """
    model, optimizer = owned.model(), owned.optimizer
    part, ranks = steps.part, steps.ranks
    method = weakref.WeakMethod(settle)

    def before(looked_at: object, *_: Any) -> None:
        found = method()
        if found is not None and looked_at in (owned.model(), optimizer):
            found()

    before.of_graphopt = True  # type: ignore[attr-defined]
    handles = [
        model.register_state_dict_pre_hook(before),  # type: ignore[no-untyped-call]
        # Late gradients of old weights must not reach those that are loaded.
        model.register_load_state_dict_pre_hook(before),  # type: ignore[no-untyped-call]
    ]
    if optimizer is None:
        return handles
    return [
        *handles,
        optimizer.register_state_dict_pre_hook(before),
        optimizer.register_state_dict_post_hook(
            lambda optimizer, state: whole_state(owned.model(), optimizer, part, ranks, state)
        ),
        optimizer.register_load_state_dict_post_hook(
            lambda optimizer: forget_others(owned.model(), optimizer, part, ranks.group.rank())
        ),
    ]
