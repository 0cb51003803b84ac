"""How the losses of micro-batches make the loss of their batch, found out once per division."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from graphopt.runtime.owned_step import OwnedStep
from graphopt.runtime.partition.batch import MicroBatch
from graphopt.runtime.partition.engine import PipelineEngine, Visit
from graphopt.runtime.partition.loss import reduction_of


class Rules:
    """Finds out the rule of each division of a batch.

    The loss is called with made-up outputs. All ranks call it with the same ones, so all of them
    find the same rule, or refuse the same loss, before anything is sent.

    Args:
        owned: the model and its loss.
        visiting: within, calls of the model do what it is given.
    """

    def __init__(
        self, owned: OwnedStep, visiting: Callable[[Visit], AbstractContextManager[None]]
    ) -> None:
        self._owned, self._visiting = owned, visiting
        self._known: dict[tuple[int, ...], str] = {}

    def of(self, batches: Sequence[MicroBatch], batch: Sequence[Any]) -> str:
        """``"mean"`` or ``"sum"``.

        Args:
            batches: the micro-batches.
            batch: what they were cut from, with the target behind.

        Raises:
            ArgumentError: neither.
        """
        key = tuple(micro.examples for micro in batches)
        if key not in self._known:
            self._known[key] = self._found(batches, batch)
        return self._known[key]

    def _found(self, batches: Sequence[MicroBatch], batch: Sequence[Any]) -> str:
        owned, generator, outputs = self._owned, torch.Generator().manual_seed(0), []
        visited = False

        def made(engine: PipelineEngine, inputs: Sequence[Any]) -> Sequence[Any]:
            nonlocal visited
            visited = True
            return engine.made_up(engine.forms.sizes(inputs), generator)

        for micro in batches:
            kind = owned.kind_of(micro.args, micro.kwargs)
            with owned.untouched(micro.args, micro.kwargs), self._visiting(made):
                outputs.append(kind.call(owned.model(), *micro.args, **micro.kwargs))
        target = None if owned.loss is None else batch[-1]
        targets = [micro.target for micro in batches]
        # Without stages it is the model that has computed, and its backward reaches parameters.
        return reduction_of(owned.loss, outputs, targets, target, made_up=visited)
