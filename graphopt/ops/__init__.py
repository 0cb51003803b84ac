"""The `graphopt::` operators; importing this package registers them under `torch.ops.graphopt`."""

from __future__ import annotations

from graphopt.ops import convolution, ctc, frozen, moments, rnn, wire

__all__ = ["convolution", "ctc", "frozen", "moments", "rnn", "wire"]
