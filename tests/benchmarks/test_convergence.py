"""The tables of optimizers: equal budgets, what never arrives, seconds, pictures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
import torch
from torch import nn

from benchmarks import batch_scaling, convergence, tuning
from benchmarks.batch_scaling_picture import steps_over_batch
from benchmarks.convergence_picture import Curve, curves, draw
from benchmarks.kfac_step_variants import gpt, resnet
from benchmarks.muon_step import compare
from benchmarks.tuning import RATES, SETTINGS, Trial
from examples.kfac_digits.comparison import (
    KFAC,
    METHODS,
    SGD_MOMENTUM,
    TORCH_MUON,
    USUAL,
    Batch,
    Run,
    Task,
    train,
)

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


def easy() -> Task:
    """The same to a target that momentum SGD reaches."""
    return replace(problem(), target=1.2)


# -- convergence -----------------------------------------------------------------------------------


def test_runs_repeat_and_seeds_differ() -> None:
    def values(seed: int) -> list[float]:
        *_, run = train(problem(), METHODS[0], 0.01, seed)
        return [value for _, _, value in run.points]

    assert values(1) == values(1) != values(2)


def test_budgets_are_equal() -> None:
    assert set(SETTINGS) == set(METHODS)
    assert {len(values) for values in SETTINGS.values()} == {2}
    assert not any(USUAL[method][1] in values for method, values in SETTINGS.items())


def test_tuning_takes_the_fastest_rate_and_survives_lost_runs() -> None:
    chosen, tried = tuning.tune(problem(), METHODS[0], (1e-6, 0.03, 1e6), (0,))
    assert chosen == Trial(0.03, 0.9)
    lost = {trial["rate"]: trial for trial in tried}
    assert lost[1e6]["steps"] is lost[1e6]["value"] is lost[1e-6]["steps"] is None


def test_the_other_setting_is_tried_around_the_best_rate() -> None:
    rates = (1e-6, 1e-4, 0.01, 0.03, 1e6)
    chosen, tried = tuning.tune(easy(), SGD_MOMENTUM, rates, (0, 1), (0.0, 0.5))
    trials = [(trial["rate"], trial["setting"]) for trial in tried]
    usual = [rate for rate, setting in trials if setting == 0.9]
    assert sorted(usual) == sorted(rates)
    best = min((t for t in tried if t["steps"] and t["setting"] == 0.9), key=lambda t: t["steps"])
    around = {0.01: [1e-4, 0.01, 0.03], 0.03: [0.01, 0.03, 1e6]}[best["rate"]]
    assert trials[5:] == [(rate, setting) for setting in (0.0, 0.5) for rate in around]
    assert chosen in [Trial(*trial) for trial in trials]


def test_giving_trials_up_does_not_change_the_choice() -> None:
    rates, seeds = (0.003, 0.01, 0.03, 0.1), (0, 1)
    chosen, _ = tuning.tune(easy(), SGD_MOMENTUM, rates, seeds, (0.5, 0.8))

    def steps(trial: Trial) -> float:
        found = 0.0
        for seed in seeds:
            *_, run = train(easy(), SGD_MOMENTUM, trial.rate, seed, setting=trial.setting)
            found += run.steps_to_target or math.inf
        return found

    assert all(steps(chosen) <= steps(Trial(rate, 0.9)) for rate in rates)


def test_kfac_needs_fewer_steps_where_scales_differ() -> None:
    rates = {SGD_MOMENTUM: RATES[4:], KFAC: (0.1, 0.3)}
    found = convergence.measure(problem(), rates, tuning_seeds=(0,), seeds=(1, 2, 3))
    steps = {m: f["steps"]["median"] for m, f in found["methods"].items()}
    assert steps[KFAC] is not None
    assert steps[SGD_MOMENTUM] is None or steps[KFAC] < steps[SGD_MOMENTUM]
    assert found["methods"][KFAC]["seconds"]["median"] > 0


def run(*values: float) -> Run:
    made = Run(setup=0.5)
    for step, value in enumerate(values, 1):
        made.add(problem(), step, 0.1 * step, value)
    return made


def test_summary_counts_what_never_arrives_as_longest() -> None:
    runs = {0: run(1.0, 0.005), 1: run(1.0, 0.5, 0.02), 2: run(0.001, 0.02)}
    found = convergence.summary(problem(), Trial(0.1, 0.9), (0.1, 1.0, 10.0), runs)
    assert found["steps"] == {"median": 2.0, "low": 1.0, "high": None}
    assert found["steps by seed"] == [2.0, None, 1.0]
    assert found["reached"] == 2
    assert found["rate is at the edge of the grid"]
    assert found["curve"] == [[1, 1.0], [2, 0.005]]
    lost = {0: run(1.0), 1: run(2.0)}
    most = convergence.summary(problem(), Trial(1.0, 0.9), (0.1, 1.0, 10.0), lost)
    assert most["steps"]["median"] is None
    assert not most["rate is at the edge of the grid"]


def test_seconds_are_steps_times_the_pace_of_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def steady(
        task: Task, method: str, rate: float, seed: int, steps: int, setting: float
    ) -> Iterator[Run]:
        lengths.append((method, steps))
        made = Run(setup=0.5)
        for step in range(2, steps + 1, 2):
            made.add(task, step, (0.1 if method == SGD_MOMENTUM else 0.2) * step, 1.0)
            yield made

    monkeypatch.setattr(convergence, "train", steady)
    arrives = convergence.summary(problem(), Trial(0.1, 0.9), (0.1,), {0: run(1.0, 0.005)})
    never = convergence.summary(problem(), Trial(0.1, 0.9), (0.1,), {0: run(1.0, 0.5)})
    found = convergence.timed(problem(), {SGD_MOMENTUM: arrives, TORCH_MUON: never}, (0,))
    assert lengths == [(SGD_MOMENTUM, 2), (TORCH_MUON, 2)]
    assert found[SGD_MOMENTUM]["seconds"] == {"median": 0.2, "low": 0.2, "high": 0.2}
    assert found[TORCH_MUON]["seconds"] == {"median": None, "low": None, "high": None}
    assert found[TORCH_MUON]["milliseconds a step"]["median"] == 200
    assert found[TORCH_MUON]["setup seconds"]["median"] == 0.5
    lengths.clear()
    convergence.timed(problem(), {TORCH_MUON: never}, (0,))
    assert lengths == [(TORCH_MUON, 40)]


def test_table_and_pictures_come_from_the_results_alone(tmp_path: Path) -> None:
    trial, reached, never = Trial(0.1, 0.9), {0: run(1.0, 0.005)}, {0: run(1.0, 0.5)}
    kept = {
        m: convergence.summary(problem(), trial, (0.1,), never if m == TORCH_MUON else reached)
        for m in METHODS
    }
    results = {"digits": {"target": 0.01, "rising": False, "steps": 2, "methods": kept}}
    lines = convergence.table(results).splitlines()
    assert [line[2:16].strip() for line in lines[2:9]] == list(METHODS)
    assert ["never" in line for line in lines[2:9]] == [m == TORCH_MUON for m in METHODS]
    (path,) = draw(results, tmp_path)
    first = path.read_text()
    draw(results, tmp_path)
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


# -- batch sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", batch_scaling.SIZES)
def test_batches_have_their_size_and_every_image_once(size: int) -> None:
    batches = batch_scaling.task(size).batches(0)
    images = torch.cat([next(batches)[0] for _ in range(batch_scaling.ALL // size)])
    assert len(images) == batch_scaling.ALL // size * size
    assert len(images.flatten(1).unique(dim=0)) == len(images)


def test_learning_rates_are_constant() -> None:
    task = replace(batch_scaling.task(512), steps=2, every=1, target=2.0)
    short = [v for *_, v in list(train(task, SGD_MOMENTUM, 0.05, 0))[-1].points]
    task = replace(task, steps=50)
    long = [v for *_, v in list(train(task, SGD_MOMENTUM, 0.05, 0, steps=2))[-1].points]
    assert short == long


@pytest.mark.parametrize("size", [0, 1438])
def test_a_batch_size_that_cannot_be(size: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1437 images, not of {size}"):
        batch_scaling.task(size)


def test_a_cell_counts_lost_runs() -> None:
    found = batch_scaling.cell(easy(), SGD_MOMENTUM, (0.03,), (0,), (0, 1))
    assert found["rate"] == 0.03
    assert found["steps"]["low"] == min(found["steps by seed"])
    lost = batch_scaling.cell(problem(), SGD_MOMENTUM, (1e-6,), (0,), (0,))
    assert lost["steps by seed"] == [None]
    table = batch_scaling.table({SGD_MOMENTUM: {"32": found, "1437": lost}}).splitlines()
    assert table[0].endswith("| 32 | all |")
    assert table[2].endswith("| never (never to never); 1e-06* |")


def test_the_picture_has_a_line_for_what_arrives() -> None:
    def cell(*steps: float | None) -> dict[str, object]:
        return {"steps": dict(zip(("low", "median", "high"), steps, strict=True))}

    root = Xml.fromstring(
        steps_over_batch(
            {
                SGD_MOMENTUM: {"32": cell(80, 100, 120), "512": cell(30, 40, None)},
                KFAC: {"32": cell(40, 50, 60), "512": cell(None, None, None)},
            }
        )
    )
    ideal, sgd, kfac = (
        [tuple(map(float, p.split(","))) for p in drawn.get("points", "").split()]
        for drawn in root.iter(f"{SVG}polyline")
    )
    assert (len(ideal), len(sgd), len(kfac)) == (2, 2, 1)
    assert ideal[0] == sgd[0]  # the ideal begins where the slowest does
    assert sgd[1][1] > sgd[0][1]  # fewer steps are lower
    assert kfac[0][1] > sgd[0][1]
    with pytest.raises(ValueError, match="reaches the target"):
        steps_over_batch({KFAC: {"32": cell(None, None, None)}})


# -- Muon ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: gpt(2, 8, 16, 2), lambda: resnet(2, 4, 1, 8)])
def test_both_muons_make_the_same_updates(make: object) -> None:
    found = compare(make(), 2)
    assert sum(found["matrices"].values()) == (8 if "64 x 16" in found["matrices"] else 9)
    # Rounding of batched products in bfloat16; the updates themselves are about 1e-3.
    assert found["largest difference"] < 1e-4
