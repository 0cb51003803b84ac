"""Where padding comes into what a model computes: the first operators that differ."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graphopt.data.positions import Padded, closest

SHOWN = 3
"""Leaks that are told, at most."""

_HERE = os.path.dirname(__file__)
_TORCH = os.path.dirname(torch.__file__)

# What an operator does with padding, by a part of its name.
_SAYS = (
    (("batch_norm", "group_norm", "layer_norm", "instance_norm"), "takes statistics over padding"),
    (("softmax",), "normalises over padding: scores there are not masked"),
    (("attention",), "attends to padding"),
    (("nll_loss", "cross_entropy", "mse_loss", "l1_loss", "ctc_loss"), "counts padding as true"),
    (("arange", "linspace"), "counts positions by the padded length"),
    (
        ("flip", "roll", "select", "slice", "index", "gather"),
        "picks positions by the padded length",
    ),
    (("conv",), "reads padding beside true positions"),
    (("lstm", "gru", "rnn"), "reads padding before or after true positions"),
    (("cumsum", "cumprod", "fft"), "reads padding before or after true positions"),
    (
        (
            *("mean", "sum", "max", "min", "var", "std", "prod", "norm", "pool", "logsumexp"),
            *("sort", "topk", "median", "argm", "mm", "dot"),
        ),
        "reduces over padding",
    ),
)
_EMPTY = "empty"  # memory that nobody has written differs

_Part: TypeAlias = tuple[int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Leak:
    """One place where padding changes a result whose operands are right.

    Attributes:
        operator: which one, such as ``"mean.dim"``.
        says: what it does.
        module: path of the module that ran it; empty for the model itself.
        line: the user's source line.
    """

    operator: str
    says: str
    module: str
    line: str

    @property
    def place(self) -> str:
        """Module and line."""
        return f"in {self.module}, at {self.line}" if self.module else f"at {self.line}"

    def __str__(self) -> str:
        return f"{self.operator} {self.says}\n    {self.place}"


@dataclass
class _Record:
    operator: str
    results: list[Tensor]  # copies
    sources: set[int]  # operators that made its operands
    module: str
    line: str


@dataclass
class Recorder:
    """Every operator of a forward.

    Attributes:
        records: in order.
        outputs: of forward, by path.
    """

    records: list[_Record] = field(default_factory=list)
    outputs: dict[str, Tensor] = field(default_factory=dict)
    _made: dict[int, dict[_Part | None, int]] = field(default_factory=dict)  # by storage
    _alive: list[object] = field(default_factory=list)  # so that no address is used twice
    _modules: list[str] = field(default_factory=list)

    @contextmanager
    def follow(self, model: nn.Module) -> Iterator[None]:
        """Within, operators are kept."""
        with ExitStack() as stack:
            for name, module in model.named_modules():
                before = module.register_forward_pre_hook(self._enter(name))
                after = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(_Watching(self))
            yield

    def add(self, operator: str, arguments: object, result: object, *, writes: bool) -> None:
        """Keep one operator; `writes` says whether it changes an operand."""
        tensors = _strided(result)
        operands = _strided(arguments)
        sources = {n for t in operands if (n := self._maker(t)) is not None}
        known = {_storage(t) for t in operands}
        number = len(self.records)
        for tensor in tensors:
            parts = self._made.setdefault(_storage(tensor), {})
            if writes or _storage(tensor) not in known:  # all of it is new, and no view
                parts.clear()
                parts[None] = number
            parts[_part(tensor)] = number
        self._alive.append(tensors)
        copies = [t.detach().clone() for t in tensors]
        module = self._modules[-1] if self._modules else ""
        self.records.append(_Record(operator, copies, sources, module, _line()))

    def maker(self, name: str) -> int | None:
        """The operator that made an output."""
        return self._maker(self.outputs[name])

    def _maker(self, tensor: Tensor) -> int | None:
        parts = self._made.get(_storage(tensor), {})
        return parts.get(_part(tensor), parts.get(None))

    def _enter(self, name: str) -> Callable[..., None]:
        return lambda *_: self._modules.append(name)

    def _leave(self, *_: object) -> None:
        self._modules.pop()


class _Watching(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        schema = getattr(func, "_schema", None)
        writes = schema is not None and schema.is_mutable
        name = str(func).removeprefix("aten.").removesuffix(".default")
        self._recorder.add(name, (args, kwargs), result, writes=writes)
        return result


def find_leaks(
    without: Recorder, padded: Recorder, layout: Padded, allowed: float
) -> tuple[Leak, ...]:
    """Operators whose operands agree at true positions and whose results do not.

    Where outputs differ, those that lead to them through results that differ; else all of them.
    Forward may take another way with padding: operators that run in one of the two only are passed
    over.

    Args:
        without: forward without padding.
        padded: the same with it.
        layout: of the padding.
        allowed: the relative error that rounding explains.
    """
    partners = _partners(without.records, padded.records)
    differ: set[int] = set()
    first: list[int] = []
    for number, record in enumerate(padded.records):
        sources = record.sources & differ
        partner = partners.get(number)
        if partner is None:
            apart = bool(sources)
        else:
            one = without.records[partner]
            apart = _EMPTY not in record.operator and _apart(one, record, layout, allowed)
            if apart and not sources:
                first.append(number)
        if apart:
            differ.add(number)
    ends = {padded.maker(name) for name in padded.outputs} & differ
    if ends:
        led = _ancestors(padded.records, ends, differ)
        first = [number for number in first if number in led]
    found: dict[tuple[str, str], Leak] = {}
    for number in first:
        record = padded.records[number]
        leak = Leak(record.operator, _says(record.operator), record.module, record.line)
        found.setdefault((leak.operator, leak.line), leak)
    return tuple(found.values())[:SHOWN]


def _partners(without: Sequence[_Record], padded: Sequence[_Record]) -> dict[int, int]:
    """For operators of the padded forward the same one without padding."""
    one, two = ([(r.operator, r.line) for r in records] for records in (without, padded))
    if one == two:
        return {number: number for number in range(len(padded))}
    blocks = SequenceMatcher(None, one, two, autojunk=False).get_matching_blocks()
    return {b + i: a + i for a, b, size in blocks for i in range(size)}


def _strided(values: object) -> list[Tensor]:
    leaves = tree_leaves(values)
    return [t for t in leaves if isinstance(t, Tensor) and t.layout is torch.strided]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _part(tensor: Tensor) -> _Part:
    """Which part of its storage a tensor is; autograd makes objects anew."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()


def _apart(one: _Record, two: _Record, layout: Padded, allowed: float) -> bool:
    places = [closest(a, b, layout) for a, b in zip(one.results, two.results, strict=False)]
    return any(place is not None and place.error > allowed for place in places)


def _ancestors(records: Sequence[_Record], ends: set[int | None], within: set[int]) -> set[int]:
    """These operators and those of `within` that their operands come from, one after the other."""
    seen: set[int] = set()
    queue = [end for end in ends if end is not None]
    while queue:
        number = queue.pop()
        if number not in seen:
            seen.add(number)
            queue.extend(records[number].sources & within)
    return seen


def _says(operator: str) -> str:
    name = operator.partition(".")[0]
    for parts, said in _SAYS:
        if any(part in name for part in parts):
            return said
    return "depends on padding"


def _line() -> str:
    """The innermost line that is neither torch's nor graphopt's."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if not (file.startswith((_HERE, _TORCH, "<")) or os.sep + "contextlib" in file):
            place = os.path.relpath(file) if file.startswith(os.getcwd() + os.sep) else file
            line = linecache.getline(file, frame.f_lineno).strip()
            return f"{place}:{frame.f_lineno}: {line}"
        frame = frame.f_back
    return ""
