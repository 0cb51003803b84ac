"""ignite's trainer, evaluator and checkpoints, without graphopt and with it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ignite")
pytest.importorskip("sklearn")

from graphopt.examples.trainers import ignite_trainer
from graphopt.examples.trainers.beside import captured


@pytest.mark.parametrize("accumulated", [1, 2])
def test_losses_metrics_and_weights_are_equal_to_the_bit(tmp_path: Path, accumulated: int) -> None:
    plain, ours = (
        ignite_trainer.train(optimized, tmp_path / str(optimized), accumulated=accumulated)
        for optimized in (False, True)
    )
    assert plain.same(ours)
    assert len(ours.losses) == 3 * (5 + 2)
    # One for 32 examples, one for any number, and evaluation.
    assert [one.rpartition(" (")[2] for one in captured(ours.model)] == [
        "train)",
        "train)",
        "eval, no_grad)",
    ]
