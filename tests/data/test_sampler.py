"""Batches: each example once, ranks alike, and resumed as if uninterrupted."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from graphopt.data import BucketBatchSampler, Buckets, Pad, PadCollate, bucket
from graphopt.errors import ArgumentError, StateError

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=60)


def shape(buckets: Buckets, lengths: list[int], batch: list[int]) -> tuple[int, int]:
    """As a collate function would see it."""
    return len(batch), buckets.size_of(max(lengths[i] for i in batch))


@given(LENGTHS, st.integers(1, 4), st.integers(1, 9), st.booleans(), st.integers(0, 3))
def test_every_example_once(
    lengths: list[int], k: int, size: int, shuffle: bool, epoch: int
) -> None:
    buckets = bucket(lengths, k=k)
    sampler = BucketBatchSampler(lengths, buckets, batch_size=size, shuffle=shuffle)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    shapes = {shape(buckets, lengths, batch) for batch in batches}
    assert len([s for s in shapes if s[0] == size]) <= k
    assert sum(len(batch) < size for batch in batches) <= 1


@given(LENGTHS, st.integers(1, 4), st.integers(30, 90), st.booleans())
def test_batches_by_positions(lengths: list[int], k: int, tokens: int, drop_last: bool) -> None:
    buckets = bucket(lengths, k=k)
    try:
        sampler = BucketBatchSampler(lengths, buckets, tokens=tokens, drop_last=drop_last)
    except ArgumentError as error:
        assert drop_last
        assert "is full" in str(error)  # noqa: PT017
        return
    shapes = [shape(buckets, lengths, batch) for batch in sampler]
    assert all(count * size <= tokens for count, size in shapes)
    less = [count for count, size in shapes if count < tokens // size]
    assert len(less) <= (0 if drop_last else 1)
    taken = Counter(i for batch in sampler for i in batch)
    assert set(taken.values()) == {1}
    assert drop_last or len(taken) == len(lengths)


@given(LENGTHS, st.integers(1, 4), st.integers(1, 6), st.integers(2, 4), st.booleans())
def test_ranks_have_the_same_shapes(
    lengths: list[int], k: int, size: int, ranks: int, drop_last: bool
) -> None:
    buckets = bucket(lengths, k=k)
    try:
        samplers = [
            BucketBatchSampler(
                lengths, buckets, batch_size=size, rank=r, ranks=ranks, drop_last=drop_last
            )
            for r in range(ranks)
        ]
    except ArgumentError as error:
        assert drop_last
        assert "is full" in str(error)  # noqa: PT017
        return
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == len(samplers[0])
    for step in steps:
        assert len({shape(buckets, lengths, batch) for batch in step}) == 1
    taken = Counter(i for step in steps for batch in step for i in batch)
    assert drop_last or set(taken) == set(range(len(lengths)))
    twice = sum(taken.values()) - len(taken)
    assert twice <= (ranks - 1) * len(buckets.sizes) + (ranks - 1)
    dropped = len(lengths) - len(taken)
    report = samplers[0].report()
    assert (f"{twice} example" in report) == bool(twice)
    assert (f"{dropped} example" in report) == bool(dropped)


@given(LENGTHS, st.integers(0, 3), st.data())
def test_resumed_equals_uninterrupted(lengths: list[int], epoch: int, data: st.DataObject) -> None:
    buckets = bucket(lengths, k=3)

    def make() -> BucketBatchSampler:
        return BucketBatchSampler(lengths, buckets, batch_size=4, seed=7)

    whole = make()
    whole.set_epoch(epoch)
    batches = list(whole)
    taken = data.draw(st.integers(0, len(batches)))
    again = make()
    again.load_state_dict(whole.state_dict(taken))
    again.set_epoch(again.epoch)
    assert list(again) == batches[taken:]
    assert list(again) == batches  # the whole epoch, where it is gone through once more
    again.load_state_dict(whole.state_dict(taken))
    again.set_epoch(epoch + 1)
    whole.set_epoch(epoch + 1)
    assert list(again) == list(whole)


def test_order_changes_with_epoch_and_seed_only() -> None:
    lengths = [1 + i % 30 for i in range(200)]
    buckets = bucket(lengths, k=3)

    def order(seed: int, epoch: int, shuffle: bool = True) -> list[list[int]]:
        sampler = BucketBatchSampler(lengths, buckets, batch_size=8, seed=seed, shuffle=shuffle)
        sampler.set_epoch(epoch)
        torch.rand(3)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)
    assert order(0, 1, shuffle=False) == order(1, 2, shuffle=False)
    sizes = [shape(buckets, lengths, batch)[1] for batch in order(0, 0, shuffle=False)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_loader(workers: int) -> None:
    lengths = [1 + i * i % 29 for i in range(90)]
    data = [torch.full((n,), i + 1) for i, n in enumerate(lengths)]
    buckets = bucket(lengths, k=3)
    sampler = BucketBatchSampler(lengths, buckets, batch_size=8)
    collate = PadCollate(buckets, Pad(0))

    def loader() -> DataLoader[torch.Tensor]:
        return DataLoader(
            data,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )

    batches = list(loader())
    assert len(batches) == len(sampler)
    assert len({b.shape for b in batches}) <= len(buckets.sizes) + 1
    assert sorted(int(row[0]) for b in batches for row in b) == list(range(1, 91))
    sampler.load_state_dict(sampler.state_dict(taken=5))
    assert [b.tolist() for b in loader()] == [b.tolist() for b in batches[5:]]


def test_report() -> None:
    sampler = BucketBatchSampler([2, 2, 2, 5, 5], Buckets((2, 5)), batch_size=3)
    assert sampler.report() == "2 steps, 15.8% padding\n  2 x 2: 1 batch\n  3 x 5: 1 batch"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either batch_size=32 or tokens=4096"),
        ({"batch_size": 2, "tokens": 8}, "either"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"batch_size": "2"}, "batch_size='2'"),
        ({"tokens": 7}, "has no room for one example of the largest size, 8"),
        ({"batch_size": 2, "seed": -1}, "seed=-1"),
        ({"batch_size": 9, "drop_last": True}, "none of the batches of 3 examples is full"),
        ({"batch_size": 2, "rank": 1}, "go together"),
        ({"batch_size": 2, "rank": 2, "ranks": 2}, "rank=2 is no rank out of ranks=2"),
    ],
)
def test_bad_arguments(options: dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        BucketBatchSampler([3, 4, 8], Buckets((4, 8)), **options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_bad_lengths() -> None:
    for lengths, message in (([], "no lengths"), ([3, 9], "above the largest size")):
        with pytest.raises(ArgumentError, match=message):
            BucketBatchSampler(lengths, Buckets((4, 8)), batch_size=2)


def test_bad_states() -> None:
    sampler = BucketBatchSampler([3, 4, 8], Buckets((4, 8)), batch_size=2)
    state = sampler.state_dict(1)
    for taken in (3, -1, True, "1"):
        with pytest.raises(ArgumentError, match="no number of batches out of 2"):
            sampler.state_dict(taken)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="epoch=-1"):
        sampler.set_epoch(-1)
    for wrong, message in (
        ({}, "no state of a BucketBatchSampler"),
        ({**state, "taken": None}, "no state"),
        ({**state, "taken": 3}, "has 3 batches"),
        ({**state, "seed": 1}, "seed was 1 and is 0"),
        ({**state, "sizes": [4, 9]}, r"sizes was \[4, 9\] and is \[4, 8\]"),
    ):
        with pytest.raises(StateError, match=message):
            sampler.load_state_dict(wrong)
    other = BucketBatchSampler([3, 4, 7], Buckets((4, 8)), batch_size=2)
    with pytest.raises(StateError, match="lengths was"):
        other.load_state_dict(state)


def test_ranks_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    lengths = [1 + i % 5 for i in range(40)]
    buckets = bucket(lengths, k=2)
    of_the_job = BucketBatchSampler(lengths, buckets, batch_size=4)
    same = BucketBatchSampler(lengths, buckets, batch_size=4, rank=1, ranks=3)
    assert list(of_the_job) == list(same)
