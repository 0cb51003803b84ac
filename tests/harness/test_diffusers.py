"""diffusers: training steps of a UNet with samples drawn in between."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")

from graphopt.examples.trainers import diffusers_unet
from graphopt.examples.trainers.beside import captured


def test_losses_samples_and_weights_are_equal_to_the_bit() -> None:
    plain, ours = diffusers_unet.train(False), diffusers_unet.train(True)
    assert plain.same(ours)
    assert len(ours.losses) == diffusers_unet.STEPS
    assert len(ours.beside) == len(diffusers_unet.SAMPLED) + 1
    assert [one.rpartition(" (")[2] for one in captured(ours.model)] == [
        "train)",
        "eval, no_grad)",
    ]
