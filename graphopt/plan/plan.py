"""The plan: everything that was decided for one specialisation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar, cast

from graphopt import registry
from graphopt.errors import PlanError, PluginError, SpecError
from graphopt.plan.limits import Count
from graphopt.plan.part import PlanPart, from_data, to_data
from graphopt.plan.signature import INPUT_ROLES, OUTPUT_ROLES, OutputAlias, Role, Signature

P = TypeVar("P", bound=PlanPart)

FORMAT_VERSION = 1  # of the JSON text; parts have versions of their own


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
    gradient_sources: tuple[tuple[Count, ...], ...] = ()
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
        data["format"] = FORMAT_VERSION
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
            data: dict[str, Any] = json.loads(text, object_pairs_hook=_once)
            given = [(one.pop("part"), one.pop("version"), one) for one in data.pop("parts")]
            version = data.pop("format")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"the text is no plan: {type(error).__name__}: {error}",
                hint="give what Plan.to_json has written",
            ) from error
        if type(version) is not int or version != FORMAT_VERSION:
            raise PlanError(
                f"the plan has format {version!r:.40}, and this graphopt reads {FORMAT_VERSION}",
                hint="make the plan anew",
            )
        parts = tuple(_part_from_data(*one) for one in given)
        rest = from_data(cls, {**data, "parts": []})
        plan = cls(**{**vars(rest), "parts": parts})
        _check(plan)
        return plan

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


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of two values of one key, one would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check(plan: Plan) -> None:
    """Whether all that a plan says goes together.

    Raises:
        PlanError: it does not; says what.
    """
    signature, wrong = plan.signature, ""
    inputs, outputs = len(signature.inputs), len(signature.outputs)
    tangents, sources = len(signature.names(Role.TANGENT)), plan.gradient_sources
    odd = [f"{s} is no input" for s in signature.inputs if s.role not in INPUT_ROLES]
    odd += [f"{s} is no output" for s in signature.outputs if s.role not in OUTPUT_ROLES]
    if odd:
        wrong = odd[0]
    elif plan.backend not in registry.names(registry.BACKENDS):
        wrong = f"there is no backend {plan.backend!r:.40}"
    elif any(
        len({(s.role, s.name) for s in slots}) < len(slots)
        for slots in (signature.inputs, signature.outputs)
    ):
        wrong = "two inputs or two outputs have one role and name"
    elif sources and len(sources) != len(signature.names(Role.GRAD)):
        wrong = f"{len(sources)} gradients have sources, of {len(signature.names(Role.GRAD))}"
    elif any(tangent >= tangents for source in sources for tangent in source):
        wrong = f"a gradient depends on a tangent that is none of {tangents}"
    elif any(alias.input >= inputs for alias in plan.aliases):
        wrong = f"an output is an input that is none of {inputs}"
    elif len({alias.output for alias in plan.aliases}) < len(plan.aliases):
        wrong = "an output has two aliases"
    elif any(n >= inputs for alias in plan.aliases for n in alias.reads()):
        wrong = f"the size of a view is read off an input that is none of {inputs}"
    elif any(alias.output >= outputs + len(plan.aliases) for alias in plan.aliases):
        wrong = f"an alias is an output that is none of {outputs + len(plan.aliases)}"
    elif len(set(plan.facts)) < len(plan.facts):
        wrong = "a fact is there twice"
    if wrong:
        raise PlanError(f"the plan does not go together: {wrong}", hint="make the plan anew")


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
    if type(version) is not int or kind.version != version:
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
