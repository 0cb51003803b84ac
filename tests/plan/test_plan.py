"""Plans: JSON both ways, their hash, and what is wrong with some."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import PlanError, PluginError
from graphopt.graph import Graph
from graphopt.passbase import Applied, Outcome, Pass, PassContext
from graphopt.plan import OutputAlias, Phase, Plan, PlanPart, Role, Signature, Slot
from graphopt.plan.kfac import Curvature
from tests.support.methods import METHODS, write_methods

X = torch.randn(4, 3)


def _plan(*parts: PlanPart) -> Plan:
    signature = Signature(
        (Slot(Role.PARAM, "w"), Slot(Role.TANGENT, "0", Phase.BACKWARD)),
        (Slot(Role.OUTPUT, "0"), Slot(Role.GRAD, "w", Phase.BACKWARD)),
    )
    alias = OutputAlias(1, 0, (2,), (1,), 3)
    return Plan("right", signature, "eager", ((0,),), (alias,), ("captured",), parts)


def _right(*names: str) -> PlanPart:
    return METHODS["right"]["plan"](names)  # type: ignore[no-any-return]


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_methods(tmp_path))


@pytest.mark.usefixtures("methods")
def test_a_plan_with_parts_survives_json() -> None:
    spec = "kfac{damping=0.01},right"
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    plan = graphopt.optimize(model, (X,), passes=spec, dry_run=True)
    assert isinstance(plan, Plan)
    assert [part.name for part in plan.parts] == ["kfac", "right"]
    assert Plan.from_json(plan.to_json()) == plan
    curvature = plan.part(Curvature)
    assert curvature is not None
    assert curvature.damping == 0.01
    assert plan.part(METHODS["right"]["plan"]) == _right("0.bias", "0.weight")
    assert plan.part(METHODS["is_alone"]["plan"]) is None


@pytest.mark.usefixtures("methods")
def test_digest_and_outline_follow_the_decisions() -> None:
    plan = _plan(_right("w"))
    read = Plan.from_json(plan.to_json())
    assert read == plan
    assert read.digest == plan.digest
    other = _plan(_right("w", "v"))
    assert other.digest != plan.digest
    assert other.outline() != plan.outline()
    assert [line.split()[:2] for line in plan.outline().splitlines()] == [
        ["passes", "right"],
        ["right", "part"],
        ["right", "version"],
        ["right", "parameters"],
    ]
    # What depends on the batch of one rank is in the digest, and not in the outline.
    longer = replace(plan, aliases=(OutputAlias(1, 0, (7,), (1,), 3),))
    assert longer.outline() == plan.outline()
    assert longer.digest != plan.digest


def test_two_parts_of_one_name() -> None:
    with pytest.raises(PlanError, match="the plan has two parts of the name 'right'"):
        _plan(_right("w"), _right("v"))


def _edited(edit: Callable[[dict[str, Any]], object]) -> str:
    data = json.loads(_plan(_right("w")).to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    ("text", "error", "sentence"),
    [
        ("no json", PlanError, "the text is no plan: JSONDecodeError"),
        ("[]", PlanError, "the text is no plan: TypeError"),
        ("3", PlanError, "the text is no plan: AttributeError"),
        ("{}", PlanError, "the text is no plan: KeyError: 'parts'"),
        (
            _edited(lambda d: d["parts"][0].update(version=2)),
            PlanError,
            "the plan has version 2 of part 'right', and version 1 is installed",
        ),
        (
            _edited(lambda d: d["parts"][0].update(part="elsewhere")),
            PluginError,
            "the plan has a part 'elsewhere', and no package that is installed knows it",
        ),
        *(
            (
                _edited(lambda d, name=name: d["parts"][0].update(part=name)),
                PlanError,
                f"the plan has a part whose name is {re.escape(repr(name))}, a {kind}",
            )
            for name, kind in ((3, "int"), (None, "NoneType"), ([], "list"), ({"a": 1}, "dict"))
        ),
        (
            _edited(lambda d: d["parts"][0].update(version=[1])),
            PlanError,
            r"the plan has version \[1\] of part 'right'",
        ),
        ("[" * 100_000, PlanError, "the text is no plan: RecursionError"),
        (
            _edited(lambda d: d["parts"].append(dict(d["parts"][0]))),
            PlanError,
            "two parts of the name 'right'",
        ),
        (_edited(lambda d: d["parts"][0].pop("parameters")), PlanError, "lacks the field 'param"),
        (_edited(lambda d: d.update(backend=3)), PlanError, "backend should be str and is 3"),
        (_edited(lambda d: d.pop("facts")), PlanError, "Plan lacks the field 'facts'"),
        (
            _edited(lambda d: d["signature"]["outputs"].reverse()),
            PlanError,
            "signature refuses its values: forward outputs must come before backward outputs",
        ),
    ],
)
def test_texts_that_are_no_plan(text: str, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Plan.from_json(text)


def _with_alias(size: object) -> str:
    return _edited(lambda d: d["aliases"][0].update(size=[size]))


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (_edited(lambda d: d.update(format=2)), "the plan has format 2, and this graphopt reads 1"),
        (_edited(lambda d: d.update(format=True)), "the plan has format True"),
        (_edited(lambda d: d.update(backend="fast")), "there is no backend 'fast'"),
        (
            _edited(lambda d: d.update(gradient_sources=[[0], [0]])),
            "2 gradients have sources, of 1",
        ),
        (_edited(lambda d: d.update(gradient_sources=[[1]])), "a tangent that is none of 1"),
        (_edited(lambda d: d.update(gradient_sources=[[-1]])), "should be at least 0 and is -1"),
        (_edited(lambda d: d["aliases"][0].update(input=9)), "an input that is none of 2"),
        (_edited(lambda d: d["aliases"][0].update(stride=[])), "1 sizes have 0 strides"),
        (_edited(lambda d: d["signature"]["inputs"][0].update(role="grad")), "is no input"),
        (_edited(lambda d: d["facts"].append("captured")), "a fact is there twice"),
        (
            _edited(lambda d: None).replace('"facts"', '"spec": "x", "facts"'),
            "a key is there twice",
        ),
        (_with_alias("__import__('os').getpid()"), "is no size of a view"),
        (_with_alias("9**9**9"), "is no size of a view"),
        (_with_alias("n0.real"), "is no size of a view"),
        (_with_alias("max(n0, 2) * 3 + n9"), "read off an input that is none of 2"),
        (_with_alias(10**400), "should be"),
    ],
)
def test_wrong_values_are_refused(text: str, sentence: str) -> None:
    with pytest.raises(PlanError, match=re.escape(sentence)):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"damping": 0.01', '"damping": -1.0', "kfac.damping should be positive and is -1.0"),
        ('"damping": 0.01', '"damping": Infinity', "kfac.damping should be positive and is inf"),
        ('"solver": "factored"', '"solver": "best"', "kfac.solver should be one of 'factored', "),
        ('"form": "dense"', '"form": "low-rank"', "has no rank of 0"),
        ('"kind": "kronecker"', '"kind": "unitwise"', "is unitwise and has 2 sides"),
        ('"rows": 3', '"rows": 0', "rows should be at least 1 and is 0"),
    ],
)
def test_decisions_out_of_their_range(old: str, new: str, sentence: str) -> None:
    plan = graphopt.optimize(nn.Linear(3, 3), (X,), passes="kfac{damping=0.01}", dry_run=True)
    text = plan.to_json()
    assert old in text
    with pytest.raises(PlanError, match=re.escape(sentence)):
        Plan.from_json(text.replace(old, new))


def test_a_number_of_a_part_that_is_nan() -> None:
    model = nn.Linear(3, 3)
    plan = graphopt.optimize(model, (X,), passes="kfac{damping=0.01}", dry_run=True)
    text = plan.to_json()
    assert '"damping": 0.01' in text
    with pytest.raises(PlanError, match=r"kfac\.damping is NaN, which no plan may hold"):
        Plan.from_json(text.replace('"damping": 0.01', '"damping": NaN'))


# -- what passes leave -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Holds(PlanPart):
    name: ClassVar[str] = "leaves"

    value: object


@dataclass(frozen=True)
class Leaves(Pass):
    """Leaves whatever it is told to."""

    name: ClassVar[str] = "leaves"
    what: ClassVar[object] = None

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return Outcome((Applied("all", "seen"),), part=self.what)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (Holds(torch.zeros(1)), "value is a Tensor, which JSON does not have"),
        ({"a": 1}, "its plan part is a dict, not a PlanPart"),
        (_right("w"), "its plan part says its name is 'right'"),
    ],
)
def test_a_part_that_cannot_be_left(
    what: object, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Leaves, "what", what)
    model = nn.Linear(3, 2)
    graphopt.optimize(model, passes=[Leaves()], backend="eager")
    with pytest.raises(PlanError) as caught:
        model(X)
    assert caught.value.message.startswith("pass 'leaves' failed: ")
    assert sentence in caught.value.message
    assert type(model) is nn.Linear


@pytest.mark.usefixtures("methods")
def test_one_method_twice_in_a_pipeline() -> None:
    model = nn.Linear(3, 2)
    graphopt.optimize(model, passes="right,right", backend="eager")
    with pytest.raises(PlanError, match="the plan has two parts of the name 'right'"):
        model(X)
    assert type(model) is nn.Linear
