"""Sizes of a call that vary: symbols of the graph, with the range for which it holds.

Dynamo is told which dimensions of which tensors vary, by the tensors themselves. Each becomes a
symbol of its own, also where two of them are equal by chance; what forward or its backward asks of
a symbol becomes a guard. The sizes 0 and 1 are never symbols, since broadcasting treats them apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from unittest import mock

import sympy  # type: ignore[import-untyped]
import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo import pgo
from torch._dynamo.source import TensorProperty, TensorPropertySource
from torch._dynamo.variables import builder
from torch._functorch._aot_autograd.schemas import MemoryFormatMeta
from torch.fx.experimental import _config
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.printers import PythonPrinter

from graphopt.errors import CaptureError
from graphopt.ops.numbers import number_function

Names = Mapping[int, str]
"""What dimensions of one tensor are called."""


@dataclass(frozen=True)
class Size:
    """One size that was to be a symbol.

    Attributes:
        name: as the caller named it.
        hint: the size in the captured call.
        least: the smallest one for which the graph holds, as far as one number can say it.
        most: the largest one; ``None`` where nothing limits it.
        line: what fixed it to `hint`, where that is known and it is fixed.
    """

    name: str
    hint: int
    least: int
    most: int | None
    line: str = ""

    @property
    def fixed(self) -> bool:
        """Whether the graph holds for one size only."""
        return self.least == self.most

    def __str__(self) -> str:
        most = "" if self.most is None else self.most
        return f"{self.name} = {self.hint}" if self.fixed else f"{self.name} {self.least}..{most}"


@dataclass(frozen=True)
class Dimensions:
    """Which sizes of a call shall be symbols.

    Attributes:
        names: by the identity of a tensor of the call.
    """

    names: Mapping[int, Names] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.names)

    def stand_ins(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[tuple[Any, ...], dict[str, Any]], Dimensions]:
        """Arguments for Dynamo, and the same dimensions of their tensors.

        A view is a tensor of its own there: else the size of the tensor that it is of would be
        taken for a constant, and bound the sizes of the view.
        """
        made: dict[int, Tensor] = {}

        def own(value: object) -> object:
            if not isinstance(value, Tensor) or id(value) not in self.names:
                return value
            if value.requires_grad or not value._is_view() or value.layout is not torch.strided:
                return value
            if id(value) not in made:
                shape, stride = value.shape, value.stride()
                copy = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
                _fill(copy, value)
                made[id(value)] = copy
            return made[id(value)]

        if not self:
            return (args, kwargs), self
        given = pytree.tree_map(own, (args, kwargs))
        copies = {id(copy): self.names[number] for number, copy in made.items()}
        return given, Dimensions({**self.names, **copies})


def _fill(copy: Tensor, value: Tensor) -> None:
    """Copy values to a tensor of the same strides; an expanded dimension lies there once."""
    for number, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[number] > 1:
            copy, value = copy.narrow(number, 0, 1), value.narrow(number, 0, 1)
    copy.copy_(value)


NONE = Dimensions()
Named: TypeAlias = Callable[[Collection[str]], Dimensions]
"""Finds sizes of a call by their names; none where one is not there, or cannot be a symbol."""


@contextmanager
def as_symbols(dimensions: Dimensions) -> Iterator[dict[str, Names]]:
    """Let Dynamo make symbols of these sizes, and constants of all others.

    Yields the names by where Dynamo finds their tensors (``L['ids']``).
    """
    found: dict[str, Names] = {}
    if not dimensions:
        yield found
        return

    def record(tx: Any, name: str, tensor: Tensor) -> pgo.FrameStateSizeEntry:
        names = dimensions.names.get(id(tensor), {})
        if names:
            found[name] = names
        shape = tuple(
            pgo.auto_dynamic if i in names and size > 1 else size
            for i, size in enumerate(tensor.shape)
        )
        return pgo.FrameStateSizeEntry(pgo.auto_dynamic, shape, pgo.auto_unset)

    def process(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
        return entry  # as it is in this call, whatever it was in earlier ones

    with ExitStack() as stack:
        stack.enter_context(
            torch._dynamo.config.patch(
                automatic_dynamic_shapes=True,
                # For symbols it takes longer than the operators that it spares.
                fake_tensor_cache_enabled=False,
            )
        )
        # Sizes that are equal in one call need not be in the next one.
        stack.enter_context(_config.patch(use_duck_shape=False))  # type: ignore[attr-defined]
        stack.enter_context(mock.patch.object(builder, "record_automatic_dynamic", record))
        stack.enter_context(mock.patch.object(builder, "process_automatic_dynamic", process))
        yield found


@contextmanager
def tangents_like_outputs() -> Iterator[None]:
    """Derive backwards for tangents with the strides of outputs, whatever sizes these have.

    For symbolic sizes AOTAutograd would take contiguous ones, and a kernel that adds in another
    order of memory rounds differently.
    """
    honest = MemoryFormatMeta.from_tensor

    def from_tensor(tensor: Tensor, *args: Any) -> MemoryFormatMeta | None:
        if not any(isinstance(n, torch.SymInt) for n in (*tensor.shape, *tensor.stride())):
            return honest(tensor, *args)
        if any(type(stride) is int and stride == 0 for stride in tensor.stride()):
            return MemoryFormatMeta(memory_format=torch.contiguous_format)  # an expanded one
        return MemoryFormatMeta(size=tensor.shape, stride=tensor.stride())

    with mock.patch.object(MemoryFormatMeta, "from_tensor", from_tensor):
        yield


@contextmanager
def sizes_named_apart() -> Iterator[None]:
    """Name what computes sizes ``size_mul`` and so on.

    Else operators would have other numbers in their names than in a graph of fixed sizes, and what
    is known of them by name, as a calibration is, would be taken for that of another one.
    """
    honest = fx.Graph._target_to_str

    def named(graph: fx.Graph, target: Any) -> str:
        prefix = "size_" if number_function(target) else ""
        return prefix + str(honest(graph, target))

    with mock.patch.object(fx.Graph, "_target_to_str", named):
        yield


# -- symbols of a torch-level graph ----------------------------------------------------------------


def source_of(node: fx.Node) -> TensorPropertySource | None:
    """Where an input of a torch-level graph is that is a size, stride or offset of a tensor."""
    value = node.meta.get("example_value")
    if not isinstance(value, torch.SymInt):
        return None
    # As it was made: a symbol that turned out to equal another one is that other one now.
    sources = value.node.shape_env.var_to_sources.get(value.node._expr, ())
    return next((s for s in sources if isinstance(s, TensorPropertySource)), None)


def is_size(node: fx.Node) -> bool:
    """Whether an input of a torch-level graph is a size (or stride) of a tensor."""
    return source_of(node) is not None


def in_terms_of(inputs: Sequence[Any]) -> Callable[[Any], int | str]:
    """What writes sizes of one graph as numbers, or as expressions of its inputs (``"8*n2"``).

    Raises:
        CaptureError: from what it returns, for a size that the inputs do not tell.
    """
    known: dict[Any, Any] = {}
    for position, value in enumerate(inputs):
        if isinstance(value, torch.SymInt) and not value.node.expr.is_number:
            least = value.node.shape_env.bound_sympy(value.node.expr).lower
            positive = True if least > 0 else None
            symbol = sympy.Symbol(f"n{position}", integer=True, positive=positive)
            known.setdefault(value.node.expr, symbol)

    def written(size: Any) -> int | str:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr.xreplace(known)
        if not expression.free_symbols <= set(known.values()):
            raise CaptureError(
                "forward returns a view of an input whose size depends on data",
                hint="return a clone of it",
            )
        return int(expression) if expression.is_number else PythonPrinter().doprint(expression)

    return written


def name_of(node: fx.Node, found: Mapping[str, Names]) -> str:
    """What an input that is a size is called; ``""`` for other inputs and for strides."""
    source = source_of(node)
    if source is None or source.prop is not TensorProperty.SIZE:
        return ""
    return found.get(source.base.name, {}).get(source.idx or 0, "")


def sizes_of(
    shape_env: Any, found: Mapping[str, Names]
) -> tuple[tuple[Size, TensorPropertySource], ...]:
    """What became of the sizes that were to be symbols, once nothing more is asked of them.

    Each comes with where it is.
    """
    sizes = {}
    for symbol, source, name in _sizes(shape_env, found):
        if name:
            sizes[name] = _size(shape_env, symbol, name), source
    return tuple(sizes.values())


def _sizes(
    shape_env: Any, found: Mapping[str, Names]
) -> Iterator[tuple[Any, TensorPropertySource, str]]:
    """Sizes of tensors that have symbols: symbol, where it is, and what it was named, if it was."""
    for symbol, sources in shape_env.var_to_sources.items():
        for source in sources:
            of_size = isinstance(source, TensorPropertySource) and source.base.name in found
            if of_size and source.prop is TensorProperty.SIZE:
                yield symbol, source, found[source.base.name].get(source.idx or 0, "")


def _size(shape_env: Any, symbol: Any, name: str) -> Size:
    bounds = shape_env.var_to_range[symbol]
    now = shape_env.simplify(symbol)
    hint = int(_values(shape_env)[symbol])
    if now.is_number:
        return Size(name, hint, hint, hint, _line(shape_env, symbol))
    if now.is_Symbol and now is not symbol:
        bounds = bounds & shape_env.var_to_range[now]
    most = None if bounds.upper in (int_oo,) or bounds.upper > 2**62 else int(bounds.upper)
    return Size(name, hint, int(bounds.lower), most)


class Conditions:
    """Conditions on sizes that were found after Dynamo's guards were built.

    Args:
        conditions: sympy relations, all of which must hold.
        sources: for each of their symbols, Python code that reads it off a call's variables ``L``.
    """

    def __init__(self, conditions: Sequence[Any], sources: Mapping[Any, str]) -> None:
        self._conditions = tuple(conditions)
        symbols = {s for condition in conditions for s in condition.free_symbols}
        self._read = {s: compile(sources[s], "<a size>", "eval") for s in symbols}

    def __call__(self, variables: dict[str, object]) -> bool:
        """Whether they hold for a call."""
        scope = {"L": variables}
        values = {symbol: eval(code, scope) for symbol, code in self._read.items()}
        return all(bool(condition.xreplace(values)) for condition in self._conditions)

    def __str__(self) -> str:
        return ", ".join(map(str, self._conditions))


class Reading:
    """Reads the sizes that are symbols off a call's variables ``L``; of equal ones, the first.

    Args:
        shape_env: of the capture, once nothing more is asked of it.
        found: names of the sizes that were to be symbols.

    Attributes:
        places: where they are.
    """

    def __init__(self, shape_env: Any, found: Mapping[str, Names]) -> None:
        places: dict[Any, TensorPropertySource] = {}
        for symbol, source, _ in _sizes(shape_env, found):
            now = shape_env.simplify(symbol)
            if not now.is_number:
                places.setdefault(now, source)
        self.places = tuple(places.values())
        self._codes = tuple(compile(place.name, "<a size>", "eval") for place in self.places)

    def __call__(self, variables: dict[str, object]) -> tuple[int, ...]:
        """Sizes of a call."""
        scope = {"L": variables}
        return tuple(eval(code, scope) for code in self._codes)


class Watch:
    """What is asked of symbols from now on: by passes, and by backends that generate code.

    Args:
        shape_env: whose guards have been built just now.
        known: how many of what was asked is known to hold; by default all.
        sources: Python code that reads symbols off a call; by default where torch has them from.
    """

    def __init__(
        self, shape_env: Any, known: int | None = None, sources: Mapping[Any, str] | None = None
    ) -> None:
        self._shape_env = shape_env
        self._known = len(shape_env.guards) if known is None else known
        self._sources = sources
        shape_env.frozen = False  # else it would forget what is asked

    def found(self) -> Conditions | None:
        """The conditions that came up, if any; nothing is watched any more."""
        env = self._shape_env
        known = {guard.expr for guard in env.guards[: self._known]}  # and is asked again
        asked = dict.fromkeys(guard.expr for guard in env.guards[self._known :])
        conditions = [condition for condition in asked if condition not in known]
        env.freeze()
        if not conditions:
            return None
        own = {symbol: found[0].name for symbol, found in env.var_to_sources.items() if found}
        return Conditions(conditions, own if self._sources is None else self._sources)


def _values(shape_env: Any) -> Mapping[Any, Any]:
    found = getattr(shape_env, "backed_var_to_val", None)
    return found if found is not None else shape_env.var_to_val  # type: ignore[no-any-return]


def _line(shape_env: Any, symbol: Any) -> str:
    """Where the last guard on a symbol comes from in the user's code."""
    for guard in reversed(shape_env.guards):
        if symbol in guard.expr.free_symbols and guard.sloc.maybe_user_loc:
            return str(guard.sloc.maybe_user_loc)
    return ""
