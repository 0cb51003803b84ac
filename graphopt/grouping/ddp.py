"""A gradient plan as options of stock `DistributedDataParallel`.

DDP closes a bucket once its bytes reach a cap. After the first step it refills its buckets in the
order in which gradients arrived, so caps equal to the sizes of our groups reproduce our plan, as
long as the plan was made for that order. `arrival_order` finds it with one step of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from graphopt.errors import ArgumentError
from graphopt.plan.grouping import Grouping, Ready

MEBIBYTE = 2**20


def bucket_caps(grouping: Grouping) -> list[float]:
    """The ``bucket_cap_mb_list`` with which DDP forms the groups of a plan, in MiB.

    Args:
        grouping: a plan over gradients in DDP's arrival order, with bytes as DDP counts them: those
            of the parameters, whatever a communication hook makes of them.

    Returns:
        One cap per dense group. Sizes are exact, since dividing by a power of two does not round.

    Raises:
        ArgumentError: there is no group, or the plan mixes dtypes or devices in a way that no list
            of caps expresses.
    """
    if not grouping.groups:
        raise ArgumentError("a plan without groups has no bucket caps")
    sizes: dict[str, list[int]] = {}
    for group in grouping.groups:
        # DDP gives every sparse gradient its own bucket, which uses up no cap.
        if not group.kind.startswith("sparse"):
            sizes.setdefault(group.kind, []).append(group.bytes)
    longest = max(map(len, sizes.values()), default=0)
    return [_cap(sizes, index) / MEBIBYTE for index in range(longest)]


def _cap(sizes: Mapping[str, Sequence[int]], index: int) -> int:
    """Bytes at which bucket `index` of every kind closes; DDP reads the list once per kind."""
    closing = {s[index] for s in sizes.values() if index < len(s) - 1}
    # The last bucket of a kind takes what is left: any cap that it does not exceed will do.
    leftover = max((s[index] for s in sizes.values() if index == len(s) - 1), default=0)
    if len(closing) > 1 or (closing and leftover > min(closing)):
        raise ArgumentError(
            "DistributedDataParallel applies one list of caps to every dtype and device, and this "
            f"plan needs different ones for {' and '.join(sizes)}",
            hint="optimize the model in the job instead, which groups each on its own: "
            "graphopt.optimize(model)",
        )
    return min(closing) if closing else leftover


def arrival_order(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[str, ...]:
    """The parameters in the order in which autograd finishes their gradients, which DDP follows.

    Runs one forward and backward of the model, on this rank alone. Buffers such as running
    statistics advance by one step; gradients are left untouched.

    Args:
        model: the model, not wrapped.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        Qualified names; a tied parameter has the first of its names.

    Raises:
        ArgumentError: no parameter gets a gradient, or some do not, for which DDP needs
            ``find_unused_parameters=True`` and then never refills its buckets.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.grad for n, p in trained.items()}
    arrived: list[str] = []
    handles = [
        p.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda _, name=n: arrived.append(name)
        )
        for n, p in trained.items()
    ]
    try:
        for parameter in trained.values():
            parameter.grad = None
        with torch.enable_grad():
            leaves = tree_leaves(model(*args, **kwargs))
            outputs = [o for o in leaves if isinstance(o, torch.Tensor) and o.requires_grad]
            if not outputs:
                raise ArgumentError("no output of the model depends on a trainable parameter")
            torch.autograd.backward(outputs, [torch.ones_like(o) for o in outputs])
    finally:
        for handle in handles:
            handle.remove()
        for name, parameter in trained.items():
            parameter.grad = before[name]
    missing = [name for name in trained if name not in arrived]
    if missing:
        raise ArgumentError(
            f"parameter {missing[0]!r} gets no gradient, so DistributedDataParallel needs "
            "find_unused_parameters=True and then never regroups",
            hint="freeze it with requires_grad_(False), or optimize the model in the job instead: "
            "graphopt.optimize(model)",
        )
    return tuple(arrived)


def in_order(ready: Sequence[Ready], names: Sequence[str]) -> tuple[Ready, ...]:
    """The same gradients in the order of `names`, none of them ready before its predecessor.

    Args:
        ready: gradients with their predicted times.
        names: an order that holds at least all of their names.

    Raises:
        ArgumentError: a gradient is not in `names`.
    """
    position = {name: index for index, name in enumerate(names)}
    unknown = [r.name for r in ready if r.name not in position]
    if unknown:
        raise ArgumentError(f"gradient {unknown[0]!r} did not arrive in an eager step")
    ordered: list[Ready] = []
    latest = 0.0
    for gradient in sorted(ready, key=lambda r: position[r.name]):
        latest = max(latest, gradient.seconds)
        ordered.append(dataclasses.replace(gradient, seconds=latest))
    return tuple(ordered)
