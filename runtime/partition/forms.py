"""How the tensors of a call lie in memory that another rank computes: from the sizes of its inputs.

All ranks along ``pp`` are given the same batch, so each knows the sizes of every message, and none
has to be sent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import ArgumentError
from graphopt.partitioning.split import Half, Kind, Split
from graphopt.plan import Plan, Role, Slot
from graphopt.plan.partition import Stages
from graphopt.runtime.partition.messages import Form

Sizes = tuple[int, ...]

# Of so many sizes of calls the forms are kept.
_KEPT = 64


@dataclass(frozen=True)
class Forms:
    """What is known of the tensors of one size of call.

    Attributes:
        outputs: of the model, by name: zeros without memory.
        forward: what crosses each cut with the activations: names and forms.
        backward: what comes back.
    """

    outputs: Mapping[str, Tensor]
    forward: tuple[tuple[tuple[str, ...], tuple[Form, ...]], ...]
    backward: tuple[tuple[tuple[str, ...], tuple[Form, ...]], ...]


class Sized:
    """The forms of one kind of call, for any of its sizes.

    Args:
        module: its graph.
        plan: with its signature.
        part: the stages.
        halves: the graph in stages.

    Raises:
        ArgumentError: what crosses a cut, or an output, is no tensor of known size.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, part: Stages, halves: Split) -> None:
        placeholders = module.graph.find_nodes(op="placeholder")
        inputs = [
            (slot, node.meta.get("val"))
            for slot, node in zip(plan.signature.inputs, placeholders, strict=True)
            if slot.role is not Role.TANGENT
        ]
        self._places = tuple(i for i, (slot, _) in enumerate(inputs) if slot.role is Role.SIZE)
        values: list[Any] = [inputs[i][1] for i in self._places]
        self._symbols = [v.node.expr if isinstance(v, torch.SymInt) else v for v in values]
        self._outputs = {s.name: self._output(s, v) for s, v in _outputs(module, plan)}
        cuts = range(len(part.stages) - 1)
        self._forward = [self._crossing(halves.forward[s], part, s, s + 1) for s in cuts]
        self._backward = [self._crossing(halves.backward[s + 1], part, s + 1, s) for s in cuts]
        self._known: dict[Sizes, Forms] = {}

    @property
    def vary(self) -> bool:
        """Whether calls of this kind have several sizes."""
        return bool(self._places)

    def sizes(self, inputs: Sequence[Any]) -> Sizes:
        """Those of a call, from its flat inputs."""
        return tuple(inputs[i] for i in self._places)

    def at(self, sizes: Sizes) -> Forms:
        """The forms of a call of these sizes."""
        if sizes not in self._known:
            if len(self._known) >= _KEPT:
                del self._known[next(iter(self._known))]
            self._known[sizes] = self._made(sizes)
        return self._known[sizes]

    def _made(self, sizes: Sizes) -> Forms:
        given = dict(zip(self._symbols, sizes, strict=True))

        def number(size: Any) -> int:
            return int(size.node.expr.xreplace(given)) if isinstance(size, torch.SymInt) else size

        def shape(value: Tensor) -> tuple[int, ...]:
            return tuple(map(number, value.shape))

        def form(value: Tensor) -> Form:
            stride = tuple(map(number, value.stride()))
            like = torch.empty_strided(shape(value), stride, dtype=value.dtype, device="meta")
            return Form.of(like)

        def crossing(
            found: tuple[tuple[str, ...], list[Tensor]],
        ) -> tuple[tuple[str, ...], tuple[Form, ...]]:
            names, values = found
            return names, tuple(map(form, values))

        return Forms(
            {
                name: torch.zeros((), dtype=v.dtype, device=v.device).expand(shape(v))
                for name, v in self._outputs.items()
            },
            tuple(map(crossing, self._forward)),
            tuple(map(crossing, self._backward)),
        )

    def _follows(self, value: object) -> bool:
        """Whether it is a tensor whose sizes follow from those of the inputs."""
        if not isinstance(value, Tensor):
            return False
        sizes: tuple[Any, ...] = tuple(value.shape)
        symbols = {s for size in sizes if isinstance(size, torch.SymInt) for s in _of(size)}
        return symbols <= set(self._symbols)

    def _output(self, slot: Slot, value: Any) -> Tensor:
        if not self._follows(value):
            raise ArgumentError(
                f"output {slot.name} of the model is a number or has a size that depends on data, "
                "which stages that do not compute it cannot know",
                where="forward",
                hint="return tensors of sizes that follow from those of the inputs",
            )
        found: Tensor = value
        return found

    def _crossing(
        self, half: Half, part: Stages, made: int, read: int
    ) -> tuple[tuple[str, ...], list[Tensor]]:
        """Names and recorded values of what a half sends."""
        returned: Any = half.module.graph.output_node().args[0]
        names, values = [], []
        for port, node in zip(half.outputs, returned, strict=True):
            if port.kind is not Kind.SENT:
                continue
            value = node.meta["val"]
            if not self._follows(value):
                raise ArgumentError(
                    f"{port.name!r} goes from stage {made} to stage {read}, and its size depends "
                    "on data",
                    where=f"stage {made}: {', '.join(part.stages[made].modules)}",
                    hint="ask for other stages=, or keep what has such sizes in one module",
                )
            names.append(port.name)
            values.append(value)
        return tuple(names), values


def _of(size: torch.SymInt) -> set[Any]:
    return set(size.node.expr.free_symbols)


def _outputs(module: fx.GraphModule, plan: Plan) -> list[tuple[Slot, Any]]:
    nodes: Any = module.graph.output_node().args[0]
    values = (n.meta.get("val") if isinstance(n, fx.Node) else None for n in nodes)
    found = zip(plan.signature.outputs, values, strict=True)
    return [(slot, value) for slot, value in found if slot.role is Role.OUTPUT]
