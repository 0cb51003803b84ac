"""Padded batches: nothing of an example is lost, and what cannot be padded."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.data import Buckets, Pad, PadCollate, bucket
from graphopt.errors import ArgumentError

SIZES = Buckets((4, 8))


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=6),
    st.integers(0, 2),
    st.sampled_from(["right", "left"]),
    st.sampled_from([torch.int64, torch.float32, torch.bool, torch.uint8]),
)
def test_round_trip(lengths: list[int], dim: int, side: Any, dtype: torch.dtype) -> None:
    shapes = [[2, 3, 2] for _ in lengths]
    for shape, length in zip(shapes, lengths, strict=True):
        shape[dim] = length
    entries = [torch.randint(0, 2, shape).to(dtype) for shape in shapes]
    buckets = bucket(lengths, k=2, multiple=4)
    pad = Pad(1, dim=dim, side=side, mask="mask")
    batch = PadCollate(buckets, {"x": pad})([{"x": x, "y": i} for i, x in enumerate(entries)])
    size = buckets.size_of(max(lengths))
    x, mask = batch["x"], batch["mask"]
    assert x.dtype == dtype
    assert x.shape[1 + dim] == size
    assert mask.shape == (len(lengths), size)
    assert batch["y"].tolist() == list(range(len(lengths)))
    for row, here, entry in zip(x, mask, entries, strict=True):
        moved = row.movedim(dim, 0)
        assert torch.equal(moved[here], entry.movedim(dim, 0))
        assert (moved[~here] == 1).all()
        order = here if side == "left" else here.flip(0)
        assert order.tolist() == sorted(order.tolist())


def test_tuples_tensors_lists_and_arrays() -> None:
    collate = PadCollate(SIZES, {0: Pad(-1, mask="a"), 2: Pad(0.5, mask="b")})
    x, label, y, a, b = collate([([1, 2, 3], 7, np.ones(5)), ([4], 8, np.zeros(1))])
    assert x.tolist() == [[1, 2, 3] + [-1] * 5, [4] + [-1] * 7]  # one size for all entries
    assert label.tolist() == [7, 8]
    assert y.shape == (2, 8)
    assert y[1, 1] == 0.5
    assert a.sum(1).tolist() == [3, 1]
    assert b.sum(1).tolist() == [5, 1]
    single = PadCollate(SIZES, Pad(0))([torch.ones(3), torch.ones(1)])
    assert isinstance(single, Tensor)
    assert single.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    values, mask = PadCollate(SIZES, Pad(0, mask="m"))([torch.ones(3)])
    assert torch.equal(values.bool(), mask)


def test_several_dimensions() -> None:
    pad = Pad(float("-inf"), dim=(0, -1), side="left")
    (bias,) = PadCollate(SIZES, pad)([torch.zeros(3, 2, 3)])
    assert bias.shape == (4, 2, 4)
    assert bias.isfinite().nonzero()[:, 0].unique().tolist() == [1, 2, 3]
    assert bias.isfinite().nonzero()[:, 2].unique().tolist() == [1, 2, 3]


def test_an_entry_with_sizes_of_its_own() -> None:
    collate = PadCollate(SIZES, {"in": Pad(0), "out": Pad(-100, buckets=Buckets((6,)), mask="m")})
    batch = collate([{"in": [1] * 7, "out": [1, 2]}, {"in": [1], "out": []}])
    assert batch["in"].shape == (2, 8)
    assert batch["out"].shape == (2, 6)
    assert batch["m"].sum(1).tolist() == [2, 0]


def test_is_picklable() -> None:
    collate = pickle.loads(pickle.dumps(PadCollate(SIZES, {"x": Pad(0)})))
    assert collate([{"x": [1]}])["x"].shape == (1, 4)


@pytest.mark.parametrize(
    ("pads", "examples", "message"),
    [
        (Pad(0), [], "there are no examples"),
        (Pad(0), [torch.ones(9)], "length 9, above the largest size, 8"),
        (Pad(0, dim=1), [torch.ones(3)], "has no dim=1"),
        (Pad(0, dim=(0, 1)), [torch.ones(3, 4)], "two lengths along dim=0, 1"),
        (Pad(0), [torch.ones(3, 2), torch.ones(3, 1)], "differ in more than what is padded"),
        (Pad(-1), [torch.ones(3, dtype=torch.uint8)], "padding value -1 does not fit uint8"),
        (Pad(0.5), [torch.ones(3, dtype=torch.int64)], "padding value 0.5 does not fit int64"),
        ({"y": Pad(0)}, [{"x": [1]}], "has no entry 'y'; it has ['x']"),
        ({3: Pad(0)}, [([1], 2)], "has no entry 3; it has 2 entries"),
        ({"x": Pad(0, mask="y")}, [{"x": [1], "y": 1}], "has an entry 'y' already"),
    ],
)
def test_bad_examples(pads: Any, examples: list[Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        PadCollate(SIZES, pads)(examples)
    assert message in str(error.value).replace("examples have", "has")


@pytest.mark.parametrize(
    ("pads", "message"),
    [
        ({}, "no entry is padded"),
        ({-1: Pad(0)}, "counted from 0"),
        ({"x": Pad(0, mask="x")}, "not all new"),
        ({"x": Pad(0, mask="m"), "y": Pad(0, mask="m")}, "not all new"),
    ],
)
def test_bad_pads(pads: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        PadCollate(SIZES, pads)


def test_bad_pad() -> None:
    with pytest.raises(ArgumentError, match="side='both' is unknown"):
        Pad(0, side="both")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="pads nothing"):
        Pad(0, dim=())
