"""Reports: the text for people, the JSON for programs, the HTML for notebooks."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from graphopt.model.entries import BackendChoice, Specialisation, Verification
from graphopt.model.report import Report
from graphopt.passbase import ALGORITHM, EXACT, Applied, Declined, Outcome
from graphopt.pipeline.step import PassStep
from graphopt.plan import Plan, Role, Signature, Slot

MERGED = tuple(Applied(f"view_{i}", "merged duplicate") for i in range(5))
SCALED = (Applied("head.weight", "scaled", {"bytes": 4096, "factor": 1 / 3}),)
DECLINED = (
    Declined("dropout", "random-op", "Two draws are two different values.", {"draws": 2}),
    Declined("dropout_1", "random-op", "Two draws are two different values."),
    Declined("a<b>&c", "too-small", "Below the size that pays."),
)
PLAN = Plan("cleanup", Signature((Slot(Role.INPUT, "0"),), (Slot(Role.OUTPUT, "0"),)))
TRAIN = Specialisation(
    signature="f32[8, 3], train",
    level="joint",
    route="dynamo",
    capture_seconds=1.234,
    steps=(
        PassStep("cleanup", EXACT, Outcome(SCALED + MERGED, DECLINED), 0.0123, 0.00045, 140, 131),
        PassStep("kfac{damping=0.01}", ALGORITHM, Outcome(), 0.5, 0.0, 131, 131),
    ),
    backend=BackendChoice(
        "eager", "auto", "the faster of the two", {"inductor": 0.02, "eager": 0.01}
    ),
    verification=Verification("eager", "within tolerance", "head.weight", 3.2e-6, 0.2),
    plan=PLAN,
    notes=("the loss is outside of the graph",),
)
EVAL = Specialisation(
    signature="f32[8, 3], eval",
    level="inference",
    route="export",
    capture_seconds=0.3,
    steps=(PassStep("kfac", ALGORITHM, Outcome(), 0.0, 0.0, 60, 60, "it works on joint graphs"),),
    backend=BackendChoice("inductor", "inductor", "as asked"),
    verification=Verification("structure", "not run"),
    plan=PLAN,
)
REPORT = Report("ResNet", "cleanup,kfac{damping=0.01}", (TRAIN, EVAL), ("one re-capture",))

TEXT = f"""\
graphopt on ResNet
passes: cleanup,kfac{{damping=0.01}}

specialisation 1 of 2: f32[8, 3], train
  captured   joint graph by dynamo in 1.23 s
  nodes      140 -> 131
  pass       cleanup: 140 -> 131 nodes, exact, 12.3 ms, checked in 450 us
    applied    5 x merged duplicate: view_0, view_1, view_2, 2 more
    applied    1 x scaled: head.weight (bytes=4096, factor=0.3333)
    declined   2 x random-op: dropout (draws=2), dropout_1
               Two draws are two different values.
    declined   1 x too-small: a<b>&c
               Below the size that pays.
  pass       kfac{{damping=0.01}}: 131 -> 131 nodes, algorithm, 500.0 ms
    no candidate site in this graph
  backend    eager (asked: auto): the faster of the two [eager 10.0 ms, inductor 20.0 ms]
  verified   eager: within tolerance, worst head.weight by 3.2e-06 in 200.0 ms
  plan       {PLAN.digest}
  note       the loss is outside of the graph

specialisation 2 of 2: f32[8, 3], eval
  captured   inference graph by export in 300.0 ms
  pass       kfac: skipped, it works on joint graphs
  backend    inductor: as asked
  verified   structure: not compared with eager
  plan       {PLAN.digest}

note: one re-capture"""


def test_explain():
    assert REPORT.explain() == TEXT


def test_explain_before_the_first_call():
    assert Report("MLP", "").explain() == (
        "graphopt on MLP\npasses: none\nnothing is captured yet: the first call does it"
    )


def test_explain_does_not_count_a_single_specialisation():
    text = Report("MLP", "", (TRAIN,)).explain()
    assert "\nspecialisation: f32[8, 3], train\n" in text


def test_json_holds_everything():
    data = json.loads(REPORT.to_json())
    assert data["model"] == "ResNet"
    train, evaluation = data["specialisations"]
    assert train["signature"] == TRAIN.signature
    assert train["steps"][0]["outcome"]["applied"][0]["numbers"]["bytes"] == 4096
    assert train["steps"][0]["outcome"]["declined"][2]["site"] == "a<b>&c"
    assert train["steps"][1]["numerics"] == {"kind": "algorithm", "bound": "inf"}
    assert train["plan"] == json.loads(PLAN.to_json())
    assert evaluation["steps"][0]["skipped"] == "it works on joint graphs"


def test_json_is_stable_and_strict():
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = REPORT.to_json()
    data = json.loads(text, parse_constant=refuse)
    assert text == json.dumps(data, sort_keys=True, indent=1)
    other = replace(TRAIN.backend, seconds={"eager": 0.01, "inductor": 0.02})
    assert replace(REPORT, specialisations=(replace(TRAIN, backend=other), EVAL)).to_json() == text


class _Balance(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("report", [REPORT, Report("<script>", "")])
def test_html_is_balanced_self_contained_and_escaped(report):
    parser = _Balance()
    parser.feed(report._repr_html_())
    parser.close()
    assert not parser.open
    assert not {"script", "link", "img", "b>"} & set(parser.seen)
    assert report.model in parser.text
    # Each specialisation folds, and each of its steps.
    steps = sum(len(item.steps) for item in report.specialisations)
    assert parser.seen.count("details") == len(report.specialisations) + steps


def test_html_says_what_the_text_says():
    parser = _Balance()
    parser.feed(REPORT._repr_html_())
    counters = ("specialisation 1 of 2: ", "specialisation 2 of 2: ")
    lines = TEXT.replace(counters[0], "").replace(counters[1], "").split("\n")
    assert [line for line in lines if line.strip() not in parser.text] == []
