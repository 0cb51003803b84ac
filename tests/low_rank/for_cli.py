"""A model for commands."""

from __future__ import annotations

from torch import Tensor

from tests.low_rank.models import Mixer, batch


def mixer() -> tuple[Mixer, tuple[Tensor]]:
    """With weights of all kinds."""
    return Mixer(), (batch(),)
