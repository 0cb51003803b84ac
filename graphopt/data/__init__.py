"""Batches of few sizes from examples of many lengths, and whether padding them changes anything.

`bucket` chooses sizes, `BucketBatchSampler` deals examples into batches of one size each,
`PadCollate` pads them, and `check_padding` compares a model with and without padding. Plain
PyTorch, for any model. The workers of a loader import this, so the check is loaded when it is used.
"""

import importlib
from typing import TYPE_CHECKING

from graphopt.data.buckets import Buckets, bucket
from graphopt.data.collate import Pad, PadCollate
from graphopt.data.sampler import BucketBatchSampler

if TYPE_CHECKING:
    from graphopt.data.padding import PaddingReport, check_padding

__all__ = [
    "BucketBatchSampler",
    "Buckets",
    "Pad",
    "PadCollate",
    "PaddingReport",
    "bucket",
    "check_padding",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'graphopt.data' has no attribute {name!r}")
    return getattr(importlib.import_module("graphopt.data.padding"), name)
