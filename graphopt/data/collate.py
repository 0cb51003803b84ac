"""Makes a padded batch of examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import default_collate

from graphopt.data.buckets import Buckets
from graphopt.errors import ArgumentError

Key: TypeAlias = str | int
Side: TypeAlias = Literal["right", "left"]


@dataclass(frozen=True)
class Pad:
    """How one entry of an example is padded.

    Attributes:
        value: at padded positions.
        dim: of the entry's own tensor that is padded, or several, which have one length.
        side: where padding goes.
        mask: key in a batch for the mask, true at true positions, of shape (batch, size); ``None``
            for no mask. Where examples are no dictionaries, any key: masks come last, in order.
        buckets: sizes of this entry; ``None`` for those of the `PadCollate`.

    Raises:
        ArgumentError: the side is unknown, or there is no dimension.
    """

    value: float
    dim: int | tuple[int, ...] = 0
    side: Side = "right"
    mask: str | None = None
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        if self.side not in ("right", "left"):
            raise ArgumentError(f"side={self.side!r} is unknown", hint="use 'right' or 'left'")
        if not self.dims:
            raise ArgumentError("dim=() pads nothing", hint="pass dim=0")

    @property
    def dims(self) -> tuple[int, ...]:
        """Dimensions that are padded."""
        return self.dim if isinstance(self.dim, tuple) else (self.dim,)

    def length(self, tensor: Tensor, where: str) -> int:
        """Of one entry.

        Raises:
            ArgumentError: it has no such dimension, or its lengths differ.
        """
        named = ", ".join(map(str, self.dims))
        if any(not -tensor.dim() <= dim < tensor.dim() for dim in self.dims):
            raise ArgumentError(
                f"an entry of shape {list(tensor.shape)} has no dim={named}",
                where=where,
                hint="dim counts the dimensions of that shape, from 0",
            )
        lengths = {tensor.shape[dim] for dim in self.dims}
        if len(lengths) > 1:
            raise ArgumentError(
                f"an entry of shape {list(tensor.shape)} has two lengths along dim={named}",
                where=where,
                hint="name dimensions of one length",
            )
        return lengths.pop()

    def pad(self, tensor: Tensor, more: int) -> Tensor:
        """With `more` padded positions."""
        ends = [0, 0] * tensor.dim()
        for dim in self.dims:
            at = 2 * (tensor.dim() - 1 - dim % tensor.dim())
            ends[at + (self.side == "right")] = more
        return F.pad(tensor, ends, value=self.value)

    def check(self, dtype: torch.dtype, where: str) -> None:
        """Whether the value can be written.

        Raises:
            ArgumentError: a tensor of this dtype would hold another one.
        """
        try:
            kept = torch.tensor(self.value, dtype=dtype).item()
        except (RuntimeError, OverflowError):
            kept = None
        exact = dtype.is_floating_point or dtype.is_complex or kept == self.value
        if kept is None or not exact:
            raise ArgumentError(
                f"padding value {self.value} does not fit {str(dtype).removeprefix('torch.')}",
                where=where,
                hint="pass another value, or convert the entry",
            )


class PadCollate:
    """Makes a batch of examples, for a `DataLoader`: entries are padded to one of a few sizes.

    The size is the smallest that takes the longest entry of the batch; with batches of a
    `BucketBatchSampler` with the same sizes there are no others than it promises. Entries that are
    not padded are made a batch by torch's ``default_collate``.

    Args:
        buckets: the sizes.
        pads: how entries are padded, by their key in an example, or their index in a tuple; a
            single `Pad` if an example is a tensor.

    Raises:
        ArgumentError: nothing is padded, or two masks have one key.
    """

    def __init__(self, buckets: Buckets, pads: Mapping[Key, Pad] | Pad) -> None:
        self.buckets = buckets
        self._single = isinstance(pads, Pad)
        self.pads: dict[Key, Pad] = {0: pads} if isinstance(pads, Pad) else dict(pads)
        if not self.pads:
            raise ArgumentError("no entry is padded", hint='pass such as {"ids": Pad(0)}')
        if any(isinstance(key, int) and key < 0 for key in self.pads):
            raise ArgumentError("entries of tuples are counted from 0", hint="pass their index")
        masks = [pad.mask for pad in self.pads.values() if pad.mask is not None]
        if len(set(masks)) < len(masks) or any(mask in self.pads for mask in masks):
            raise ArgumentError(
                f"masks have the keys {masks}, which are not all new",
                hint="give each mask a key of its own",
            )

    def __call__(self, examples: Sequence[Any]) -> Any:
        """A batch: dictionaries become a dictionary, tuples a tuple, tensors a tensor.

        A tuple's or tensor's masks come last. Lists of numbers and arrays become tensors.

        Raises:
            ArgumentError: there is no example, an entry is missing or longer than the largest
                size, or its other dimensions differ.
        """
        if not len(examples):
            raise ArgumentError("there are no examples", hint="leave empty batches out")
        keyed = isinstance(examples[0], Mapping)
        rows = [(example,) if self._single else example for example in examples]
        entries = {key: _entries(rows, key, pad) for key, pad in self.pads.items()}
        sizes = self._sizes(entries)
        batch: dict[Key, Any] = {}
        masks: dict[str, Tensor] = {}
        for key, pad in self.pads.items():
            lengths = [pad.length(tensor, _at(key)) for tensor in entries[key]]
            size = sizes[pad.buckets or self.buckets]
            padded = [pad.pad(t, size - n) for t, n in zip(entries[key], lengths, strict=True)]
            batch[key] = _stack(padded, entries[key], key)
            if pad.mask is not None:
                masks[pad.mask] = _mask(lengths, size, pad.side)
        if keyed:
            for key in rows[0]:
                if key in masks:
                    raise ArgumentError(
                        f"examples have an entry {key!r} already, which a mask would replace",
                        hint="give the mask another key",
                    )
                if key not in batch:
                    batch[key] = default_collate([row[key] for row in rows])
            return {**{key: batch[key] for key in rows[0]}, **masks}
        for index in range(len(rows[0])):
            if index not in batch:
                batch[index] = default_collate([row[index] for row in rows])
        found = [*(batch[index] for index in range(len(rows[0]))), *masks.values()]
        return found[0] if self._single and len(found) == 1 else tuple(found)

    def _sizes(self, entries: Mapping[Key, list[Tensor]]) -> dict[Buckets, int]:
        """The size of this batch, for each of the buckets."""
        sizes: dict[Buckets, int] = {}
        for key, tensors in entries.items():
            pad = self.pads[key]
            buckets = pad.buckets or self.buckets
            longest = max(pad.length(tensor, _at(key)) for tensor in tensors)
            if longest > buckets.sizes[-1]:
                raise ArgumentError(
                    f"an entry has length {longest}, above the largest size, {buckets.sizes[-1]}",
                    where=_at(key),
                    hint="count the lengths of all data when sizes are chosen, or cut examples",
                )
            sizes[buckets] = max(sizes.get(buckets, 0), buckets.size_of(max(1, longest)))
        return sizes


def _entries(rows: Sequence[Any], key: Key, pad: Pad) -> list[Tensor]:
    """One entry of all examples, as tensors of one dtype."""
    found = []
    for row in rows:
        try:
            value = row[key]
        except (KeyError, IndexError, TypeError) as error:
            has = list(row) if isinstance(row, Mapping) else f"{len(row)} entries"
            raise ArgumentError(
                f"an example has no entry {key!r}; it has {has}",
                hint="name the entries to pad by their keys, or by their index in a tuple",
            ) from error
        found.append(value if isinstance(value, Tensor) else torch.as_tensor(value))
    for dtype in {tensor.dtype for tensor in found}:
        pad.check(dtype, _at(key))
    return found


def _stack(padded: list[Tensor], entries: list[Tensor], key: Key) -> Tensor:
    if len({tensor.shape for tensor in padded}) > 1:
        shapes = sorted({tuple(tensor.shape) for tensor in entries})
        raise ArgumentError(
            f"entries have the shapes {shapes[0]} and {shapes[-1]}, which differ in more than what "
            "is padded",
            where=_at(key),
            hint="pass dim= for the dimension that differs, or several",
        )
    return torch.stack(padded)


def _mask(lengths: Sequence[int], size: int, side: Side) -> Tensor:
    """True at true positions."""
    before = torch.arange(size) < torch.tensor(lengths)[:, None]
    return before if side == "right" else before.flip(1)


def _at(key: Key) -> str:
    return f"entry {key!r}"
