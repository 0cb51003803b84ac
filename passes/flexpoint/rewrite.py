"""Round every flex value of a step to its exponent, and save integers for the backward.

The forward copies the exponents once; all of the step reads that copy, since the state may be
renewed before its backward runs. A value that the backward reads is saved as its mantissas, and the
backward makes its float32 values itself. Parameters and inputs are alive anyway, so the backward
rounds them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

import graphopt.ops.flex  # noqa: F401  (defines the operators)
from graphopt.graph import KEPT_META, Graph, phase_of, value_of
from graphopt.ops.flex import UNKNOWN
from graphopt.passes.flexpoint import rules
from graphopt.passes.flexpoint.values import Values
from graphopt.plan import Phase, Role
from graphopt.rewrite import emit

aten = torch.ops.aten
ops = torch.ops.graphopt

_RECOMPUTED = (CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE)
_UNTOUCHED = frozenset({Role.AUX, Role.MUTATION})
_USED = 3  # the place of the exponent among statistics

# A reader in the backward, the value of the forward that it reads, and what that is a view of.
_LateRead = tuple[fx.Node, fx.Node, fx.Node]


@dataclass(frozen=True)
class State:
    """Inputs of the graph that belong to the method.

    Attributes:
        exponents: int32 [n]; ``None`` where every exponent follows from the tensor itself.
        seed: int64 [2], where rounding is stochastic.
    """

    exponents: fx.Node | None = None
    seed: fx.Node | None = None


def quantise(graph: Graph, values: Values, mantissa: int, state: State) -> dict[str, fx.Node]:
    """Rewrite `graph`; returns the statistics of its halves, stacked, by their names.

    Without exponents in the state there are none.
    """
    rewriter = _Rewriter(graph, values, mantissa, state)
    return rewriter.run()


@dataclass
class _Rewriter:
    """One graph on its way.

    Attributes:
        rounded: of each root, what is read in its place.
        statistics: of each root.
        mantissas: of each value that is saved.
        late: of each flex value of the forward, what the backward reads in its place.
    """

    graph: Graph
    values: Values
    mantissa: int
    state: State
    rounded: dict[fx.Node, fx.Node] = field(default_factory=dict)
    statistics: dict[fx.Node, fx.Node] = field(default_factory=dict)
    mantissas: dict[fx.Node, fx.Node] = field(default_factory=dict)
    late: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def run(self) -> dict[str, fx.Node]:
        graph, values = self.graph, self.values
        self.row = {root: i for i, root in enumerate(values.roots)}
        self.slots = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
        self.mutated = set(graph.signature.names(Role.MUTATION))
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        first = {phase: self._first(phase) for phase in Phase}
        reads = self._late_reads()
        self.saved = {
            base for _, _, base in reads if not self._alive(base) and not _is_recomputed(base)
        }
        forward, backward = values.roots[: values.forward], values.roots[values.forward :]

        held = self._held(first[Phase.FORWARD])
        self._round_all(forward, held, first[Phase.FORWARD], Phase.FORWARD)
        found = {"forward": self._stacked(forward)} if self.state.exponents is not None else {}
        if backward or reads:
            used = self._used(found["forward"], first[Phase.BACKWARD]) if reads else {}
            self._round_all(backward, held, first[Phase.BACKWARD], Phase.BACKWARD)
            found |= {"backward": self._stacked(backward)} if backward else {}
            self._read_late(reads, used)
        graph.set_outputs(
            {
                slot: node if slot.role in _UNTOUCHED else self.rounded.get(node, node)
                for slot, node in outputs.items()
            }
        )
        return found

    # -- what is where -----------------------------------------------------------------------------

    def _first(self, phase: Phase) -> fx.Node:
        own = (n for n in self.graph.operators if phase_of(n) is phase)
        return next(own, next(iter(self.graph.operators), self.graph.output))

    def _late_reads(self) -> list[_LateRead]:
        """What the backward reads of the forward's flex values, in graph order."""
        forward = set(self.values.roots[: self.values.forward])
        return [
            (reader, value, self._base(value))
            for reader in self.graph.operators
            if phase_of(reader) is Phase.BACKWARD
            for value in reader.all_input_nodes
            if self.values.root_of.get(value) in forward
            and (value.op == "placeholder" or phase_of(value) is Phase.FORWARD)
            and not rules.reads_float(reader, value)
        ]

    def _base(self, value: fx.Node) -> fx.Node:
        """What a flex value is a view of; itself if it is none."""
        while value not in self.row and value in self.values.views:
            source = rules.moved_operand(value, self.values.views)
            if source is None or not _is_view(value, self.values.views):
                break
            value = source
        return value

    def _alive(self, node: fx.Node) -> bool:
        """Whether the backward can read a value at no cost of memory."""
        slot = self.slots.get(node)
        mine = slot is not None and slot.role in (Role.PARAM, Role.INPUT)
        return mine and slot is not None and slot.name not in self.mutated

    # -- exponents ---------------------------------------------------------------------------------

    def _held(self, place: fx.Node) -> list[fx.Node | None]:
        """Copies of exponents and seed that live as long as the step."""
        copies: list[fx.Node | None] = []
        for node in (self.state.exponents, self.state.seed):
            if node is None:
                copies.append(None)
                continue
            with self.graph.fx.inserting_before(place):
                # Two rows, because backends take a mere copy of an input for needless.
                rows = [node, node]
                copy = emit(self.graph, aten.stack.default, rows, like=_plain(node, Phase.FORWARD))
            copy.meta["recompute"] = CheckpointPolicy.MUST_SAVE
            copies.append(copy)
        return copies

    def _used(self, stacked: fx.Node, place: fx.Node) -> Mapping[fx.Node, fx.Node]:
        """The exponents that the forward's tensors were rounded to, in the backward."""
        like = _plain(stacked, Phase.BACKWARD)
        with self.graph.fx.inserting_before(place):
            column = emit(self.graph, aten.select.int, stacked, 1, _USED, like=like)
            parts = emit(self.graph, aten.unbind.int, column, like=like)
        return _Items(self, parts, place)

    def _round_all(
        self,
        roots: Sequence[fx.Node],
        held: Sequence[fx.Node | None],
        place: fx.Node,
        phase: Phase,
    ) -> None:
        """Round tensors of one half, whose exponents and seed it reads at its beginning."""
        exponents, seed = held
        like = _plain(self.values.roots[0], phase)
        found: dict[fx.Node, fx.Node] = {}
        with self.graph.fx.inserting_before(place):
            self.seed = seed and emit(self.graph, aten.select.int, seed, 0, 0, like=like)
            if exponents is not None and roots:
                own = emit(self.graph, aten.select.int, exponents, 0, 0, like=like)
                parts = emit(self.graph, aten.unbind.int, own, like=like)
                found = {root: _item(self.graph, parts, self.row[root]) for root in roots}
            elif roots:
                found = dict.fromkeys(roots, self._unknown(like))
        for root in roots:
            self._round(root, found[root], phase)

    def _unknown(self, like: fx.Node) -> fx.Node:
        value: torch.Tensor = value_of(self.values.roots[0])
        kwargs: dict[str, Any] = {"dtype": torch.int32, "device": value.device}
        node = self.graph.fx.call_function(aten.full.default, ([], UNKNOWN), kwargs)
        node.meta = {**like.meta, "val": value.new_empty((), dtype=torch.int32)}
        return node

    # -- tensors -----------------------------------------------------------------------------------

    def _round(self, root: fx.Node, exponent: fx.Node, phase: Phase) -> None:
        """A flex tensor in place of a float32 one, for all that reads it."""
        graph = self.graph
        readers = [r for r in root.users if r.op != "output" and not rules.reads_float(r, root)]
        with graph.fx.inserting_before(self._behind(root, readers)):
            like = _plain(root, phase, keep=True)
            arguments = (root, exponent, self.mantissa, *self._randomness(root))
            if root in self.saved:
                both = emit(graph, ops.flex_quantise.default, *arguments, like=like)
                self.mantissas[root] = _item(graph, both, 0)
                self.statistics[root] = _item(graph, both, 1)
                used = emit(graph, aten.select.int, self.statistics[root], 0, _USED, like=like)
                result = emit(
                    graph, ops.flex_dequantise.default, self.mantissas[root], used, like=like
                )
            else:
                both = emit(graph, ops.flex_round.default, *arguments, like=like)
                result = _item(graph, both, 0)
                if self.state.exponents is not None:
                    self.statistics[root] = _item(graph, both, 1)
        self.rounded[root] = result
        for reader in readers:
            reader.replace_input_with(root, result)

    def _randomness(self, root: fx.Node) -> tuple[Any, ...]:
        return () if self.seed is None else (self.row[root], self.seed)

    def _behind(self, root: fx.Node, readers: Iterable[fx.Node]) -> fx.Node:
        if root.op != "placeholder":
            return root.next
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        return min([*readers, self.graph.output], key=order.__getitem__)

    def _stacked(self, roots: Sequence[fx.Node]) -> fx.Node:
        """Statistics of all tensors of a half."""
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        own = [self.statistics[root] for root in roots]
        last = max(own, key=order.__getitem__)
        like = _plain(last, phase_of(last))
        with self.graph.fx.inserting_before(last.next):
            return emit(self.graph, aten.stack.default, own, like=like)

    # -- what the backward reads of the forward ----------------------------------------------------

    def _read_late(self, reads: Sequence[_LateRead], used: Mapping[fx.Node, fx.Node]) -> None:
        self.original = {rounded: root for root, rounded in self.rounded.items()}
        for reader, value, base in reads:
            if base in self.saved or self._alive(base):
                copy = self._late_copy(value, base, reader, used)
                reader.replace_input_with(self.rounded.get(value, value), copy)

    def _late_copy(
        self, value: fx.Node, base: fx.Node, before: fx.Node, used: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        """A value of the forward, made in the backward in front of its first reader."""
        if value in self.late:
            return self.late[value]
        if value is not base:
            source = value.args[0]
            assert isinstance(source, fx.Node)
            copied = self._late_copy(self.original.get(source, source), base, before, used)
            with self.graph.fx.inserting_before(before):
                copy = self.graph.fx.node_copy(value, lambda n: copied if n is source else n)
            copy.meta = _plain(value, Phase.BACKWARD, keep=True).meta
        else:
            copy = self._from_saved(value, before, used)
        self.late[value] = copy
        return copy

    def _from_saved(
        self, base: fx.Node, before: fx.Node, used: Mapping[fx.Node, fx.Node]
    ) -> fx.Node:
        graph, root = self.graph, self.values.root_of[base]
        exponent = used[root]
        like = _plain(base, Phase.BACKWARD, keep=True)
        if base in self.saved:
            mantissas = self._mantissas(base)
            with graph.fx.inserting_before(before):
                return emit(graph, ops.flex_dequantise.default, mantissas, exponent, like=like)
        with graph.fx.inserting_before(before):
            arguments = (base, exponent, self.mantissa, *self._randomness(root))
            both = emit(graph, ops.flex_round.default, *arguments, like=like)
            return _item(graph, both, 0)

    def _mantissas(self, base: fx.Node) -> fx.Node:
        """Integers of a value that was moved: it has its root's exponent, so this is exact."""
        if base not in self.mantissas:
            graph, root = self.graph, self.values.root_of[base]
            like = _plain(base, Phase.FORWARD, keep=True)
            with graph.fx.inserting_before(base.next):
                statistics = self.statistics[root]
                used = emit(graph, aten.select.int, statistics, 0, _USED, like=like)
                both = emit(graph, ops.flex_quantise.default, base, used, self.mantissa, like=like)
                self.mantissas[base] = _item(graph, both, 0)
        return self.mantissas[base]


class _Items(dict[fx.Node, fx.Node]):
    """Exponents of forward tensors in the backward, each made when it is first asked for."""

    def __init__(self, rewriter: _Rewriter, parts: fx.Node, place: fx.Node) -> None:
        super().__init__()
        self._rewriter, self._parts, self._place = rewriter, parts, place

    def __missing__(self, root: fx.Node) -> fx.Node:
        graph = self._rewriter.graph
        with graph.fx.inserting_after(self._parts):
            self[root] = _item(graph, self._parts, self._rewriter.row[root])
        return self[root]


def _is_recomputed(node: fx.Node) -> bool:
    return node.meta.get("recompute") in _RECOMPUTED


def _is_view(node: fx.Node, views: frozenset[fx.Node]) -> bool:
    """Whether it shows the memory of its operand; a part of a result does only of a view."""
    producer = node.args[0] if node.target is getitem else node
    return producer in views


def _plain(node: fx.Node, phase: Phase, *, keep: bool = False) -> fx.Node:
    """Something to make nodes of a half like; with the module of `node`, if that is kept."""
    like = fx.Node(fx.Graph(), "like", "call_function", getitem, (), {})
    if keep:
        like.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        if phase is Phase.BACKWARD:
            like.meta.pop("recompute", None)
            like.meta.pop("ac_graph_id", None)
    like.meta["val"] = value_of(node)
    like.meta.pop("partitioner_tag", None)
    if phase is Phase.BACKWARD:
        like.meta["partitioner_tag"] = "is_backward"
    return like


def _item(graph: Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.fx.call_function(getitem, (node, index))
    item.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    item.meta["val"] = value_of(node)[index]
    return item
