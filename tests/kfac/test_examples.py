"""The K-FAC examples run, their methods differ, and the benchmark sums up what it should."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
import torch
from torch import nn

from benchmarks import kfac_convergence as benchmark
from benchmarks.kfac_convergence_picture import Curve, curves
from examples.kfac_digits import report
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import KFAC, METHODS, MUON, Batch, Run, Task, optimizers, train
from examples.kfac_language_model import train as characters
from graphopt.model.surface import report as report_of

SVG = "{http://www.w3.org/2000/svg}"


def problem() -> Task:
    """A linear regression in two layers whose inputs have very different scales."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 4, generator=random) * torch.tensor([3.0, 1.0, 0.3, 0.1])
    answers = inputs @ torch.tensor([[0.3], [-1.0], [3.0], [8.0]])

    def batches(seed: int) -> Iterator[Batch]:
        while True:
            yield inputs, answers

    return Task(
        name="digits",
        model=lambda: nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1)),
        batches=batches,
        loss=nn.functional.mse_loss,
        evaluate=lambda model: nn.functional.mse_loss(model(inputs), answers).item(),
        target=0.01,
        rising=False,
        steps=40,
        every=2,
        kfac="kfac{damping=1e-4,interval=1,fisher=type2,loss=mse}",
        rates={},
    )


# -- the examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("example", [digits, characters], ids=["digits", "characters"])
def test_every_method_trains_the_example(example: object) -> None:
    task = replace(example.task(), every=3)
    values = {}
    for method in METHODS:
        *_, run = train(task, method, task.rates[method], seed=0, steps=6)
        assert [step for step, _, _ in run.points] == [3, 6]
        first, last = (value for _, _, value in run.points)
        assert math.isfinite(last)
        assert last > first if task.rising else last < first
        values[method] = last
    assert len(set(values.values())) == len(METHODS)


@pytest.mark.parametrize("example", [digits, characters], ids=["digits", "characters"])
def test_kfac_preconditions_every_parameter(example: object) -> None:
    task = example.task()
    model = task.model().train()
    batch = next(task.batches(0))
    optimizers(KFAC, model, batch[0], 0.01, task.kfac)
    (captured,) = report_of(model).specialisations
    (step,) = captured.steps
    assert {a.site for a in step.outcome.applied} == {name for name, _ in model.named_parameters()}
    assert not step.outcome.declined


def test_muon_gets_inner_matrices_only() -> None:
    model = digits.network()
    muon, adamw = optimizers(MUON, model, torch.empty(0), 0.01, "")
    assert [tuple(p.shape) for p in muon.param_groups[0]["params"]] == [(128, 512)]
    counted = sum(len(o.param_groups[0]["params"]) for o in (muon, adamw))
    assert counted == len(list(model.parameters()))


def test_characters_come_with_the_next_one() -> None:
    inputs, answers = characters.windows(torch.arange(200), torch.tensor([0, 100]))
    assert inputs.shape == answers.shape == (2, characters.CONTEXT)
    assert torch.equal(answers, inputs + 1)
    assert inputs[1, 0] == 100


def test_the_character_model_does_not_look_ahead() -> None:
    model = characters.CharacterGpt(10).eval()
    text = torch.randint(10, (1, characters.CONTEXT))
    changed = text.clone()
    changed[0, 20] = (changed[0, 20] + 1) % 10
    with torch.no_grad():
        before, after = model(text), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-6)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-3)


def test_command_line_prints_a_line_per_method(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--steps", "4"])
    report.main(digits.task(), digits.__doc__ or "")
    lines = capsys.readouterr().out.splitlines()
    assert "at most 4 steps" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == list(METHODS)


def test_unknown_method() -> None:
    with pytest.raises(ValueError, match="'adam' is none of SGD, momentum, AdamW"):
        optimizers("adam", nn.Linear(1, 1), torch.empty(0), 0.1, "")


# -- the benchmark ---------------------------------------------------------------------------------


def test_runs_repeat_and_seeds_differ() -> None:
    def values(seed: int) -> list[float]:
        *_, run = train(problem(), METHODS[0], 0.01, seed)
        return [value for _, _, value in run.points]

    assert values(1) == values(1) != values(2)


def test_tuning_takes_the_fastest_rate_and_survives_lost_runs() -> None:
    rate, tried = benchmark.tune(problem(), METHODS[0], (1e-6, 0.03, 1e6), (0,))
    assert rate == 0.03
    assert tried["1e+06"] == {"steps": None, "value": None}
    assert tried["1e-06"]["steps"] is None


def test_kfac_needs_fewer_steps_where_scales_differ() -> None:
    found = benchmark.measure(
        problem(), {**benchmark.RATES, KFAC: (0.1, 0.3)}, tuning_seeds=(0,), seeds=(1, 2, 3)
    )
    steps = {m: f["steps"]["median"] for m, f in found["methods"].items()}
    assert steps[KFAC] is not None
    assert all(steps[KFAC] < (s or math.inf) for m, s in steps.items() if m != KFAC)


def run(*values: float) -> Run:
    made = Run(setup=0.5)
    for step, value in enumerate(values, 1):
        made.add(problem(), step, 0.1 * step, value)
    return made


def test_summary_counts_what_never_arrives_as_longest() -> None:
    runs = {0: run(1.0, 0.005), 1: run(1.0, 0.5, 0.02), 2: run(0.001, 0.02)}
    found = benchmark.summary(problem(), 0.1, (0.1, 1.0, 10.0), runs)
    assert found["steps"] == {"median": 2.0, "low": 1.0, "high": None}
    assert found["seconds"] == {"median": 0.2, "low": 0.1, "high": None}
    assert found["reached"] == 2
    assert found["rate is at the edge of the grid"]
    assert found["curve"] == [[1, 1.0], [2, 0.005]]
    most = benchmark.summary(problem(), 1.0, (0.1, 1.0, 10.0), {0: run(1.0), 1: run(2.0)})
    assert most["steps"]["median"] is None
    assert not most["rate is at the edge of the grid"]


def test_table_and_pictures_come_from_the_results_alone(tmp_path: Path) -> None:
    kept = {m: benchmark.summary(problem(), 0.1, (0.1,), {0: run(1.0, 0.005)}) for m in METHODS}
    kept[MUON] = benchmark.summary(problem(), 0.1, (0.1,), {0: run(1.0, 0.5)})
    results = {"digits": {"target": 0.01, "rising": False, "steps": 2, "methods": kept}}
    lines = benchmark.table(results).splitlines()
    assert [line[2:16].strip() for line in lines[2:6]] == list(METHODS)
    assert "never" in lines[4]
    assert "2 (2 to 2)" in lines[5]
    (path,) = benchmark.draw(results, tmp_path)
    first = path.read_text()
    benchmark.draw(results, tmp_path)
    assert path.read_text() == first
    words = [t.text for t in Xml.fromstring(first).iter(f"{SVG}text")]
    assert {*METHODS, "never (never to never)", "target 0.01"} <= set(words)


@pytest.mark.parametrize("values", [(0.5, 0.9, 0.97), (3.0, 2.4, 2.1), (0.0, 0.0, 0.0)])
def test_curves_stay_inside_of_the_picture(values: tuple[float, ...]) -> None:
    points = list(enumerate(values, 1))
    root = Xml.fromstring(curves("t", "s", "u", {"a": Curve(points, "n")}, values[-1]))
    (drawn,) = root.iter(f"{SVG}polyline")
    places = [tuple(map(float, p.split(","))) for p in drawn.get("points", "").split()]
    assert 2 <= len(places) <= 3
    assert all(0 <= x <= 790 and 0 <= y <= 456 for x, y in places)
    heights = [y for _, y in places]
    assert heights == sorted(heights, reverse=values[0] < values[-1])


def test_a_picture_needs_lines() -> None:
    with pytest.raises(ValueError, match="needs lines"):
        curves("t", "s", "u", {}, 1.0)
    with pytest.raises(ValueError, match="needs lines"):
        curves("t", "s", "u", {"a": Curve([], "n")}, 1.0)
