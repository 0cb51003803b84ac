"""The examples in number formats, and the study that is made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
import torch
from torch import Tensor, nn

import graphopt
from benchmarks import flexpoint_training as study
from benchmarks.flexpoint_training_picture import Panel, picture
from examples.flexpoint import data
from examples.flexpoint.formats import ALL, hold_exponents, prepare, statistics
from examples.flexpoint.gan import sliced_wasserstein
from examples.flexpoint.half_on_cpu import HalfOnCpu
from examples.flexpoint.train import TASKS, main
from graphopt import Pipeline
from graphopt.model.surface import report as report_of

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def no_photographs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the same shape; reading the real ones takes a package that may be missing."""
    draw = torch.Generator().manual_seed(0)
    made = torch.rand(2, 3, 213, 320, generator=draw)
    monkeypatch.setattr(data, "photographs", lambda: made)


# -- trainings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ALL)
def test_every_format_trains_alexnet(format: str) -> None:
    run = TASKS["alexnet"].train(format, seed=0, steps=3)
    assert len(run.losses) == 3
    assert all(map(math.isfinite, run.losses))
    assert run.losses[-1] < run.losses[0]
    assert 0 <= run.test["error"] <= 1
    assert bool(run.flex) is ("flexpoint" in ALL[format].passes)


@pytest.mark.parametrize("format", ["fp16-scaled", "flex16+5"])
@pytest.mark.parametrize("model", ["resnet", "gan"])
def test_other_networks_train(model: str, format: str) -> None:
    run = TASKS[model].train(format, seed=0, steps=2)
    assert len(run.losses) == 2
    assert all(map(math.isfinite, [*run.losses, *run.test.values()]))
    if "flexpoint" in ALL[format].passes:
        assert 8 < run.flex["bits"] <= 15
        assert run.flex["saturated"] < 1e-3
        assert run.flex["NaN"] == 0


def test_formats_share_weights_batches_and_dropout() -> None:
    exact, flex, again = (
        TASKS["alexnet"].train(f, 3, 1).losses[0] for f in ("fp32", "flex16+8", "flex16+8")
    )
    assert exact != flex == again
    assert flex == pytest.approx(exact, rel=1e-3)


def test_formats_lower_every_product() -> None:
    run = TASKS["alexnet"].train("bf16", 0, 1)
    text = str(run.models[0].explain())
    assert "convolution runs in bf16" in text
    assert "not-faster" not in text


def test_a_fixed_exponent_is_held_and_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(16, 8)
    chosen = ALL["fixed-8.8"]
    prepare(model, chosen, x)
    for _ in range(2):
        hold_exponents(model, chosen)
        held = [v for k, v in graphopt.state_dict(model).items() if "exponents" in k]
        assert all((v == -8).all() for v in held)
        model.zero_grad()
        (1e-4 * model(x).square().mean()).backward()
    # Everything that small is 0 with 8 bits behind the point.
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    assert statistics(model)["saturated"] == 0


def test_fp32_counts_nothing() -> None:
    model = nn.Linear(3, 2)
    prepare(model, ALL["fp32"], torch.randn(4, 3))
    assert statistics(model) == {}


# -- the pass --------------------------------------------------------------------------------------


def test_half_on_cpu_leaves_other_graphs_alone() -> None:
    model = nn.Conv2d(3, 5, 3)
    passes = (*Pipeline.parse("cleanup").passes, HalfOnCpu())
    graphopt.optimize(model, torch.randn(2, 3, 6, 6), passes=passes, backend="eager")
    (captured,) = report_of(model).specialisations
    assert not captured.steps[-1].outcome.applied


def test_half_on_cpu_is_float32_rounded_once() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 6, 6).requires_grad_()
    plain = nn.Conv2d(3, 5, 3, padding=1)
    low = nn.Conv2d(3, 5, 3, padding=1)
    low.load_state_dict(plain.state_dict())
    spec = "cleanup,precision{format=fp16,loss_scale=none,policy=tf,cost=roofline}"
    passes = (*Pipeline.parse(spec).passes, HalfOnCpu())
    graphopt.optimize(low, passes=passes, backend="eager")
    tangent = torch.randn(4, 5, 6, 6)
    low(x).backward(tangent)
    assert "computes in float32" in str(low.explain())

    exact = x.detach().half().double().requires_grad_()
    weight = plain.weight.detach().half().double().requires_grad_()
    nn.functional.conv2d(exact, weight, padding=1).backward(tangent.half().double())
    for found, wanted in ((low.weight.grad, weight.grad), (x.grad, exact.grad)):
        assert found is not None
        assert wanted is not None
        # Half a unit in the last place, and what float32 adds to it.
        assert ((found - wanted).abs() <= 2.0**-11 * wanted.abs() + 1e-5).all()
        assert torch.equal(found, found.half().float())


# -- data ------------------------------------------------------------------------------------------


def _first(batches: Iterator[data.Batch], count: int = 1) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*islice(batches, count), strict=True)]


@pytest.mark.parametrize("make", [data.shifted_digits, data.digits_on_photographs])
def test_batches_repeat_by_seed(make: Any) -> None:
    images, labels = _first(make(1, 64), 3)
    assert images.shape == (192, 1 if make is data.shifted_digits else 3, 8, 8)
    assert images.min() >= -1
    assert images.max() <= 1
    again, same = _first(make(1, 64), 3)
    assert torch.equal(images, again)
    assert torch.equal(labels, same)
    assert not torch.equal(images, _first(make(2, 64), 3)[0])


def test_the_test_is_not_trained_on() -> None:
    images, labels = _first(data.shifted_digits(0, 180, unseen=True), 2)
    unseen, answers = data.digits(unseen=True)
    assert torch.equal((images + 1) / 2, unseen)
    assert torch.equal(labels, answers)
    seen = {tuple(x.flatten().tolist()) for x in data.digits()[0]}
    assert not seen.intersection(tuple(x.flatten().tolist()) for x in unseen)


def test_digits_move_by_up_to_a_pixel() -> None:
    images, _ = data.digits()
    middle = torch.ones(5, dtype=torch.int64)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    which = torch.arange(5)
    assert torch.equal(data._pieces(padded, which, middle, middle), images[:5])
    down = data._pieces(padded, which, middle + 1, middle)
    assert torch.equal(down[:, :, :7], images[:5, :, 1:])
    assert (down[:, :, 7] == 0).all()


def test_photographs_are_real(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("PIL")
    monkeypatch.undo()
    images = data.photographs()
    assert images.shape == (2, 3, 213, 320)
    assert 0 <= images.min() < 0.1
    assert 0.9 < images.max() <= 1


def test_sliced_wasserstein_of_a_shift_is_its_mean_projection() -> None:
    images = torch.randn(50, 1, 2, 2)
    assert sliced_wasserstein(images, images[torch.randperm(50)], torch.Generator()) < 1e-6
    far = sliced_wasserstein(images + 3.0, images, torch.Generator().manual_seed(0))
    # A vector of length 6 on directions of the sphere in four dimensions: 6 * 4 / (3 * pi).
    assert far == pytest.approx(6 * 4 / (3 * math.pi), rel=0.1)


# -- the study -------------------------------------------------------------------------------------


def run(*losses: float) -> dict[str, Any]:
    last = losses[-1]
    return {
        "loss": last,
        "losses": list(losses),
        "test": {"error": 0.5},
        "flex": {"bits": 13.0, "saturated": 1e-6, "overflows": 0.01, "NaN": 0},
        "seconds": 1.0,
    }


def results() -> dict[str, Any]:
    runs = {f: {0: run(2.0, 1.0), 1: run(2.0, 3.0)} for f in ALL}
    runs["flex16+5"] = {0: run(2.0, 1.01), 1: run(2.0, 3.02)}
    runs["fp16"] = {0: run(2.0, math.nan), 1: run(2.0, 3.0)}
    runs["bf16"] = {0: run(2.0, 1.5), 1: run(2.0, 3.0)}
    return {"models": {model: study.summary(runs) for model in TASKS}}


def test_summary_holds_the_mean_against_the_target() -> None:
    found = results()["models"]["gan"]
    assert found["flex16+5"]["change"] == pytest.approx(4.03 / 4 - 1)
    assert found["flex16+5"]["changes"]["0"] == pytest.approx(0.01)
    assert found["flex16+5"]["within the target"]
    assert not found["bf16"]["within the target"]
    assert found["fp16"]["change"] is None
    assert not found["fp16"]["within the target"]
    assert found["fp16"]["curve"] == [[1, 2.0], [2, None]]


def test_table_and_picture_come_from_the_results_alone() -> None:
    found = json.loads(json.dumps(results()))
    table = study.table(found)
    assert table.count("| flex16+5 | 2.0150 | +0.75% (+0.7% to +1.0%)") == 3
    assert "| fp16 | not finite | not finite (not finite) |" in table
    drawn = study.draw(found)
    assert drawn == study.draw(found)
    words = [t.text for t in Xml.fromstring(drawn).iter(f"{SVG}text")]
    assert {*study.DRAWN, *study.AXES.values()} <= set(words)


def test_lines_stay_inside_of_the_picture() -> None:
    lines = {"a": [(1, 1.0), (10, -2.0)], "b": [(1, 50.0), (10, -50.0)], "c": []}
    drawn = Xml.fromstring(picture("t", "s", [Panel("p", lines, "steps")]))
    for path in drawn.iter(f"{SVG}polyline"):
        places = [tuple(map(float, p.split(","))) for p in path.get("points", "").split()]
        assert all(0 <= x <= 790 and 90 <= y <= 290 for x, y in places)


def test_a_picture_needs_lines() -> None:
    for panels in ([], [Panel("p", {"a": [(1, 1.0)]}, "steps")]):
        with pytest.raises(ValueError, match="needs panels"):
            picture("t", "s", panels)


def test_interrupted_studies_go_on(tmp_path: Path) -> None:
    kept = tmp_path / "alexnet.fp32.0.json"
    kept.write_text(json.dumps(run(2.0)))
    assert study.kept_or_trained(tmp_path, "alexnet", "fp32", 0) == run(2.0)


def test_command_line_prints_a_line_per_format(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--model", "alexnet", "--steps", "2", "--format", "fp32", "--format", "flex16+8"])
    lines = capsys.readouterr().out.splitlines()
    assert [li.split()[0] for li in lines] == ["fp32", "flex16+8"]
    assert "bits in use" in lines[1]
