"""One forward and its backward, as the engine and the runtime parts hand it on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from graphopt.plan import Slot
from graphopt.runtime.engine.lone_tangents import may_lack
from graphopt.runtime.engine.tangents import Expected
from graphopt.runtime.engine.written import Before, written_inputs

# Takes a list of arguments, empties it, returns the outputs.
Executable = Callable[[list[Any]], Sequence[Any]]
Compile = Callable[[fx.GraphModule], Executable]

# Where an argument comes from: ``("saved", k)`` the k-th saved value, ``("input", i)`` the i-th
# input of the step (tangents not counted), ``("tangent", j)`` the j-th tangent, ``("own", key)``
# what a part left in `Step.own`.
Source = tuple[str, Any]


@dataclass(frozen=True, eq=False)
class Half:
    """One half of a step.

    Attributes:
        module: its graph; a forward returns its saved values behind what `slots` names.
        slots: what its outputs are, in order.
        sources: where its arguments come from.
    """

    module: fx.GraphModule
    slots: tuple[Slot, ...]
    sources: tuple[Source, ...]

    @property
    def written(self) -> tuple[int, ...]:
        """Which of its arguments its operators write into."""
        return written_inputs(self.module.graph)

    @property
    def tangents(self) -> dict[int, Expected]:
        """The geometry of those of its arguments that are tangents, by position."""
        return {index: Expected.of(node.meta["val"]) for index, node in self._tangent_nodes}

    @property
    def may_lack(self) -> frozenset[int]:
        """Which of the tangents may be ``None``."""
        return frozenset(index for index, node in self._tangent_nodes if may_lack(node))

    @property
    def _tangent_nodes(self) -> list[tuple[int, fx.Node]]:
        placeholders = self.module.graph.find_nodes(op="placeholder")
        places = zip(self.sources, placeholders, strict=True)
        return [(index, node) for (kind, index), node in places if kind == "tangent"]


@dataclass(eq=False)
class Step:
    """One forward and its backward; micro-batches in flight have one each.

    Attributes:
        parameters: of the model, by name; empty where no method has a runtime part.
        examples: leading dimension of the model's first input, at least 1.
        ends: whether it ends an optimizer step; as with DDP the forward decides.
        scale: what runtime parts multiplied the tangents with.
        skipped: whether a part found that it must not be taken: it has no gradients then, and other
            parts leave their state alone.
        weights: parameters by name that the backward reads instead of those that the forward read.
        own: what runtime parts keep between forward and backward, under keys of theirs.
        saved: what the forward saved; emptied when a backward takes it.
        inputs: inputs of the step that the backward reads, by position.
        geometry: size and strides of the outputs that have a tangent, in the order of the tangents;
            empty where they are known beforehand.
        before: what the forward writes in place, as it was, until all of the forward is done.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    examples: int = 1
    ends: bool = True
    scale: float = 1.0
    skipped: bool = False
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    own: dict[str, Any] = field(default_factory=dict)
    saved: list[Tensor] = field(default_factory=list)
    inputs: Mapping[int, Tensor] = field(default_factory=dict)
    geometry: Sequence[tuple[torch.Size, tuple[int, ...]]] = ()
    before: Before | None = None


class Forward(Protocol):
    """Runs the forward half."""

    @property
    def returns(self) -> tuple[Slot, ...]:
        """What its results are; saved values follow."""

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        """Results, then saved values; empties `inputs`."""


class Backward(Protocol):
    """Runs the backward half."""

    @property
    def returns(self) -> tuple[Slot, ...]:
        """What its results are."""

    def __call__(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> list[Any]:
        """Results, ``None`` for gradients that are absent.

        Args:
            step: whose forward has run; what it saved is taken.
            tangents: one per ``TANGENT`` input, ``None`` for zeros.
            absent: names of gradients that no tangent reaches on this rank.
        """


MakeForward = Callable[[Half], Forward]
MakeBackward = Callable[[Half], Backward]
