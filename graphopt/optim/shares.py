"""Work on many matrices divided among ranks, and its results on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import ArgumentError, RankError

HEADER = 8  # bytes


def check_group(group: dist.ProcessGroup | None) -> None:
    """Raise `ArgumentError` for a group that this process is not in."""
    if group is None:
        return
    if not dist.is_initialized():
        raise ArgumentError(
            "process_group is given, and no job runs", hint="call init_process_group before"
        )
    if dist.get_rank(group) < 0:
        raise ArgumentError(
            "this rank is not in process_group", hint="pass the group of its data-parallel ranks"
        )


def longest_first(costs: Sequence[float], ranks: int) -> list[int]:
    """Who does what: the most costly first, each to the rank that has least (Graham, 1969).

    No rank has more than ``4 / 3 - 1 / (3 ranks)`` times the best largest share.

    Args:
        costs: of each piece of work.
        ranks: how many.

    Returns:
        The rank of each piece, the same on all ranks.
    """
    loads, owner = [0.0] * ranks, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[index] = loads.index(min(loads))
        loads[owner[index]] += costs[index]
    return owner


def shared(
    shapes: Sequence[tuple[int, ...]],
    present: Sequence[bool],
    costs: Sequence[float],
    compute: Callable[[list[int]], list[Tensor]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> dict[int, Tensor]:
    """The results of all pieces of work on all ranks, each computed by one of them.

    Args:
        shapes: of the results, which are bfloat16.
        present: which of them there is something to do for; the same on all ranks.
        costs: of each.
        compute: the results of some pieces.
        group: the ranks.
        device: where the results are.

    Raises:
        RankError: `present` differs between ranks; on all of them.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    owner = longest_first(costs, size)
    numbers = [torch.Size(shape).numel() for shape in shapes]
    lengths = [sum(n for n, o in zip(numbers, owner, strict=True) if o == r) for r in range(size)]
    longest = 2 * max(lengths) + HEADER
    sent = torch.zeros(longest, dtype=torch.uint8, device=device)
    mask = zlib.crc32(bytes(present)).to_bytes(4, "little")
    sent[:4] = torch.tensor(list(mask), dtype=torch.uint8)
    own = [i for i, o in enumerate(owner) if o == rank and present[i]]
    results = dict(zip(own, compute(own), strict=True))
    start = HEADER
    for i in (i for i, o in enumerate(owner) if o == rank):
        if i in results:
            piece = results[i].contiguous().flatten().view(torch.uint8)
            sent[start : start + 2 * numbers[i]] = piece
        start += 2 * numbers[i]
    received = torch.empty(size * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(received, sent, group=group)
    _agree(received.view(size, longest)[:, :4].tolist())
    starts = [r * longest + HEADER for r in range(size)]
    for i, o in enumerate(owner):
        end = starts[o] + 2 * numbers[i]
        if present[i]:
            results[i] = received[starts[o] : end].view(torch.bfloat16).view(shapes[i])
        starts[o] = end
    return results


def _agree(masks: list[list[int]]) -> None:
    if other := next((r for r, mask in enumerate(masks) if mask != masks[0]), None):
        raise RankError(
            f"ranks 0 and {other} have gradients of different parameters",
            hint="let the same parameters have gradients on all ranks, as group_gradients does",
        )
