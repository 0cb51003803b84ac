"""From the uses of parameters to blocks: what is preconditioned together, and in which form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import fx

from graphopt.analysis.weight_uses import Use, base_of, depends_on_tangents, weight_uses
from graphopt.graph import Graph, value_of
from graphopt.passbase import Declined
from graphopt.passes.kfac.rnn import rnn_sites
from graphopt.plan import Role
from graphopt.plan.kfac import (
    DIAGONAL,
    IN_OUT,
    IN_OUT_KERNEL,
    LOW_RANK,
    OUT_IN,
    Block,
    Side,
)

# A side is cut into at most so many pieces; beyond that only its diagonal is kept.
MAX_PIECES = 64

KRONECKER = ("matmul", "convolution", "embedding")


@dataclass(frozen=True)
class Site:
    """A block, and the operators that its statistics are computed from.

    Attributes:
        block: what the runtime obeys.
        uses: of the weight.
        swapped: per use, whether its output gradients lie on the side of the block's inputs, as in
            an embedding that is also the head.
    """

    block: Block
    uses: tuple[Use, ...]
    swapped: tuple[bool, ...] = ()


def find_sites(graph: Graph, max_dim: int, rank: int) -> tuple[list[Site], list[Declined]]:
    """All blocks of a joint graph, and the parameters that are left alone, with the reason.

    Args:
        graph: a joint graph.
        max_dim: largest size of a dense matrix.
        rank: rows that are kept of larger ones, where these are less than half of their size; 0 to
            cut them.
    """
    finder = _Finder(graph, max_dim, rank)
    return finder.sites(), finder.declined


class _Finder:
    def __init__(self, graph: Graph, max_dim: int, rank: int) -> None:
        self.max_dim, self.rank = max_dim, rank
        self.uses = dict(graph.get(weight_uses))
        self.tangents = graph.get(depends_on_tangents)
        inputs = zip(graph.inputs, graph.signature.inputs, strict=True)
        self.shapes = {s.name: tuple(value_of(n).shape) for n, s in inputs if s.role is Role.PARAM}
        self.declined: list[Declined] = []

    def sites(self) -> list[Site]:
        """Blocks of every parameter; fills `declined`."""
        for name, uses in self.uses.items():
            if other := next((u for u in uses if u.kind == "other"), None):
                self.decline(name, "unsupported-use", f"{other.reason}; its gradient stays plain")
        for name in [d.site for d in self.declined]:
            del self.uses[name]
        found = list(self._norms())
        found += [Site(*s, (False,)) for s in rnn_sites(self.uses, self.shapes, self._side)]
        found += list(self._weights())
        found += list(self._sums())
        for name, uses in self.uses.items():
            why = (
                "a recurrent network with dropout between its layers, or with projections"
                if uses[0].kind == "rnn"
                else "its uses do not fit together"
            )
            self.decline(name, "unsupported-use", f"{why}; its gradient stays plain")
        order = {name: i for i, name in enumerate(self.shapes)}
        return sorted(found, key=lambda s: (order[s.block.weight], s.block.start))

    def decline(self, name: str, reason: str, detail: str) -> None:
        """Leave a parameter alone."""
        self.declined.append(Declined(name, reason, detail))

    # -- norms -------------------------------------------------------------------------------------

    def _norms(self) -> Iterator[Site]:
        by_nodes: dict[tuple[str, ...], dict[int, str]] = {}
        for name, uses in self.uses.items():
            if all(u.kind == "norm" and u.index == uses[0].index for u in uses):
                key = tuple(sorted(u.node.name for u in uses))
                by_nodes.setdefault(key, {})[uses[0].index] = name
        for found in by_nodes.values():
            names = [found[i] for i in sorted(found)]
            yield self._unitwise(names, self.uses[names[0]])

    def _unitwise(self, names: Sequence[str], uses: tuple[Use, ...]) -> Site:
        for name in names:
            self.uses.pop(name, None)
        channels = prod(self.shapes[names[0]])
        left = Side(f"{names[0]}:F", len(names), channels)
        bias = names[1] if len(names) > 1 else ""
        return Site(Block("unitwise", names[0], bias, 1, channels, 1, OUT_IN, 0, left, None), uses)

    # -- weights -----------------------------------------------------------------------------------

    def _weights(self) -> Iterator[Site]:
        for name in list(self.uses):
            uses = self.uses.get(name, ())
            weight = [u for u in uses if u.kind in KRONECKER and not _is_bias(u)]
            if not uses or len(weight) != len(uses):
                continue
            parts: dict[int, list[Use]] = {}
            for use in uses:
                parts.setdefault(use.start, []).append(use)
            made = [self._kronecker(name, tuple(p), whole=len(parts) == 1) for p in parts.values()]
            if all(made):
                self.uses.pop(name)
                yield from (m for m in made if m)

    def _kronecker(self, name: str, uses: tuple[Use, ...], *, whole: bool) -> Site | None:
        forms = [self._form(u) for u in uses]
        first = next((f for f, u in zip(forms, uses, strict=True) if u.kind != "embedding"), None)
        groups, rows, columns, layout = first or forms[0] or (0, 0, 0, "")
        swapped = []
        for form in forms:
            if form == (groups, rows, columns, layout):
                swapped.append(False)
            elif (
                form
                and form[:3] == (groups, columns, rows)
                and {form[3], layout}
                == {
                    OUT_IN,
                    IN_OUT,
                }
            ):
                swapped.append(True)
            else:
                return None
        if not groups:
            return None
        bias = self._bias_of(name, uses, groups * rows) if whole and not any(swapped) else ""
        one_hot = all(u.kind == "embedding" for u in uses)
        label = name if whole else f"{name}[{uses[0].start}:{uses[0].start + uses[0].rows}]"
        left = self._side(f"{label}:G", rows, groups)
        right = (
            Side(f"{label}:A", columns, groups, DIAGONAL)
            if one_hot
            else self._side(f"{label}:A", columns + bool(bias), groups)
        )
        block = Block(
            "kronecker", name, bias, groups, rows, columns, layout, uses[0].start, left, right
        )
        return Site(block, uses, tuple(swapped))

    def _side(self, statistic: str, size: int, groups: int) -> Side:
        """Dense where it is small enough; of low rank; cut into equal pieces; or its diagonal."""
        if size <= self.max_dim:
            return Side(statistic, size, groups)
        if 0 < self.rank < size // 2:
            return Side(statistic, size, groups, LOW_RANK, self.rank)
        for pieces in range(2, MAX_PIECES + 1):
            if size % pieces == 0 and size // pieces <= self.max_dim:
                return Side(statistic, size // pieces, groups * pieces)
        return Side(statistic, size, groups, DIAGONAL)

    def _form(self, use: Use) -> tuple[int, int, int, str] | None:
        """Groups, outputs, inputs and layout as this use sees its weight."""
        if use.kind == "convolution":
            gradient, x, weight = (value_of(cast("fx.Node", a)) for a in use.node.args[:3])
            if gradient.dim() != weight.dim():
                return None
            groups, kernel = cast("int", use.node.args[9]), prod(weight.shape[2:])
            if use.node.args[7]:
                inputs, outputs = x.shape[1] // groups, weight.shape[1]
                return groups, outputs, inputs * kernel, IN_OUT_KERNEL
            return groups, weight.shape[0] // groups, weight.shape[1] * kernel, OUT_IN
        value: torch.Tensor = value_of(use.node)
        *batch, p, q = value.shape
        groups = 1 if use.summed else prod(batch)
        if use.kind == "embedding":
            return groups, q, p, OUT_IN if use.transposed else IN_OUT
        on_left, on_right = (cast("fx.Node", a) in self.tangents for a in use.node.args[:2])
        if on_left == on_right:
            return None
        if on_left:
            return groups, p, q, IN_OUT if use.transposed else OUT_IN
        return groups, q, p, OUT_IN if use.transposed else IN_OUT

    def _bias_of(self, weight: str, uses: tuple[Use, ...], outputs: int) -> str:
        """The bias whose gradient sums the same output gradients; the most alike in name."""
        wanted = sorted(_gradient(u, self.tangents).name for u in uses)
        found = [
            name
            for name, other in self.uses.items()
            if self.shapes[name] == (outputs,)
            and all(_is_bias(u) for u in other)
            and sorted(_gradient(u, self.tangents).name for u in other) == wanted
        ]
        best = max(found, key=lambda name: _alike(weight, name), default="")
        self.uses.pop(best, None)
        return best

    # -- everything that is added or multiplied elementwise ----------------------------------------

    def _sums(self) -> Iterator[Site]:
        for name in list(self.uses):
            uses = self.uses[name]
            if len(uses) == 1 and (uses[0].kind == "sum" or _is_bias(uses[0])):
                yield self._unitwise([name], uses)


def _is_bias(use: Use) -> bool:
    return use.kind == "sum" or (use.kind == "convolution" and use.index == 2)


def _gradient(use: Use, tangents: frozenset[fx.Node]) -> fx.Node:
    """The tensor of output gradients, whatever its shape."""
    operands: list[Any] = list(use.node.args)
    if use.kind == "matmul":
        return base_of(operands[0] if operands[0] in tangents else operands[1])
    return base_of(operands[0])


def _alike(weight: str, bias: str) -> tuple[bool, int]:
    """How well two names belong together: as ``weight_ih`` and ``bias_ih``, then by prefix."""
    same = 0
    for a, b in zip(weight, bias, strict=False):
        if a != b:
            break
        same += 1
    return weight.replace("weight", "bias") == bias, same
