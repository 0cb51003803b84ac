"""The `graphopt::` operators; importing this package registers them under `torch.ops.graphopt`."""

from __future__ import annotations

from graphopt.ops import (
    convolution,
    ctc,
    expect,
    flex,
    frozen,
    int16_mm,
    moments,
    pairs,
    rnn,
    statistics,
    wire,
)

__all__ = [
    "convolution",
    "ctc",
    "expect",
    "flex",
    "frozen",
    "int16_mm",
    "moments",
    "pairs",
    "rnn",
    "statistics",
    "wire",
]
