"""From an exported forward graph, which is differentiable and writes in place, to a problem.

A view belongs to the operator that made what it views. Who writes into memory is in one stage with
who made it, and with all that read it before. What writes into a buffer is with all its readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.aliasing import storage_of
from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.effects import Effect, effect_of
from graphopt.analysis.gradient_order import Device
from graphopt.errors import ArgumentError
from graphopt.graph import module_of, source_of, value_of
from graphopt.partitioning.own_backward import work_of
from graphopt.partitioning.problem import Link, Operator, Parameter, Problem, Value

# These write running statistics, their fourth and fifth operand, although no schema says so.
_NORMS = frozenset({torch.ops.aten.batch_norm.default, torch.ops.aten.instance_norm.default})


class ExportedProblem:
    """The problem of a graph, and which of its nodes belong to which operator.

    Operators that read the same trained parameter are kept together: nothing would add up the
    gradients of its copies.

    Args:
        module: what `torch.export` makes: placeholders, attributes, functions, an output.
        device: for the roofline; by default the assumed one of the kind that the values are on.
        link: what connects the stages.

    Attributes:
        host: the operator of each function by name. Views of inputs and attributes have none.
        tied: trained parameters that several operators read.
        problem: operators, values, parameters.

    Raises:
        ArgumentError: the graph has a graph inside, changes an input, or has no operator.
    """

    def __init__(
        self, module: fx.GraphModule, device: Device | None = None, link: Link | None = None
    ) -> None:
        self._nodes = list(module.graph.nodes)
        self._final = module.graph.output_node().all_input_nodes
        self._memory = storage_of(self._nodes)
        self._state = {n: _attribute(module, n) for n in self._nodes if n.op == "get_attr"}
        first: dict[int, fx.Node] = {}
        self._same = {n: first.setdefault(id(state), n) for n, state in self._state.items()}
        self.host = dict(self._hosts())
        self._place = {name: i for i, name in enumerate(dict.fromkeys(self.host.values()))}
        self._readers = self._reads()
        self._check()
        self._together: list[set[str]] = []
        self.tied = self._tie()
        self._join_writers()
        self._join_numbers()
        self._join_useless()
        self._work = work_of(module, device)
        self.problem = Problem(
            operators=tuple(self._operators()),
            values=(*self._values(), *self._streams()),
            parameters=tuple(self._parameters()),
            together=tuple(map(frozenset, self._together)),
            link=link or Link(),
            times="roofline",
        )

    def stages(self, assignment: Mapping[str, int]) -> dict[fx.Node, int]:
        """The stage of each node from the stage of each operator."""
        return {node: assignment[name] for node, name in self.host.items()}

    # -- who belongs to whom -----------------------------------------------------------------------

    def _hosts(self) -> Iterator[tuple[fx.Node, str]]:
        found: dict[fx.Node, str] = {}
        for node in self._nodes:
            if node.op != "call_function":
                continue
            if node not in self._memory.views:
                found[node] = node.name
            elif node.all_input_nodes[0] in found:
                found[node] = found[node.all_input_nodes[0]]
            else:
                continue
            yield node, found[node]

    def _owner(self, node: fx.Node) -> fx.Node:
        owner = self._memory.owner[node]
        return self._same.get(owner, owner)

    def _reads(self) -> dict[fx.Node, dict[str, set[fx.Node]]]:
        """By the owner of memory: which other operators read it, through which views."""
        found: dict[fx.Node, dict[str, set[fx.Node]]] = {}
        for node, name in self.host.items():
            for operand in node.all_input_nodes:
                if self.host.get(operand) != name:
                    readers = found.setdefault(self._owner(operand), {})
                    readers.setdefault(name, set()).add(operand)
        return found

    def _writers(self) -> dict[fx.Node, list[fx.Node]]:
        found: dict[fx.Node, list[fx.Node]] = {}
        for node in self.host:
            for operand in _written(node):
                owner = self._owner(operand)
                found.setdefault(owner, []).append(node)
                while owner.target is torch.ops.aten.dropout.default and not owner.args[2]:
                    owner = self._owner(owner.all_input_nodes[0])  # it returns what it was given
                    found.setdefault(owner, []).append(node)
        return found

    def _check(self) -> None:
        if not self.host:
            raise ArgumentError("the graph has no operator to cut at", where="graph")
        for node, state in self._state.items():
            if isinstance(state, nn.Module):
                user = next(iter(node.users), node)
                raise ArgumentError(
                    f"{user.name!r} runs a graph inside of the graph, which PyTorch's pipeline "
                    "does not split",
                    where=source_of(user) or user.name,
                    hint="leave out autocast, no_grad and control flow inside of forward",
                )
        for owner, writers in self._writers().items():
            if owner.op == "placeholder":
                raise ArgumentError(
                    f"input {owner.name!r} is changed in place, and stages only have copies of it",
                    where=source_of(writers[0]) or writers[0].name,
                    hint="clone the input first",
                )

    # -- who has to be together --------------------------------------------------------------------

    def _tie(self) -> tuple[str, ...]:
        tied = {
            str(owner.target): set(readers)
            for owner, readers in self._readers.items()
            if getattr(self._state.get(owner), "requires_grad", False) and len(readers) > 1
        }
        self._together += tied.values()
        return tuple(tied)

    def _join_writers(self) -> None:
        for owner, writers in self._writers().items():
            group = {self.host[w] for w in writers}
            readers = self._readers.get(owner, {})
            if owner in self.host:
                group.add(self.host[owner])
                last = max(self._place[name] for name in group)
                group |= {name for name in readers if self._place[name] < last}
            else:
                group |= readers.keys()
            self._together.append(group)

    def _join_numbers(self) -> None:
        """Only tensors are sent."""
        for owner, readers in self._readers.items():
            if owner in self.host and not isinstance(value_of(owner), Tensor):
                self._together.append({self.host[owner], *readers})

    def _join_useless(self) -> None:
        """What nothing depends on, or what depends on nothing, is where its neighbours are."""
        names = list(self._place)
        sources: dict[str, set[str]] = {name: set() for name in names}
        users: dict[str, set[str]] = {name: set() for name in names}
        fed: set[str] = set()
        for owner, readers in self._readers.items():
            if owner.op == "placeholder":
                fed |= readers.keys()
            for reader in readers if owner in self.host else ():
                fed.add(reader)
                sources[reader].add(self.host[owner])
                users[self.host[owner]].add(reader)
        needed = {self.host[n] for n in self._final if n in self.host}
        for name in reversed(names):
            if not users[name].isdisjoint(needed):
                needed.add(name)
        for index, name in enumerate(names):
            if name not in needed:
                before = max(sources[name], key=self._place.__getitem__, default="")
                behind = (n for n in (*names[index:], *reversed(names[:index])) if n in needed)
                self._together.append({name, before or next(behind, name)})
            elif name not in fed and users[name]:
                self._together.append({name, min(users[name], key=self._place.__getitem__)})

    # -- what it costs -----------------------------------------------------------------------------

    def _operators(self) -> Iterator[Operator]:
        nodes: dict[str, list[fx.Node]] = {}
        for node, name in self.host.items():
            nodes.setdefault(name, []).append(node)
        read: dict[str, set[str]] = {name: set() for name in nodes}
        for owner, readers in self._readers.items():
            for name in readers if owner in self._state else ():
                read[name].add(str(owner.target))
        for name, own in nodes.items():
            works = [self._work[n] for n in own]
            yield Operator(
                name=name,
                forward=sum(w.forward for w in works),
                input_grad=sum(w.input_grad for w in works),
                weight_grad=sum(w.weight_grad for w in works),
                parameters=tuple(sorted(read[name])),
                saved=sum(w.own_bytes for w in works),
                module=module_of(own[0]),
                layer=any(w.weight_grad for w in works),
            )

    def _parameters(self) -> Iterator[Parameter]:
        for node in dict.fromkeys(self._same.values()):
            state = self._state[node]
            if node in self._readers and isinstance(state, Tensor):
                yield Parameter(str(node.target), tensor_bytes(state), state.requires_grad)

    def _values(self) -> Iterator[Value]:
        savers: dict[fx.Node, set[str]] = {}
        for node, name in self.host.items():
            for kept in self._work[node].saved:
                savers.setdefault(self._owner(kept), set()).add(name)
        returned = {self._owner(n): n for n in self._final}
        owners = dict.fromkeys((*self._readers, *returned, *savers))
        for owner in (o for o in owners if o not in self._state):
            readers = self._readers.get(owner, {})
            through = set().union(*readers.values()) | {n for n in (returned.get(owner),) if n}
            whole = tensor_bytes(value_of(owner))
            size = min(whole, sum(tensor_bytes(value_of(n)) for n in through) or whole)
            yield Value(
                name=owner.name,
                maker=self.host.get(owner, ""),
                readers=tuple(sorted(readers, key=self._place.__getitem__)),
                bytes=size,
                # torch sends one back for every floating-point value, those of inputs included.
                gradient=size if _is_real(owner) else 0,
                saved_by=tuple(sorted(savers.get(owner, ()))),
                final=owner in returned,
            )

    def _streams(self) -> Iterator[Value]:
        """Operators that draw numbers, and unknown ones, keep their order: nothing is sent."""
        ordered = (Effect.RANDOM, Effect.OPAQUE)
        names = [self.host[n] for n in self.host if effect_of(n) in ordered]
        for first, second in pairwise(dict.fromkeys(names)):
            yield Value(f"order behind {first}", first, (second,), 0)


def _written(node: fx.Node) -> list[fx.Node]:
    """The operands that an operator changes."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    values: list[object] = list(node.args[3:5]) if target in _NORMS else []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[position : position + 1]
            values += given or [node.kwargs.get(argument.name)]
    flat = (v for value in values for v in (value if isinstance(value, list) else [value]))
    return [v for v in flat if isinstance(v, fx.Node)]


def _is_real(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _attribute(module: nn.Module, node: fx.Node) -> object:
    found: object = module
    for name in str(node.target).split("."):
        found = getattr(found, name)
    return found
