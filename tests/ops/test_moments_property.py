"""Moments of generated rows and windows, against their definition in float64."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.ops import moments_patch, moments_shift
from graphopt.ops.moments_window import PatchArguments, Window

ops = torch.ops.graphopt
QUICK = settings(max_examples=60, deadline=None)


def definition(rows: Tensor, ones: bool) -> Tensor:
    """[B, d * (d + 1) / 2] of rows [B, N, d]."""
    if ones:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    at = torch.tril_indices(rows.shape[2], rows.shape[2])
    return (rows.mT @ rows)[:, at[0], at[1]]


def integers(*shape: int, seed: int) -> Tensor:
    """Small integers: sums of their products are exact, so results are equal bit by bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(torch.float32)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Window, list[int]]:
    """A window and an input size for which the convolution has outputs."""
    rank = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank))

    transposed = draw(st.booleans())
    kernel, dilation, stride = each(1, 4 if rank < 3 else 2), each(1, 3), each(1, 3)
    if draw(st.booleans()):
        stride = [1] * rank
    padding, output_padding = each(0, 3), each(0, 2)
    output_padding = [
        min(o, max(s, d) - 1) for o, s, d in zip(output_padding, stride, dilation, strict=True)
    ]
    window = Window.of(kernel, stride, padding, dilation, transposed, output_padding)
    spatial = each(1, 6 if rank < 3 else 3)
    while min(window.outputs(spatial)) < 1:
        spatial = [size + 1 for size in spatial]
    return window, spatial


def patches(x: Tensor, window: Window, groups: int) -> Tensor:
    """[groups, images and positions, entries], gathered position by position."""
    rank, channels = len(window.kernel), x.shape[1] // groups
    outputs = window.outputs(x.shape[2:])
    grid = torch.cartesian_prod(*(torch.arange(o) for o in outputs)).view(-1, rank)
    offsets = torch.cartesian_prod(*(torch.arange(k) for k in window.kernel)).view(-1, rank)
    rows = x.new_zeros(groups, x.shape[0], len(grid), channels, len(offsets))
    images = x.reshape(x.shape[0], groups, channels, *x.shape[2:])
    for p, position in enumerate(grid.tolist()):
        for k, offset in enumerate(offsets.tolist()):
            place = []
            for o, i, s, pad, d, size in zip(
                position, offset, window.stride, window.padding, window.dilation, x.shape[2:],
                strict=True,
            ):  # fmt: skip
                if not window.transposed:
                    at = o * s - pad + i * d
                else:
                    at, rest = divmod(o + pad - i * d, s)
                    at = -1 if rest else at
                place.append(at if 0 <= at < size else None)
            if None not in place:
                values = images[(slice(None), slice(None), slice(None), *place)]
                rows[:, :, p, :, k] = values.transpose(0, 1)
    return rows.reshape(groups, -1, channels * len(offsets))


@QUICK
@given(st.integers(1, 3), st.integers(0, 9), st.integers(1, 12), st.booleans(), st.integers(0, 99))
def test_rows(batch: int, count: int, width: int, ones: bool, seed: int) -> None:
    rows = integers(batch, count, width, seed=seed)
    found = ops.second_moment(rows, ones, 1, 0.5)
    assert torch.equal(found.double(), 0.5 * definition(rows.double(), ones))
    total = width + int(ones)
    squares = [r * (r + 3) // 2 for r in range(total)]
    assert torch.equal(ops.diagonal_moment(rows, ones, 0.5), found[:, squares])
    # Cutting keeps the diagonal blocks.
    at = torch.tril_indices(total, total)
    full = torch.zeros(batch, total, total)
    full[:, at[0], at[1]] = found
    for pieces in (p for p in range(2, total + 1) if total % p == 0):
        size = total // pieces
        at = torch.tril_indices(size, size)
        blocks = torch.stack(
            [full[:, i : i + size, i : i + size] for i in range(0, total, size)], 1
        )
        cut = ops.second_moment(rows, ones, pieces, 0.5)
        assert torch.equal(cut, blocks[..., at[0], at[1]].flatten(0, 1))


@QUICK
@given(windows(), st.integers(1, 2), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_windows(
    drawn: tuple[Window, list[int]], groups: int, channels: int, ones: bool, seed: int
) -> None:
    window, spatial = drawn
    x = integers(2, groups * channels, *spatial, seed=seed)
    wanted = definition(patches(x, window, groups), ones)
    args = PatchArguments(window, groups, ones, 1, 1.0)
    assert torch.equal(moments_patch.by_patches(x, args), wanted)
    if moments_shift.possible(window):
        correlate = moments_shift.by_convolution
        found = moments_patch.by_shifts(x, args, correlate)
        assert torch.equal(found, wanted)
    arguments = (
        window.kernel, window.stride, window.padding, window.dilation, groups, window.transposed,
        window.output_padding,
    )  # fmt: skip
    assert torch.equal(ops.patch_moment(x, *arguments, ones, 1, 1.0), wanted)
    size = channels * torch.tensor(window.kernel).prod().item() + int(ones)
    diagonal = wanted[:, [r * (r + 3) // 2 for r in range(int(size))]]
    assert torch.equal(ops.patch_diagonal_moment(x, *arguments, ones, 1.0), diagonal)


@QUICK
@given(st.lists(st.integers(0, 9), max_size=40), st.integers(-1, 9))
def test_tokens(tokens: list[int], padding: int) -> None:
    found = ops.token_counts(torch.tensor(tokens, dtype=torch.int64), 10, padding, 1.0)
    assert found.tolist() == [[0 if i == padding else tokens.count(i) for i in range(10)]]
