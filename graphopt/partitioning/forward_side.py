"""The forward half of a captured graph as operators and the values between them.

A view, an in-place operator and a piece of a tuple belong to the operator that allocated the
memory, so no cut comes between them. A view of a parameter belongs to whoever reads it, and so does
a number that follows from sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.analysis.cost import tensor_bytes
from graphopt.graph import Graph, module_of, phase_of, value_of
from graphopt.ops.numbers import is_number, number_function
from graphopt.plan import Phase, Role

STORED = frozenset({Role.PARAM, Role.BUFFER, Role.STATE})


def is_size(node: fx.Node) -> bool:
    """Whether a node is a number that follows from the sizes of the step's inputs."""
    if node.op == "placeholder":
        return is_number(value_of(node))
    return bool(number_function(node.target)) and all(map(is_size, node.all_input_nodes))


@dataclass
class Made:
    """A tensor: the node that owns its memory, who made it, and how it is read.

    Attributes:
        owner: the node.
        maker: position of an operator; -1 for an input of the model.
        readers: positions of operators.
        reads: nodes through which it is read, itself or views.
        final: whether it is an output of the model.
    """

    owner: fx.Node
    maker: int
    readers: set[int] = field(default_factory=set)
    reads: set[fx.Node] = field(default_factory=set)
    final: bool = False

    @property
    def bytes(self) -> int:
        """What has to be sent so that all that is read of it can be."""
        whole = tensor_bytes(value_of(self.owner))
        parts = sum(tensor_bytes(value_of(node)) for node in self.reads)
        return min(whole, parts) if parts else whole


class ForwardSide:
    """Operators of the forward half, by position.

    Attributes:
        nodes: of each operator, the first of which computes.
        host: the operator of each forward node; views of inputs and parameters have none.
        made: tensors by the node that owns them.
        stored: qualified names of the parameters, buffers and states that each operator reads.
        groups: operators that must be together.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._storage = graph.get(storage)
        self.nodes: list[list[fx.Node]] = []
        self.host: dict[fx.Node, int] = {}
        self.made: dict[fx.Node, Made] = {}
        self.stored: list[set[str]] = []
        self._slot = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
        self._collect()
        self._connect()
        self._mark_outputs()
        self.groups = self._groups()

    def owner(self, node: fx.Node) -> fx.Node:
        """The node in whose memory a value lies."""
        return self._storage.owner[node]

    def stored_name(self, node: fx.Node) -> str:
        """Name of the parameter, buffer or state that a node is or views; ``""`` for others."""
        slot = self._slot.get(self.owner(node))
        return slot.name if slot is not None and slot.role in STORED else ""

    def role(self, node: fx.Node) -> Role | None:
        """The role of the input that a node is, or views."""
        slot = self._slot.get(self.owner(node))
        return None if slot is None else slot.role

    def ancestors(self) -> list[int]:
        """Mask of all operators that each one depends on, itself included."""
        result = [1 << index for index in range(len(self.nodes))]
        before: list[set[int]] = [set() for _ in self.nodes]
        for made in self.made.values():
            for reader in made.readers:
                if made.maker >= 0:
                    before[reader].add(made.maker)
        for index in range(len(self.nodes)):
            for other in before[index]:
                result[index] |= result[other]
        return result

    def _collect(self) -> None:
        views = self._storage.views
        for node in self.graph.operators:
            if phase_of(node) is not Phase.FORWARD or is_size(node):
                continue  # of sizes: whoever reads it computes it again
            owner = self.owner(node)
            source = node.all_input_nodes[0] if node in views else owner
            if node in views or owner is not node:
                if source in self.host:
                    self.host[node] = self.host[source]
                    self.nodes[self.host[node]].append(node)
                    continue
                if node in views:
                    continue  # of an input: whoever reads it makes the view again
            self.host[node] = len(self.nodes)
            self.nodes.append([node])
            self.stored.append(set())

    def _connect(self) -> None:
        for node, index in self.host.items():
            for source in node.all_input_nodes:
                self._read(source, index)

    def _read(self, source: fx.Node, reader: int) -> None:
        name = self.stored_name(source)
        if name:
            self.stored[reader].add(name)
        elif self.host.get(source) != reader:
            made = self.value(source)
            if made is not None:
                made.readers.add(reader)
                made.reads.add(source)

    def value(self, node: fx.Node) -> Made | None:
        """The tensor that a node is or views; None for parameters and constants."""
        owner = self.owner(node)
        if owner not in self.made:
            if owner in self.host:
                self.made[owner] = Made(owner, self.host[owner])
            elif self.role(owner) is Role.INPUT:
                self.made[owner] = Made(owner, -1)
            else:
                return None
        return self.made[owner]

    def _mark_outputs(self) -> None:
        for slot, node in zip(self.graph.signature.outputs, self.graph.outputs, strict=True):
            if slot.role is Role.OUTPUT and (made := self.value(node)) is not None:
                made.final = True
                made.reads.add(node)

    def _groups(self) -> list[set[int]]:
        """Operators that nothing is gained by separating from others.

        What reads only parameters or constants goes with its first reader. What the outputs do not
        need (a counter of batches, a running mean) goes with what it reads, or with its module.
        """
        readers: list[set[int]] = [set() for _ in self.nodes]
        sources: list[set[int]] = [set() for _ in self.nodes]
        fed = [False] * len(self.nodes)
        needed = [False] * len(self.nodes)
        for made in self.made.values():
            for reader in made.readers:
                fed[reader] = True
                if made.maker >= 0:
                    readers[made.maker].add(reader)
                    sources[reader].add(made.maker)
            if made.final and made.maker >= 0:
                needed[made.maker] = True
        for index in reversed(range(len(self.nodes))):
            needed[index] = needed[index] or any(needed[r] for r in readers[index])
        groups = []
        modules = [module_of(nodes[0]) for nodes in self.nodes]
        for index in range(len(self.nodes)):
            if needed[index] and fed[index]:
                continue
            if needed[index] and readers[index]:
                groups.append({index, min(readers[index])})
            elif not needed[index] and sources[index]:
                groups.append({index, max(sources[index])})
            elif len(self.nodes) > 1 and not needed[index]:
                groups.append({index, _neighbour(index, fed, modules)})
        return groups + self._states()

    def _states(self) -> list[set[int]]:
        """The readers of each buffer or state that changes, with what changes it.

        Otherwise the next micro-batch would read it in one stage before another has written it.
        """
        changed: dict[str, set[int]] = {}
        for slot, node in zip(self.graph.signature.outputs, self.graph.outputs, strict=True):
            if slot.role is Role.MUTATION and node in self.host:
                changed.setdefault(slot.name, set()).add(self.host[node])
        for node, index in self.host.items():
            if (name := self.stored_name(node)) and self.owner(node) is not node:
                changed.setdefault(name, set()).add(index)
        for index, names in enumerate(self.stored):
            for name in names & changed.keys():
                changed[name].add(index)
        return [group for group in changed.values() if len(group) > 1]


def _neighbour(index: int, fed: Sequence[bool], modules: Sequence[str]) -> int:
    """The nearest operator of the same module, if any, that is fed by the model's inputs."""
    return min(
        (i for i in range(len(modules)) if i != index),
        key=lambda i: (modules[i] != modules[index], not fed[i], abs(i - index), -i),
    )
