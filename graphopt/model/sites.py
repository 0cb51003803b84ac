"""Call sites of one model: how often each was captured, what changed, and when it is enough.

A call site is a form of the model: training or evaluation, with or without gradients, under
autocast. One that is captured again and again costs seconds each time, so that is said once, with
the value that changes; and after a limit no further graph is made for it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from graphopt.errors import CaptureError
from graphopt.model.varying import Cause
from graphopt.notices import warn

# How many specialisations of one site are kept; the least recently used one goes first.
MAX_SPECIALISATIONS = 8
# How often one site is captured at most.
MAX_CAPTURES = 32
# After so many captures it is said that there are many: at the third one that was made again.
MANY = 4

# Of what was dropped, as many are named in the report.
_NAMED = 4
# Of the values that one thing had, as many are named.
_SHOWN = 6

_TRY = (
    "Pad or bucket inputs to a few sizes (graphopt.data.bucket), and keep numbers that change in "
    "tensors (register_buffer)"
)

_MISMATCH = re.compile(r"^tensor '(L\[.+)' (\w+) mismatch.*?\. expected (.+), actual (.+)$")
_REQUIRES_GRAD = re.compile(r"^tensor '(L\[.+)' requires_grad mismatch\. expected .*=(\d)$")
_SIZES = re.compile(
    r"(size|stride) mismatch|\.size\(\)|\.stride\(\)|\.storage_offset\(\)|^a pass or a backend"
)
_TYPE = re.compile(r"^___check_type_id\((L\[.+?), \d+\), type=<class '(.+?)'>$")
_EQUAL = re.compile(r"^(.*L\[.+?) (?:==|is) (.+)$")


@dataclass(frozen=True)
class Change:
    """What a call has other than the captured ones.

    Attributes:
        name: a size, a number or what else has a value (``ids.1``, ``self.temp``, ``dtype of x``);
            where it is none of these, the condition that does not hold.
        before: its value in a captured call; empty for a condition.
        now: its value in this call.
        line: the user's line that reads it, where it is known.
    """

    name: str
    before: str = ""
    now: str = ""
    line: str = ""

    def __str__(self) -> str:
        if not self.before:
            return f"{self.name!r} no longer holds"
        return f"{self.name} was {self.before} and is {self.now}"


def changes_of(
    failure: str, sizes: Mapping[str, tuple[int, int]], variables: Mapping[str, object]
) -> tuple[Change, ...]:
    """What makes a call another one than those that were captured.

    Args:
        failure: the first guard that does not hold, as Dynamo words it.
        sizes: those of arguments that differ, before and now.
        variables: of the call, by the names that forward gives them.
    """
    of_sizes = tuple(Change(n, str(a), str(b)) for n, (a, b) in sorted(sizes.items()))
    condition, _, comment = failure.partition("  #")
    condition = condition.strip()
    if of_sizes and (not condition or _SIZES.search(condition)):
        return of_sizes
    line = comment.partition(" (HINT:")[0].strip()
    if found := _REQUIRES_GRAD.match(condition):
        before = bool(int(found[2]))
        return (Change(f"requires_grad of {_name(found[1])}", str(before), str(not before)),)
    if found := _MISMATCH.match(condition):
        return (Change(f"{found[2]} of {_name(found[1])}", found[3], found[4]),)
    if found := _TYPE.match(condition):
        kind = _value(found[1], variables, type)
        return (Change(f"type of {_name(found[1])}", found[2].rpartition(".")[2], kind, line),)
    if found := _EQUAL.match(condition):
        return (Change(_name(found[1]), found[2], _value(found[1], variables), line),)
    return (Change(_name(condition), line=line),) if condition else ()


def _name(source: str) -> str:
    """As users write it."""
    text = Cause(source, "", number=False).name
    return re.sub(r"L\['(\w+)'\]", r"\1", text)


def _value(
    source: str,
    variables: Mapping[str, object],
    of: Callable[[object], object] = lambda value: value,
) -> str:
    """What a source of Dynamo is in this call, or something of it."""
    try:
        value = of(eval(source, {"L": variables}))
    except Exception:  # a source that only Dynamo's own code can evaluate
        return "another one"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:40]
    return value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"


def variables_of(
    forward: Callable[..., object],
    model: nn.Module,
    args: Sequence[object],
    kwargs: Mapping[str, object],
) -> dict[str, object]:
    """The arguments of a call, `self` among them, by the names that forward gives them."""
    try:
        bound = inspect.signature(forward, follow_wrapped=False).bind(model, *args, **kwargs)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


@dataclass
class Site:
    """One form of a model.

    Attributes:
        name: in words (``"training"``).
        captures: how many there were.
        unsettled: how many of them hold for no more values of what had changed than one.
        ended: whether it was said that no further one is made.
        dropped: calls whose graphs were dropped; the last ones.
        forgotten: how many graphs were dropped.
    """

    name: str
    captures: int = 0
    unsettled: int = 0
    ended: bool = False
    dropped: list[str] = field(default_factory=list)
    forgotten: int = 0
    _values: dict[str, list[str]] = field(default_factory=dict)
    _lines: dict[str, str] = field(default_factory=dict)

    @property
    def enough(self) -> bool:
        """Whether it was captured as often as it may."""
        return self.captures >= MAX_CAPTURES

    def captured(self, changes: Sequence[Change], symbols: Collection[str] = ()) -> bool:
        """Note a capture, what made it one more, and which sizes are symbols of it.

        Returns:
            whether it has to be said that there are many: sizes that became symbols are settled.
        """
        self.captures += 1
        settled = bool(changes) and all(change.name in symbols for change in changes)
        self.unsettled += not settled
        for change in changes:
            values = self._values.setdefault(change.name, [change.before] if change.before else [])
            values.append(change.now)
            self._lines.setdefault(change.name, change.line)
        return not settled and self.unsettled == MANY

    def drop(self, signature: str) -> None:
        """Note that a graph is dropped."""
        self.forgotten += 1
        self.dropped = [*self.dropped, signature][-_NAMED:]

    def history(self) -> str:
        """What changed, most often first: ``ids.1 was 12, then 17, 23 and 30``."""
        found = sorted(self._values.items(), key=lambda item: -len(item[1]))
        return "; ".join(self._series(name, values) for name, values in found[:_NAMED])

    def _series(self, name: str, values: Sequence[str]) -> str:
        line = self._lines[name]
        at = f" (read at: {line})" if line else ""
        first, *others = values
        if not first:
            return f"{name!r} did not hold{at}"
        if len(others) > _SHOWN:
            others = [*others[: _SHOWN - 1], "…", others[-1]]
        *more, last = others
        then = f"{', '.join(more)} and {last}" if more else last
        return f"{name} was {first}, then {then}{at}"

    def many(self, model: str, why: str) -> str:
        """That there were many captures, for the user of a model of this class name."""
        return (
            f"{self._count(model)}{f' ({why})' if why else ''}. After {MAX_CAPTURES} captures, "
            "calls for which there is no graph run plain; print(model.explain()) says what each of "
            f"them was for. {_TRY}."
        )

    def too_many(self, model: str) -> CaptureError:
        """Why no further graph is made."""
        return CaptureError(
            f"{self._count(model)}; no further graph is made",
            hint=_TRY[0].lower() + _TRY[1:],
        )

    def end(self, model: str) -> str:
        """Say that calls run plain from now on; returns a note for the report."""
        self.ended = True
        note = f"{self.too_many(model).message}, and calls that none of those kept is for run plain"
        warn(f"{note}. {_TRY}.")
        return note

    def _count(self, model: str) -> str:
        changed = f": {self.history()}" if self._values else ""
        return f"{model} was captured {self.captures} times in {self.name}{changed}"

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        if not self.forgotten:
            return ()
        more = self.forgotten - len(self.dropped)
        named = [f"{more} more", *self.dropped] if more else self.dropped
        return (
            f"dropped in {self.name}: {'; '.join(named)}. The {MAX_SPECIALISATIONS} graphs that "
            "ran last are kept",
        )


class Sites:
    """The sites of one model."""

    def __init__(self) -> None:
        self._sites: dict[Hashable, Site] = {}

    def of(self, mode: Hashable, model: nn.Module) -> Site:
        """The site of a mode that the model is in."""
        if mode not in self._sites:
            self._sites[mode] = Site("training" if model.training else "evaluation")
        return self._sites[mode]

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        return tuple(note for site in self._sites.values() for note in site.notes())
