"""The moment of overlapping patches from correlations of the image with itself.

For a window that moves by single steps, entries (c, k) and (c', k') of the moment are
``Σ_u p[c, u] p[c', u + δ]`` with ``δ = (k' - k) * dilation``, where u runs over a box of the padded
image p that depends on k. Boxes of different k differ by borders only. So the image is cut into
disjoint boxes such that each k uses all or nothing of each of them. A box is correlated once for
each δ, and the result serves all pairs (k, k') of that difference: a 3 x 3 kernel has 81 pairs, and
13 differences up to symmetry. Terms are only added, never subtracted, so nothing cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.moments_window import PatchArguments, Window

Box = tuple[tuple[int, int], ...]
# From the widened plane, the first and the last-but-one position of a box, the window and the
# number of groups to the box's correlations [groups, c, c', *differences].
Correlate = Callable[[Tensor, Box, Window, int], Tensor]

# Costs in units of one multiplication in a large product, estimated on one core: for each copied
# element, kernel offset, box, and element of a box's result or of the moment.
_COPY = 64
_OFFSET = 600_000
_BOX = 1_500_000
_ELEMENT = 140
# Fewer channels leave the registers of a convolution partly empty; with fewer than `_LEAST_GROUP`
# in a group it is always slow.
_FULL_CHANNELS = 16
_LEAST_GROUP = 4


def pays(x: Tensor, window: Window, groups: int) -> bool:
    """Whether correlations are expected to be faster than copied patches.

    They need windows that move by single steps and overlap. They save multiplications, and cost a
    fixed time for each box and each entry of the moment: they lose on small images, on large ones
    of very few channels per group, and where channels outnumber positions. Only float32 on a CPU
    has a fast correlation here.

    Args:
        x: [n, C, *spatial].
        window: how the kernel moves.
        groups: number of independent sets of channels.
    """
    channels = x.shape[1] // groups
    if not possible(window) or x.dtype is torch.float64 or x.device.type != "cpu":
        return False
    if groups > 1 and channels < _LEAST_GROUP:
        return False
    outputs = window.outputs(x.shape[2:])
    positions = x.shape[0] * math.prod(outputs)
    offsets = math.prod(window.kernel)
    width = channels * offsets
    copied = positions * groups * width * (width // 2 + _COPY)
    boxes = math.prod(map(len, _parts(window, outputs)))
    result = x.shape[1] * channels * math.prod(differences(window.kernel))
    multiplied = positions * result // channels * max(channels, _FULL_CHANNELS)
    moved = boxes * result + groups * width * width
    return copied > multiplied + offsets * _OFFSET + boxes * _BOX + moved * _ELEMENT


def possible(window: Window) -> bool:
    """Whether windows move by single steps, and overlap."""
    return set(window.step) == {1} and math.prod(window.kernel) > 1


def divides(x: Tensor, args: PatchArguments) -> bool:
    """Whether the pieces consist of whole channels."""
    return args.pieces == 1 or (not args.ones and x.shape[1] % (args.groups * args.pieces) == 0)


def differences(kernel: Sequence[int]) -> tuple[int, ...]:
    """Number of differences of kernel offsets along each dimension.

    Along the first only those from 0 on: the moment is symmetric.
    """
    return (kernel[0], *(2 * k - 1 for k in kernel[1:]))


def widened(window: Window) -> tuple[tuple[int, int], ...]:
    """The window's margins with room for every difference around every position."""
    return tuple(
        (low + (reach if dim else 0), high + reach)
        for dim, ((low, high), reach) in enumerate(zip(window.margins(), window.reach, strict=True))
    )


def gram(
    plane: Tensor, window: Window, outputs: Sequence[int], groups: int, correlate: Correlate
) -> Tensor:
    """``Σ p pᵀ`` over all patches p of a plane.

    Args:
        plane: [n, C, *spatial] with the window's margins `widened`.
        window: one that moves by single steps.
        outputs: number of patches along each dimension.
        groups: number of independent sets of channels.
        correlate: how one box is correlated.

    Returns:
        [groups, d, d] with d = C / groups * prod(kernel), in the order (channel, kernel offset).
    """
    channels = plane.shape[1] // groups
    first, *others = kernel = window.kernel
    boxes = list(product(*_parts(window, outputs)))
    found = torch.stack(
        [
            correlate(plane, tuple((start, stop) for start, stop, *_ in parts), window, groups)
            for parts in boxes
        ]
    )
    by_box = found.view(len(boxes), -1)
    result = found.new_empty(groups, channels, *kernel, channels, *kernel)
    for k in product(*map(range, kernel)):
        takes = [
            all(low <= i <= high for i, (_, _, low, high) in zip(k, parts, strict=True))
            for parts in boxes
        ]
        total = (found.new_tensor(takes) @ by_box).view(found.shape[1:])
        to: tuple[Any, ...] = (slice(None), slice(None), *k, slice(None), slice(k[0], None))
        later = (slice(s - 1 - i, 2 * s - 1 - i) for s, i in zip(others, k[1:], strict=True))
        wanted: tuple[Any, ...] = (..., slice(0, first - k[0]), *later)
        result[to] = total[wanted]
    _mirror(result.view(groups, channels, first, -1, channels, first, math.prod(others)))
    size = channels * math.prod(kernel)
    return result.view(groups, size, size)


def _mirror(moment: Tensor) -> None:
    """Fills [g, c, a, m, c', a', m'] for a > a' from the entries with a < a'."""
    first = moment.shape[2]
    for a in range(first):
        for b in range(a + 1, first):
            moment[:, :, b, :, :, a] = moment[:, :, a, :, :, b].permute(0, 3, 4, 1, 2)


def by_convolution(plane: Tensor, box: Box, window: Window, groups: int) -> Tensor:
    """One box against all differences, as the weight gradient of a convolution.

    Its output gradient is the box and its input is the box with its surroundings, so that its
    weight has an entry for each difference.
    """
    rank = len(window.kernel)
    channels = plane.shape[1] // groups
    shape = differences(window.kernel)
    inside: list[Any] = [...]
    around: list[Any] = [...]
    for dim, ((start, stop), reach) in enumerate(zip(box, window.reach, strict=True)):
        # In the widened plane the box lies behind the room before it.
        before = reach if dim else 0
        inside.append(slice(start + before, stop + before))
        around.append(slice(start, stop + before + reach))
    near, wide = (plane[tuple(part)].to(torch.float32) for part in (inside, around))
    found: Tensor
    _, found, _ = torch.ops.aten.convolution_backward(
        near, wide, wide.new_empty(groups * channels, channels, *shape), None,
        [1] * rank, [0] * rank, window.dilation, False, [0] * rank, groups, [False, True, False],
    )  # fmt: skip
    return found.view(groups, channels, channels, *shape)


def _parts(window: Window, outputs: Sequence[int]) -> list[tuple[tuple[int, int, int, int], ...]]:
    lines = zip(window.kernel, window.dilation, outputs, window.margins(), strict=True)
    return [_parts_of_a_line(*line) for line in lines]


@lru_cache(maxsize=512)
def _parts_of_a_line(
    kernel: int, dilation: int, outputs: int, margin: tuple[int, int]
) -> tuple[tuple[int, int, int, int], ...]:
    """Cuts one dimension so that each kernel offset takes all or nothing of each part.

    Offset k takes position u where ``0 <= u - k * dilation < outputs``. Margins hold only zeros and
    are left out.

    Returns:
        (start, stop, first offset, last offset) of each part.
    """

    def offsets(position: int) -> tuple[int, int]:
        first = -((outputs - 1 - position) // dilation)
        return max(0, first), min(kernel - 1, position // dilation)

    low, high = margin
    positions = range(max(0, low), outputs + dilation * (kernel - 1) - max(0, high))
    parts = []
    for (first, last), run in groupby(positions, offsets):
        part = list(run)
        if first <= last:
            parts.append((part[0], part[-1] + 1, first, last))
    return tuple(parts)
