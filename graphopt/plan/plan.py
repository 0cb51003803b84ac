"""The plan: everything that was decided for one specialisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from graphopt import registry
from graphopt.errors import PlanError, PluginError, SpecError
from graphopt.plan.part import PlanPart, from_data, to_data
from graphopt.plan.signature import OutputAlias, Signature

P = TypeVar("P", bound=PlanPart)


@dataclass(frozen=True)
class Plan:
    """Everything that was decided for one specialisation.

    Attributes:
        spec: the passes that ran, in the spec language.
        signature: inputs and outputs of the final graph.
        backend: name of the backend that runs it.
        gradient_sources: for each ``GRAD`` output, in order, the tangents it depends on. A gradient
            all of whose tangents are absent is absent, as in eager.
        aliases: outputs of the model that the graph does not compute.
        facts: what the passes provided.
        parts: what each method decided, in pipeline order; at most one of each name.

    Raises:
        PlanError: two parts have the same name.
    """

    spec: str
    signature: Signature
    backend: str = "eager"
    gradient_sources: tuple[tuple[int, ...], ...] = ()
    aliases: tuple[OutputAlias, ...] = ()
    facts: tuple[str, ...] = ()
    parts: tuple[PlanPart, ...] = ()

    def __post_init__(self) -> None:
        names = [part.name for part in self.parts]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise PlanError(
                f"the plan has two parts of the name {twice!r}",
                hint=f"run one pass {twice!r} in a pipeline",
            )

    def part(self, kind: type[P]) -> P | None:
        """The part of this class, if a pass left one."""
        found = (part for part in self.parts if isinstance(part, kind))
        return next(found, None)

    def to_json(self) -> str:
        """The plan as JSON text with sorted keys.

        Raises:
            PlanError: a part holds something that JSON does not have.
        """
        data = {f.name: to_data(getattr(self, f.name)) for f in fields(self) if f.name != "parts"}
        data["parts"] = [_part_to_data(part) for part in self.parts]
        return json.dumps(data, sort_keys=True, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The inverse of `to_json`.

        Raises:
            PlanError: the text is no plan, or was written by another version of a method.
            PluginError: a method that it names is not installed.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            given = [(one.pop("part"), one.pop("version"), one) for one in data.pop("parts")]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"the text is no plan: {type(error).__name__}: {error}",
                hint="give what Plan.to_json has written",
            ) from error
        parts = tuple(_part_from_data(*one) for one in given)
        rest = from_data(cls, {**data, "parts": []})
        return cls(**{**vars(rest), "parts": parts})

    @property
    def digest(self) -> str:
        """A hash that is equal on all ranks exactly when their plans are equal."""
        return _hash(self.to_json())

    def outline(self) -> str:
        """One line per decision of the passes, short and equal exactly when the decisions are.

        What depends on the batch of one rank (sizes of aliased outputs) is left out.
        """
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"passes {self.spec}"
        for part in self.parts:
            data = _part_to_data(part)
            for key, value in data.items():
                yield f"{part.name} {key} {_hash(json.dumps(value, sort_keys=True))}"


def _part_to_data(part: PlanPart) -> dict[str, Any]:
    return {"part": part.name, "version": part.version, **to_data(part)}


def _part_from_data(name: object, version: object, data: dict[str, Any]) -> PlanPart:
    if not isinstance(name, str):
        raise PlanError(
            f"the plan has a part whose name is {name!r:.80}, a {type(name).__name__}",
            hint="give what Plan.to_json has written",
        )
    try:
        kind = cast("type[PlanPart]", registry.get(name, registry.PLAN_PARTS))
    except SpecError as error:
        raise PluginError(
            f"the plan has a part {name!r}, and no package that is installed knows it",
            hint=error.hint,
        ) from error
    if kind.version != version:
        raise PlanError(
            f"the plan has version {version!r:.80} of part {name!r}, and version {kind.version} is "
            "installed",
            hint="make the plan anew",
        )
    return from_data(kind, data)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_part(part: object, name: str) -> None:
    """Whether this is a part that the pass of this name may leave in a plan.

    Raises:
        PlanError: it is none, has another name, or does not survive the way through JSON.
    """
    if not isinstance(part, PlanPart):
        raise PlanError(f"its plan part is a {type(part).__name__}, not a PlanPart")
    # The base is a dataclass, so a subclass that is none would lose its fields silently.
    if "__dataclass_fields__" not in vars(type(part)):
        raise PlanError(
            f"its plan part is a {type(part).__name__}, which is no dataclass",
            hint="put @dataclass(frozen=True) above the class",
        )
    if part.name != name:
        raise PlanError(f"its plan part says its name is {part.name!r}")
    if from_data(type(part), json.loads(json.dumps(to_data(part)))) != part:
        raise PlanError("its plan part is another one after a way through JSON")
