"""The study of delay: statistics, picture, and that its trainings are what they say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
import torch
import torch.nn.functional as F

from benchmarks.delay_study import CONSTANT, PIPELINE, Run, Runner, picture, recovered, spread
from benchmarks.delay_study_picture import accuracy_over_delay
from examples.pipeline.delay_study import BOTH, PLAIN, Digits, Setting, constant, pipelined
from examples.pipeline.delayed_resnet import resnet


def test_interval_of_three_seeds() -> None:
    found = spread([1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    # 4.303 / sqrt(3), from a table of Student's t.
    assert found["interval"] == pytest.approx([-0.4844, 4.4844], abs=2e-4)


def test_recovered_is_a_part_of_what_was_lost() -> None:
    assert recovered([0.95], [0.9], [1.0]) == 0.5
    assert recovered([0.95], [1.0], [1.0]) is None


def results() -> dict[str, Any]:
    fixed = {m: {"8": spread([0.9, 0.8, 0.7]), "32": spread([0.5, 0.4, 0.6])} for m in CONSTANT}
    found = {m: spread([0.9, 0.92, 0.94]) for m in PIPELINE}
    undelayed = spread([0.97, 0.98, 0.99])
    return {
        "setting": {"blocks": 2, "epochs": 6},
        "seeds": [0, 1, 2],
        "pipeline": {"4": {"undelayed": undelayed, "accuracy": found}},
        "constant": {"batch": 8, "undelayed": undelayed, "accuracy": fixed},
    }


def test_picture_names_methods_and_places() -> None:
    root = Xml.fromstring(picture(results()))
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert set(words) >= {*PIPELINE, *CONSTANT, "4", "8", "32"}
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == len(PIPELINE) + len(CONSTANT) + 2


def test_an_empty_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="a picture needs trainings"):
        accuracy_over_delay("", "", ({}, 0.9), {}, {})


def test_stages_are_counted() -> None:
    setting = Setting(blocks=1)
    stages = resnet(setting.blocks, setting.width)
    assert len(stages) == setting.stages == 8
    assert torch.nn.Sequential(*stages)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_trainings_repeat() -> None:
    data = Digits.load()
    setting = Setting(blocks=1, width=2, batch=100, epochs=1)
    late = pipelined(data, setting, BOTH, seed=0)
    assert late == pipelined(data, setting, BOTH, seed=0)


def test_training_without_delay_is_sgd_with_scaled_rates() -> None:
    data = Digits.load()
    setting = Setting(blocks=1, width=2, batch=64, epochs=1, lr=0.1)
    torch.manual_seed(3)
    stages = resnet(1, 2)
    model = torch.nn.Sequential(*stages)
    # lr * (1 - m ** 2) * 2 / (1 - m), and m ** 2: batches of 64 for those of 32.
    first, momentum = 0.1 * (1 - 0.81) * 2 / 0.1, 0.81
    optimizer = torch.optim.SGD(model.parameters(), lr=first, momentum=momentum)
    order = torch.randperm(900, generator=torch.Generator().manual_seed(3))
    for step, chosen in enumerate(order.split(64)[:14]):
        optimizer.param_groups[0]["lr"] = first * (1 - step / 14)
        optimizer.zero_grad()
        F.cross_entropy(model(data.images[chosen]), data.labels[chosen]).backward()
        optimizer.step()
    assert constant(data, setting, PLAIN, 0, seed=3) == data.accuracy(stages)


def test_trainings_that_a_file_knows_are_not_run_again(tmp_path: Path) -> None:
    known = Run(Setting(epochs=1), PLAIN, 0, seed=0)
    file = tmp_path / "runs.jsonl"
    file.write_text(json.dumps({"run": asdict(known), "accuracy": 0.25}) + "\n")
    assert Runner(1, file)([known]) == {known: 0.25}
    assert file.read_text().count("\n") == 1
