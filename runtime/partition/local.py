"""A step of a pipeline on one process: its micro-batches one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.owned_step import OwnedStep
from graphopt.runtime.partition.batch import MicroBatch
from graphopt.runtime.partition.loss import MEAN, loss_of
from graphopt.runtime.session import Session


def accumulated(
    owned: OwnedStep, session: Session, batches: Sequence[MicroBatch], rule: str
) -> Tensor:
    """The loss of a batch, whose gradients were accumulated, and used if there is an optimizer."""
    model, optimizer = owned.model(), owned.optimizer
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    total = sum(micro.examples for micro in batches)
    losses = []
    for number, micro in enumerate(batches):
        last = number == len(batches) - 1
        with nullcontext() if last else session.no_sync():
            output = model(*micro.args, **micro.kwargs)
            factor = micro.examples / total if rule == MEAN else 1.0
            loss = loss_of(owned.loss, output, micro.target) * factor
            if not loss.requires_grad:
                raise ArgumentError(
                    "the loss has no gradient",
                    where="loss",
                    hint="let parameters require gradients, and compute the loss from the output, "
                    "without detach() or item()",
                )
            with torch._C._DisableAutocast():
                loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach().to(torch.float32).reshape(()))
    if optimizer is not None:
        optimizer.step()
    return torch.stack(losses).sum()
