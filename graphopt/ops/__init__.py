"""The `graphopt::` operators; importing this package registers them under `torch.ops.graphopt`."""

from __future__ import annotations

from graphopt.ops import (
    convolution,
    ctc,
    expect,
    flex,
    flex16,
    float8,
    frozen,
    int16_mm,
    low_rank,
    moments,
    mx,
    pairs,
    rnn,
    scaled_mm,
    statistics,
    structured,
    varied,
    wire,
)

__all__ = [
    "convolution",
    "ctc",
    "expect",
    "flex",
    "flex16",
    "float8",
    "frozen",
    "int16_mm",
    "low_rank",
    "moments",
    "mx",
    "pairs",
    "rnn",
    "scaled_mm",
    "statistics",
    "structured",
    "varied",
    "wire",
]
