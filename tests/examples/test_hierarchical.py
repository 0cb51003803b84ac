"""Spatial regression: hyperparameters found again, predictions with honest intervals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.examples.hierarchical import train
from graphopt.examples.hierarchical.data import draw_field
from graphopt.examples.hierarchical.figure import draw


def test_a_short_fit_predicts_the_field(tmp_path: Path) -> None:
    field = draw_field(300, 10, torch.Generator().manual_seed(0))
    fitted = train.fit(field, 6, 1e-3)
    assert fitted.likelihoods[-1] > fitted.likelihoods[0] + 10
    assert all(bound <= 1e-3 * 300 for bound in fitted.bounds)
    first, second, *_ = fitted.hyperparameters
    assert first > second  # as the field was drawn
    prediction = fitted.process.predict(field.values, field.grid)
    found = train.quality(field, prediction)
    spread = float(field.truth.std())
    assert found["error"] < 0.5 * spread
    assert 0.8 <= found["coverage"] <= 1.0
    draw(tmp_path / "figure.svg", field, prediction)
    assert "standard deviation" in (tmp_path / "figure.svg").read_text()


def test_the_command_line_writes_the_figure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--points", "60", "--steps", "1", "--side", "5", "--output", str(tmp_path / "new")]
    monkeypatch.setattr("sys.argv", ["train", *options])
    train.main()
    assert (tmp_path / "new" / "figure.svg").exists()
    assert "coverage" in capsys.readouterr().out
