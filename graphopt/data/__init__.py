"""Batches of few sizes from examples of many lengths, and whether padding them changes anything.

`bucket` chooses sizes, `BucketBatchSampler` deals examples into batches of one size each,
`PadCollate` pads them, and `check_padding` compares a model with and without padding. Plain
PyTorch, for any model.
"""

from graphopt.data.buckets import Buckets, bucket
from graphopt.data.collate import Pad, PadCollate
from graphopt.data.padding import PaddingReport, check_padding
from graphopt.data.sampler import BucketBatchSampler

__all__ = [
    "BucketBatchSampler",
    "Buckets",
    "Pad",
    "PadCollate",
    "PaddingReport",
    "bucket",
    "check_padding",
]
