"""What each parameter is to the model: a matrix, a convolution, an embedding, a head, a norm, ….

Optimizers treat parameters by what they are: orthogonalised updates are for matrices, weight decay
is not for norms and biases. Names and module classes say it for some models; what the joint graph
does with a parameter says it for all, functional calls and shared weights included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx

from graphopt.analysis.matrix_view import MatrixView, matrix_view, whole_matrix
from graphopt.analysis.weight_readers import LOOKUPS, NORMS, PRODUCTS, Readers, kind_of
from graphopt.analysis.weight_uses import Use, depends_on_tangents, weight_uses
from graphopt.graph import Graph, value_of

# Operators that compute the gradient of a weight from that of what it makes.
_GRADIENTS = frozenset(
    ("mm", "bmm", "convolution_backward", "embedding_dense_backward", "_embedding_bag_backward")
)

_LEARNED = "a learned input of a layer"

RoleName = Literal[
    "matrix", "convolution", "embedding", "head", "norm", "bias", "rnn", "other", "unused"
]


@dataclass(frozen=True)
class ParameterRole:
    """What a parameter is.

    Attributes:
        name: its qualified name.
        role: one of `RoleName`.
        reason: why, in words.
        shape: its shape.
        uses: what it is in each kind of use, such as ``("embedding", "head")`` of a tied table.
        matrix: how it is a matrix; ``None`` where it is none.
    """

    name: str
    role: RoleName
    reason: str
    shape: tuple[int, ...]
    uses: tuple[RoleName, ...] = ()
    matrix: MatrixView | None = None

    @property
    def vector(self) -> bool:
        """Whether at most one of its dimensions is longer than 1."""
        return sum(size > 1 for size in self.shape) <= 1


def find_roles(graph: Graph) -> dict[str, ParameterRole]:
    """The role of every parameter of a joint graph, in the order of its inputs.

    A shared weight is judged by all of its uses: a table that is also the head is an
    ``"embedding"``, a matrix that is used within the model and for its output a ``"matrix"``.
    Parameters that get no gradient are ``"unused"``.
    """
    readers, uses = Readers(graph), graph.get(weight_uses)
    tangents = graph.get(depends_on_tangents)
    found = {}
    for name, node in readers.parameters.items():
        shape = tuple(value_of(node).shape)
        if name not in uses:
            found[name] = ParameterRole(name, "unused", "it gets no gradient", shape)
            continue
        kinds: dict[RoleName, str] = {}
        for role, reason in _roles(node, shape, uses[name], readers):
            kinds.setdefault(role, reason)
        trained = any(kind_of(u.node) in _GRADIENTS for u in uses[name])
        if trained and len(kinds) > 1 and kinds.get("other") != _LEARNED:
            kinds.pop("other", None)  # such as a penalty on the weight
        role = _together(kinds)
        matrix = None
        if role in ("matrix", "convolution", "embedding", "head"):
            views = (matrix_view(u, shape, tangents) for u in uses[name])
            matrix = next((v for v in views if v), None) or whole_matrix(shape, role == "embedding")
        reason = "; ".join(dict.fromkeys(kinds.values()))
        if role in ("matrix", "convolution") and matrix is None:
            role, reason = "other", f"{reason}, but it is not laid out as a matrix"
        found[name] = ParameterRole(name, role, reason, shape, tuple(sorted(kinds)), matrix)
    return found


def _together(kinds: dict[RoleName, str]) -> RoleName:
    """The role of a parameter from those of its uses."""
    if "embedding" in kinds:
        return "embedding"
    if not kinds:  # returned as it is
        return "other"
    others: list[RoleName] = [kind for kind in kinds if kind != "head"]
    if not others:
        return "head"
    return others[0] if len(others) == 1 else "other"


def _roles(
    node: fx.Node, shape: tuple[int, ...], uses: tuple[Use, ...], readers: Readers
) -> Iterator[tuple[RoleName, str]]:
    """The role and reason of each use: by its gradient where that says it, else by its reader."""
    if any(u.kind == "rnn" for u in uses):
        if len(shape) == 1:
            yield "bias", "added in every step of a recurrent layer"
        else:
            yield "rnn", "a weight of a recurrent layer"
        return
    for reader, operand in readers.of(node):
        yield _read(reader, operand, readers)


def _read(reader: fx.Node, operand: fx.Node, readers: Readers) -> tuple[RoleName, str]:
    kind, first = kind_of(reader), reader.args[0] is operand
    if kind in LOOKUPS and first:
        return "embedding", "looked up by index"
    if first and (kind in NORMS or kind == "convolution"):
        return "other", _LEARNED
    if kind in NORMS:
        return "norm", "scale or shift of a norm"
    if kind in PRODUCTS:
        return _product(reader, operand, readers)
    if reader in readers.fixed:
        return "other", "a weight is computed from it"
    others = [o for o in reader.all_input_nodes if o is not operand]
    if kind in ("add", "sub"):
        if any(readers.normalised(o) or _scales(o, readers) for o in others):
            return "norm", "added to what was normalised"
        return "bias", "added to every example"
    if kind in ("cat", "stack"):
        return "bias", "joined to every example"
    if kind in ("mul", "div"):
        if any(readers.normalised(o) for o in others):
            return "norm", "multiplied with what was normalised"
        return "other", "multiplied element by element"
    return "other", f"read by {kind}"


def _scales(node: fx.Node, readers: Readers) -> bool:
    """Whether a value is a normalised one times something."""
    return kind_of(node) == "mul" and any(readers.normalised(o) for o in node.all_input_nodes)


def _product(reader: fx.Node, operand: fx.Node, readers: Readers) -> tuple[RoleName, str]:
    kind = kind_of(reader)
    convolution = kind == "convolution"
    place = reader.args.index(operand)
    if (convolution and place == 2) or (kind in ("addmm", "baddbmm", "addmv") and place == 0):
        return "bias", "added to every example"
    if value_of(operand).dim() == 1:
        return "other", "a vector that activations are multiplied with"
    if readers.ends(reader):
        return "head", "a linear map to the output, with no layer behind it"
    if convolution:
        return "convolution", "the kernel of a convolution"
    parts = readers.parts(reader)
    fused = f", fused: its result is read in {parts} parts, and it counts as one" * (parts > 1)
    return "matrix", f"a linear map between layers{fused}"
