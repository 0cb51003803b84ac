"""Batch norms of a training step: which can be served, and in which buffers."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

import graphopt.ops.statistics  # noqa: F401  (defines the operator)
from graphopt.graph import Graph, module_of, phase_of, value_of
from graphopt.passbase import Declined
from graphopt.plan import Phase, Role
from graphopt.rewrite import arguments

aten = torch.ops.aten

# All return the mean of the batch second and ``1 / sqrt(var + eps)`` third.
NORMS = frozenset(
    {
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit.default,
        aten._native_batch_norm_legit.no_stats,
        aten.native_batch_norm.default,
        aten._batch_norm_with_update.default,
        aten._batch_norm_with_update_functional.default,
        aten.cudnn_batch_norm.default,
        aten.miopen_batch_norm.default,
    }
)
_FROZEN = frozenset(
    {
        aten._native_batch_norm_legit_no_training.default,
        aten._batch_norm_no_update.default,
    }
)
_OVER_RANKS = frozenset(
    {aten.batch_norm_gather_stats_with_counts.default, aten.batch_norm_gather_stats.default}
)
# Of a norm with ``momentum=None``, whose statistics are renewed beside it.
_CUMULATIVE = torch.ops.graphopt.batch_norm_statistics.default
# They have running statistics among their arguments, and read them in evaluation only.
_BACKWARDS = frozenset(
    {
        aten.native_batch_norm_backward.default,
        aten.cudnn_batch_norm_backward.default,
        aten.miopen_batch_norm_backward.default,
        aten.batch_norm_backward.default,
    }
)


@dataclass
class Site:
    """One batch norm, with all its uses in the forward.

    Attributes:
        name: of the module, else of its buffer of means.
        mean, var: names of its buffers.
        uses: its operators, in order.
    """

    name: str
    mean: str
    var: str
    uses: list[fx.Node] = field(default_factory=list)


def values_per_channel(norm: fx.Node) -> int | torch.SymInt:
    """How many values a norm takes the statistics of a channel from."""
    shape = value_of(norm.all_input_nodes[0]).shape
    count: int | torch.SymInt = math.prod(n for dimension, n in enumerate(shape) if dimension != 1)
    return count


def epsilon(norm: fx.Node) -> float:
    """What it adds to the variance."""
    given = arguments(norm)
    return float(given["eps"] if "eps" in given else given["epsilon"])


def momentum(norm: fx.Node) -> float | str:
    """The factor of the newest batch in the moving averages that the module asks for."""
    if norm.target is aten._native_batch_norm_legit.no_stats:
        return "none"
    given = arguments(norm)
    found = given["momentum"] if "momentum" in given else given["exponential_average_factor"]
    return float(found) if isinstance(found, float | int) else str(found)


def find_sites(graph: Graph) -> tuple[list[Site], list[Declined]]:
    """All batch norms of the forward: those that can be served, and the others with the reason."""
    return _Finder(graph).run()


class _Finder:
    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        slots = zip(graph.inputs, graph.signature.inputs, strict=True)
        self._buffers = {n: slot.name for n, slot in slots if slot.role is Role.BUFFER}
        self._nodes = {name: node for node, name in self._buffers.items()}
        calls = [n for n in graph.operators if phase_of(n) is Phase.FORWARD]
        self._calls = calls
        self._renewing = [n for n in calls if n.target is _CUMULATIVE]
        self._mutations = {
            (node, slot.name)
            for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True)
            if slot.role is Role.MUTATION
        }

    def run(self) -> tuple[list[Site], list[Declined]]:
        sites: dict[str, Site] = {}
        refused: dict[str, Declined] = {}
        for node in self._calls:
            if node.target not in NORMS | _FROZEN | _OVER_RANKS:
                continue
            buffers = self._statistics(node)
            if isinstance(buffers, Declined):
                refused.setdefault(buffers.site, buffers)
                continue
            mean, var = buffers
            site = sites.setdefault(mean, Site(_name(mean), mean, var))
            site.uses.append(node)
        for site in sites.values():
            if site.name not in refused and (no := self._obstacle(site)):
                refused[site.name] = no
        return [s for s in sites.values() if s.name not in refused], list(refused.values())

    def _statistics(self, node: fx.Node) -> tuple[str, str] | Declined:
        """Names of the buffers of a norm that normalises by its batch."""
        if node.target in _OVER_RANKS:
            return _no(node, "synchronised", "its statistics are taken over all ranks already")
        given = arguments(node)
        if node.target in _FROZEN or not given.get("training", True):
            buffer = self._origin(given["running_mean"])
            return _no(
                node, "frozen", "it normalises by its running statistics, as in evaluation", buffer
            )
        mean, var = given.get("running_mean"), given.get("running_var")
        if node.target is aten._native_batch_norm_legit.no_stats:
            mean, var = self._beside(node)
        if mean is None or var is None:
            detail = "it keeps no running statistics, and evaluates by its batch"
            return _no(node, "no-running-statistics", detail)
        names = self._origin(mean), self._origin(var)
        if not all(names):
            return _no(node, "not-a-buffer", "its running statistics are no buffers of the model")
        return names

    def _beside(self, node: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
        """What is renewed from the operand of a norm, in the same module."""
        for other in self._renewing:
            x = other.all_input_nodes[0]
            x = x.all_input_nodes[0] if x.target is aten.detach.default else x
            if x is node.all_input_nodes[0] and module_of(other) == module_of(node):
                return other.all_input_nodes[1], other.all_input_nodes[2]
        return None, None

    def _origin(self, node: object) -> str:
        """The buffer that running statistics come from; another use of it may lie between."""
        while isinstance(node, fx.Node) and node not in self._buffers:
            if node.target is aten.copy.default:
                node = node.args[0]
            elif node.target is operator.getitem:
                norm, index = node.args
                if not isinstance(norm, fx.Node):
                    return ""
                given = arguments(norm) if norm.target in NORMS else {}
                kept = {r: given.get(n) for n, r in _renewed(norm)}
                node = kept.get(int(str(index)))
            else:
                return ""
        return self._buffers[node] if isinstance(node, fx.Node) else ""

    def _obstacle(self, site: Site) -> Declined | None:
        if (least := min(map(epsilon, site.uses))) <= 0:
            detail = "without an epsilon a variance of 0 cannot be told from the operator's results"
            return Declined(site.name, "no-epsilon", detail, {"eps": least})
        for name in (site.mean, site.var):
            if reader := next(self._readers(name), None):
                detail = f"{reader.name} reads {name!r}, so training depends on it"
                return Declined(site.name, "statistics-read", detail)
        return None

    def _readers(self, buffer: str) -> Iterator[fx.Node]:
        """Who reads running statistics, beside norms that renew them."""
        stack = [self._nodes[buffer]]
        while stack:
            node = stack.pop()
            for user in node.users:
                if user.op == "output":
                    if (node, buffer) not in self._mutations or _times(user, node) > 1:
                        yield user
                elif user.target in NORMS and arguments(user).get("training", True):
                    renewed = {r for n, r in _renewed(user) if arguments(user).get(n) is node}
                    stack += [u for u in user.users if _index(u) in renewed]
                elif user.target is _CUMULATIVE:
                    index = user.all_input_nodes.index(node) - 1
                    stack += [u for u in user.users if _index(u) == index]
                elif user.target is aten.copy.default:
                    stack += [user] if user.args[0] is node else []
                elif user.target not in _BACKWARDS:
                    yield user


def _renewed(norm: fx.Node) -> tuple[tuple[str, int], ...]:
    """Arguments of a norm that it returns renewed, and as which result."""
    first = {
        aten._native_batch_norm_legit_functional.default: 3,
        aten._batch_norm_with_update_functional.default: 4,
    }.get(norm.target)  # type: ignore[call-overload]
    return () if first is None else (("running_mean", first), ("running_var", first + 1))


def _index(node: fx.Node) -> int | None:
    return int(str(node.args[1])) if node.target is operator.getitem else None


def _times(output: fx.Node, node: fx.Node) -> int:
    returned = output.args[0]
    assert isinstance(returned, list | tuple)
    return sum(value is node for value in returned)


def _name(mean: str) -> str:
    return mean.removesuffix(".running_mean")


def _no(node: fx.Node, reason: str, detail: str, buffer: str = "") -> Declined:
    return Declined(_name(buffer) or module_of(node) or node.name, reason, detail)
