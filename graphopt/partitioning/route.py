"""What goes from stage to stage: each value that is read elsewhere, through every stage between.

Only neighbours talk. A value of the forward travels on with the activations to the last stage that
reads it, in forward or backward; one of the backward travels back with the gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.analysis.aliasing import storage_of
from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.effects import is_repeatable
from graphopt.graph import phase_of, value_of
from graphopt.partitioning.place import Placement, floating
from graphopt.plan import Phase, Role, Signature, Slot

_RECOMPUTED = frozenset({CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE})
# Inputs of the step that every stage has at hand.
_EVERYWHERE = frozenset({Role.PARAM, Role.BUFFER, Role.STATE, Role.SIZE})

_WAYS = (False, True)  # with the gradients, with the activations

Place = tuple[int, Phase]  # one half of one stage


@dataclass
class Needs:
    """What one half of one stage works with.

    Attributes:
        step: inputs of the step that it reads by itself.
        foreign: nodes of other halves that it reads.
        results: output slots of the step that it gives, by position.
    """

    step: set[fx.Node] = field(default_factory=set)
    foreign: set[fx.Node] = field(default_factory=set)
    results: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Crossing:
    """A value that one stage makes and others read, per micro-batch.

    Attributes:
        node: its node.
        made: the stage that makes it, or that has it as an input.
        read: the stages that read it, ascending. Those between that are not among them relay it.
        phase: of the messages with which it travels.
    """

    node: fx.Node
    made: int
    read: tuple[int, ...]
    phase: Phase

    @property
    def bytes(self) -> int:
        """Its size."""
        return tensor_bytes(value_of(self.node))

    @property
    def relayed(self) -> tuple[int, ...]:
        """The stages that pass it on and do not read it."""
        low, high = min(self.made, *self.read), max(self.made, *self.read)
        return tuple(s for s in range(low + 1, high) if s not in self.read)

    def crosses(self, cut: int) -> bool:
        """Whether it travels between stage `cut` and the next one."""
        return min(self.made, *self.read) <= cut < max(self.made, *self.read)


class Routes:
    """Who needs what.

    Args:
        module: a joint graph, with one placeholder per input slot.
        signature: of its inputs and outputs.
        placement: stages by name, from `graphopt.partitioning.place`.

    Attributes:
        needs: of each half of each stage.
        crossings: in the order of the graph, activations first.
        partials: nodes whose gradients are added up between stages, with their stages.
    """

    def __init__(self, module: fx.GraphModule, signature: Signature, placement: Placement) -> None:
        self.placement = placement
        self.nodes = tuple(module.graph.nodes)
        self.memory = storage_of(self.nodes)
        inputs = [n for n in self.nodes if n.op == "placeholder"]
        self.slots: Mapping[fx.Node, Slot] = dict(zip(inputs, signature.inputs, strict=True))
        self.returned: list[tuple[Slot, fx.Node]] = list(
            zip(signature.outputs, module.graph.output_node().args[0], strict=True)  # type: ignore[arg-type]
        )
        self.sums = frozenset(n for n in self.nodes if n.name in placement.sums)
        self._users = self._users_of_parameters()
        self.whole: frozenset[fx.Node] = frozenset()
        self.needs, self.partials = self._collected()
        self.whole = self._sent_whole()
        if self.whole:
            self.needs, self.partials = self._collected()
        self.crossings = tuple(self._crossings())

    # -- where values are --------------------------------------------------------------------------

    def home(self, node: fx.Node) -> Place | None:
        """The half that makes a node, or gets it as an input; None for what is everywhere."""
        last = self.placement.stages - 1
        if node.op == "placeholder":
            role = self.slots[node].role
            if role is Role.TANGENT:
                return last, Phase.BACKWARD
            return None if role in _EVERYWHERE else (0, Phase.FORWARD)
        if node.op == "get_attr" or floating(node, self.memory):
            return None
        return self.placement.stage[node.name], phase_of(node)

    def made_again(self, node: fx.Node, place: Place) -> bool:
        """Whether a half that reads a node makes it itself, although it is none of its own."""
        if node.op != "call_function":
            return False
        if floating(node, self.memory):
            return True
        if self.home(node) == place:
            return False
        if self._remakes(node):
            return True
        recomputed = place[1] is Phase.BACKWARD and phase_of(node) is Phase.FORWARD
        return recomputed and self._recomputes(node)

    def _recomputes(self, node: fx.Node) -> bool:
        """Whether a checkpoint wants it computed again; what draws numbers is kept instead."""
        tagged = node.meta.get("recompute") in _RECOMPUTED and is_repeatable(node)
        tuples = (p for p in node.all_input_nodes if not isinstance(value_of(p), Tensor))
        return tagged and all(p.op != "call_function" or self._recomputes(p) for p in tuples)

    def _remakes(self, node: fx.Node) -> bool:
        owner = self.memory.owner[node]
        return node is not owner and owner in self.whole and self._is_plain_view(node)

    def _is_plain_view(self, node: fx.Node) -> bool:
        """Whether only views lie between a node and the one that owns its memory."""
        owner = self.memory.owner[node]
        while node is not owner:
            if node not in self.memory.views:
                return False
            node = node.all_input_nodes[0]
        return True

    # -- who needs what ----------------------------------------------------------------------------

    def _collected(self) -> tuple[dict[Place, Needs], dict[fx.Node, int]]:
        needs = {(s, p): Needs() for s in range(self.placement.stages) for p in Phase}
        seen: dict[Place, set[fx.Node]] = {place: set() for place in needs}

        def want(node: fx.Node, place: Place) -> None:
            if node in seen[place] or self.home(node) == place:
                if node.op == "placeholder":
                    needs[place].step.add(node)
                return
            seen[place].add(node)
            if self.made_again(node, place):
                for operand in node.all_input_nodes:
                    want(operand, place)
            elif self.home(node) is not None:
                needs[place].foreign.add(node)
            elif node.op == "placeholder":
                needs[place].step.add(node)

        for node in self.nodes:
            if node.op == "call_function" and node not in self.sums:
                place = self.home(node)
                for operand in node.all_input_nodes if place else ():
                    want(operand, place)  # type: ignore[arg-type]
        partials = self._partials()
        for node, stage in partials.items():
            want(node, (stage, Phase.BACKWARD))
        for index, (slot, node) in enumerate(self.returned):
            if node not in self.sums:
                place = self._delivered(slot, node)
                needs[place].results.append(index)
                want(node, place)
        return needs, partials

    def _partials(self) -> dict[fx.Node, int]:
        operands = (p for n in self.nodes if n in self.sums for p in n.all_input_nodes)
        return {p: self._site(p) for p in operands if p not in self.sums}

    def _delivered(self, slot: Slot, node: fx.Node) -> Place:
        """The half that gives an output of the step."""
        if slot.role is Role.OUTPUT:
            return self.placement.stages - 1, Phase.FORWARD
        site = self._site(node)
        if slot.role is Role.GRAD:
            # The gradient of an input goes back to where the input came from.
            users = self._users.get(slot.name, {0})
            site = max((s for s in users if s <= site), default=site)
        return site, slot.phase

    def _site(self, node: fx.Node) -> int:
        place = self.home(node)
        if place is not None:
            return place[0]
        if node.name in self.placement.stage:
            return self.placement.stage[node.name]
        return max((self._site(p) for p in node.all_input_nodes), default=0)

    def _users_of_parameters(self) -> dict[str, set[int]]:
        """The stages whose forward reads each parameter."""
        found: dict[str, set[int]] = {}
        for node in self.nodes:
            if node.op == "call_function" and phase_of(node) is Phase.FORWARD:
                for operand in node.all_input_nodes if self.home(node) else ():
                    slot = self.slots.get(self.memory.owner[operand])
                    if slot is not None and slot.role in _EVERYWHERE:
                        found.setdefault(slot.name, set()).add(self._site(node))
        return found

    # -- what travels ------------------------------------------------------------------------------

    def _sent_whole(self) -> frozenset[fx.Node]:
        """Values whose views would be more to send than they are, such as an expanded one."""
        far: dict[fx.Node, dict[tuple[fx.Node, bool], int]] = {}  # cuts, by view and direction
        for (stage, _), needs in self.needs.items():
            for node in needs.foreign:
                home = self.home(node)
                if home is not None and self._is_plain_view(node):
                    views = far.setdefault(self.memory.owner[node], {})
                    key = (node, stage > home[0])
                    views[key] = max(views.get(key, 0), abs(stage - home[0]))
        whole = set()
        for owner, views in far.items():
            parts = sum(tensor_bytes(value_of(n)) * cuts for (n, _), cuts in views.items())
            most = (max((c for (_, d), c in views.items() if d is way), default=0) for way in _WAYS)
            alone = {n for n, _ in views} == {owner}
            if not alone and tensor_bytes(value_of(owner)) * sum(most) <= parts:
                whole.add(owner)
        return frozenset(whole)

    def _crossings(self) -> Iterator[Crossing]:
        read: dict[tuple[fx.Node, Phase], set[int]] = {}
        for (stage, _), needs in self.needs.items():
            for node in needs.foreign:
                home = self.home(node)
                assert home is not None
                if home[0] != stage:
                    phase = Phase.FORWARD if stage > home[0] else Phase.BACKWARD
                    read.setdefault((node, phase), set()).add(stage)
        for phase in Phase:
            for node in self.nodes:
                stages = read.get((node, phase))
                if stages:
                    made = self.home(node)
                    assert made is not None
                    yield Crossing(node, made[0], tuple(sorted(stages)), phase)
