"""Two int16 numbers in one int32 word, for sums by collectives that know no int16.

    pack_pairs(Tensor lanes) -> Tensor
    unpack_pairs(Tensor words, int count) -> Tensor

A word is ``(odd << 16) + even`` modulo 2^32, for elements 2i and 2i + 1. The sum of words modulo
2^32 is the word of the sums, as long as the sum of each lane fits int16: -32768 to 32767. So the
caller leaves room: with W summands each may be up to ``32767 // W``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("pack_pairs(Tensor lanes) -> Tensor")
_library.define("unpack_pairs(Tensor words, int count) -> Tensor")


def _check_lanes(lanes: Tensor) -> None:
    if lanes.dtype is not torch.int16:
        raise ArgumentError(
            f"pack_pairs packs int16, not {lanes.dtype}",
            hint="quantise first, by graphopt::flex_quantise",
        )


def _check_words(words: Tensor, count: int) -> None:
    if words.dtype is not torch.int32 or words.dim() != 1 or (count + 1) // 2 != words.shape[0]:
        raise ArgumentError(
            f"{count} numbers are in {(count + 1) // 2} int32 words, "
            f"not in {words.dtype} of shape {tuple(words.shape)}",
            hint="pass the sum of what graphopt::pack_pairs returned, and its number of elements",
        )


def pack_pairs(lanes: Tensor) -> Tensor:
    """Words of the elements in contiguous order.

    Args:
        lanes: int16 of any shape and strides.

    Returns:
        int32 ``[ceil(numel / 2)]``; the odd lane of a single last element is 0.

    Raises:
        ArgumentError: `lanes` are not int16.
    """
    _check_lanes(lanes)
    flat = lanes.reshape(-1).to(torch.int32)
    even, odd = flat[0::2], flat[1::2]
    words = even.clone()
    words[: odd.numel()] += odd << 16
    return words


def unpack_pairs(words: Tensor, count: int) -> Tensor:
    """The lanes of words, or of sums of words.

    Args:
        words: int32 ``[ceil(count / 2)]``.
        count: number of elements that were packed.

    Returns:
        int16 ``[count]``.

    Raises:
        ArgumentError: so many elements are not in these words.
    """
    _check_words(words, count)
    even = words << 16 >> 16  # with its sign
    odd = (words - even) >> 16  # a negative even lane has borrowed from the odd one
    return torch.stack([even, odd], dim=1).view(-1)[:count].to(torch.int16)


def _fake_pack(lanes: Tensor) -> Tensor:
    _check_lanes(lanes)
    return lanes.new_empty((lanes.numel() + 1) // 2, dtype=torch.int32)


def _fake_unpack(words: Tensor, count: int) -> Tensor:
    _check_words(words, count)
    return words.new_empty(count, dtype=torch.int16)


for _name, _kernel, _fake in (
    ("pack_pairs", pack_pairs, _fake_pack),
    ("unpack_pairs", unpack_pairs, _fake_unpack),
):
    # One kernel for every device.
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_name}", _fake, lib=_library)
