"""The moment operators against brute force: layouts, windows, dtypes, tracing and bad input."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import ArgumentError
from graphopt.ops import moments_patch, moments_shift
from graphopt.ops.moments_window import PatchArguments, Window

ops = torch.ops.graphopt
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lower(matrix: Tensor) -> list[float]:
    """One matrix as its lower triangle, by two loops."""
    return [float(matrix[r, c]) for r in range(matrix.shape[0]) for c in range(r + 1)]


def expected(rows: Tensor, ones: bool, pieces: int, scale: float) -> Tensor:
    """The definition of `second_moment`, in float64."""
    rows = rows.double()
    if ones:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2)
    matrices = scale * torch.einsum("bnd,bne->bde", rows, rows)
    size = matrices.shape[1] // pieces
    blocks = [
        lower(matrix[i * size : (i + 1) * size, i * size : (i + 1) * size])
        for matrix in matrices
        for i in range(pieces)
    ]
    return torch.tensor(blocks, dtype=torch.float64).reshape(len(matrices) * pieces, -1)


def patches(
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    transposed: bool,
    output_padding: list[int],
) -> Tensor:
    """[groups, images and positions, entries]: what the convolution itself does to unit weights."""
    x, rank = x.double(), len(kernel)
    channels = x.shape[1] // groups
    columns = []
    for entry in itertools.product(range(channels), *(range(k) for k in kernel)):
        if transposed:
            weight = x.new_zeros(x.shape[1], 1, *kernel)
            weight.view(groups, channels, *kernel)[(slice(None), *entry)] = 1
            y = TRANSPOSED[rank](x, weight, None, stride, padding, output_padding, groups, dilation)
        else:
            weight = x.new_zeros(groups, channels, *kernel)
            weight[(slice(None), *entry)] = 1
            y = CONVOLUTIONS[rank](x, weight, None, stride, padding, dilation, groups)
        columns.append(y.transpose(0, 1).flatten(1))
    return torch.stack(columns, 2)


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-5) -> None:
    assert found.shape == wanted.shape
    bound = tolerance * max(1.0, float(wanted.abs().max())) if wanted.numel() else 0.0
    assert float((found.double() - wanted).abs().max() if wanted.numel() else 0.0) <= bound


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("width", "ones", "pieces"),
    [(5, False, 1), (5, True, 1), (6, False, 3), (5, True, 2), (5, True, 6), (2, True, 3)],
)
def test_second_moment(batch: int, width: int, ones: bool, pieces: int) -> None:
    rows = normal(batch, 7, width)
    found = ops.second_moment(rows, ones, pieces, 0.25)
    close(found, expected(rows, ones, pieces, 0.25))
    assert found.dtype is torch.float32


@pytest.mark.parametrize(("width", "ones"), [(513, False), (1030, True)])
def test_wide_second_moments_are_tiled(width: int, ones: bool) -> None:
    rows = normal(1, 9, width)
    full = rows.double()
    if ones:
        full = torch.cat([full, full.new_ones(1, 9, 1)], 2)
    at = torch.tril_indices(full.shape[2], full.shape[2])
    close(ops.second_moment(rows, ones, 1, 1.0), (full.mT @ full)[:, at[0], at[1]])


def test_strides_do_not_matter() -> None:
    for rows in (normal(2, 5, 8).mT, normal(4, 3, 10).permute(1, 2, 0), normal(2, 12, 6)[:, ::3]):
        close(ops.second_moment(rows, True, 1, 1.0), expected(rows, True, 1, 1.0))
    rows = normal(1, 1, 4).expand(2, 5, 4)
    close(ops.second_moment(rows, False, 1, 1.0), expected(rows, False, 1, 1.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_halves_are_cast_before_the_product(dtype: torch.dtype) -> None:
    rows = normal(2, 300, 4, dtype=dtype) * 40
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    found = ops.second_moment(rows, False, 1, 1e-3)
    assert found.dtype is wide
    close(found, expected(rows, False, 1, 1e-3), 1e-14 if dtype is torch.float64 else 2e-6)
    x = normal(2, 2, 6, 6, dtype=dtype)
    found = ops.patch_moment(x, [3, 3], [1], [1], [1], 1, False, [0], True, 1, 1.0)
    assert found.dtype is wide
    window = [3, 3], [1, 1], [1, 1], [1, 1], 1, False, [0, 0]
    close(found, expected(patches(x, *window), True, 1, 1.0), 2e-6)


def test_no_rows_have_no_moment() -> None:
    assert torch.equal(ops.second_moment(torch.zeros(2, 0, 3), True, 1, 1.0), torch.zeros(2, 10))
    assert torch.equal(ops.diagonal_moment(torch.zeros(2, 0, 3), True, 1.0), torch.zeros(2, 4))
    x = torch.zeros(0, 2, 5)
    found = ops.patch_moment(x, [3], [1], [0], [1], 1, False, [0], True, 1, 1.0)
    assert torch.equal(found, torch.zeros(1, 28))


@pytest.mark.parametrize("ones", [False, True])
def test_diagonal_moment_is_the_diagonal(ones: bool) -> None:
    rows = normal(3, 8, 5, dtype=torch.bfloat16)
    full = expected(rows, ones, 1, 0.5)
    size = 5 + int(ones)
    diagonal = full[:, [r * (r + 3) // 2 for r in range(size)]]
    close(ops.diagonal_moment(rows, ones, 0.5), diagonal)


# spatial, kernel, stride, padding, dilation, output padding, transposed
WINDOWS: dict[str, tuple[Any, ...]] = {
    "same": ([6, 5], [3, 3], [1, 1], [1, 1], [1, 1], [0, 0], False),
    "valid": ([6, 5], [3, 3], [1, 1], [0, 0], [1, 1], [0, 0], False),
    "full": ([4, 5], [3, 3], [1, 1], [2, 2], [1, 1], [0, 0], False),
    "beyond full": ([4, 3], [2, 2], [1, 1], [3, 2], [1, 1], [0, 0], False),
    "flat kernel": ([6, 5], [1, 3], [1, 1], [0, 1], [1, 1], [0, 0], False),
    "tall kernel": ([6, 5], [3, 1], [1, 1], [1, 0], [1, 1], [0, 0], False),
    "even kernel": ([6, 5], [2, 4], [1, 1], [1, 2], [1, 1], [0, 0], False),
    "dilated": ([9, 8], [3, 3], [1, 1], [2, 2], [2, 2], [0, 0], False),
    "dilated oddly": ([9, 10], [3, 2], [1, 1], [1, 0], [3, 4], [0, 0], False),
    "few outputs": ([3, 2], [3, 3], [1, 1], [1, 1], [1, 1], [0, 0], False),
    "one output": ([5, 4], [5, 4], [1, 1], [0, 0], [1, 1], [0, 0], False),
    "strided": ([7, 8], [3, 3], [2, 2], [1, 1], [1, 1], [0, 0], False),
    "strided and dilated": ([9, 9], [3, 2], [2, 3], [2, 1], [2, 1], [0, 0], False),
    "tiles": ([8, 8], [4, 4], [4, 4], [0, 0], [1, 1], [0, 0], False),
    "pointwise": ([4, 3], [1, 1], [1, 1], [0, 0], [1, 1], [0, 0], False),
    "pointwise strided": ([5, 4], [1, 1], [2, 3], [0, 0], [1, 1], [0, 0], False),
    "line": ([9], [3], [1], [1], [1], [0], False),
    "line strided": ([9], [5], [2], [2], [1], [0], False),
    "volume": ([4, 3, 5], [2, 3, 2], [1, 1, 1], [1, 1, 0], [1, 1, 2], [0, 0, 0], False),
    "volume strided": ([4, 5, 4], [2, 2, 2], [2, 2, 2], [0, 1, 0], [1, 1, 1], [0] * 3, False),
    "transposed": ([3, 4], [3, 3], [1, 1], [1, 1], [1, 1], [0, 0], True),
    "transposed cut": ([5, 6], [2, 2], [1, 1], [2, 1], [1, 1], [0, 0], True),
    "transposed strided": ([3, 4], [4, 3], [2, 2], [1, 1], [1, 1], [0, 1], True),
    "transposed dilated": ([3, 4], [3, 2], [2, 1], [1, 0], [2, 3], [1, 2], True),
    "transposed line": ([5], [4], [3], [2], [1], [2], True),
    "transposed volume": ([2, 3, 2], [2, 2, 3], [2, 1, 2], [0, 1, 1], [1] * 3, [1, 0, 1], True),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("name", WINDOWS)
def test_patch_moments(name: str, groups: int) -> None:
    spatial, kernel, stride, padding, dilation, output_padding, transposed = WINDOWS[name]
    x = normal(3, 4, *spatial)
    arguments = kernel, stride, padding, dilation, groups, transposed, output_padding
    rows = patches(x, *arguments)
    for ones in (False, True):
        wanted = expected(rows, ones, 1, 0.5)
        close(ops.patch_moment(x, *arguments, ones, 1, 0.5), wanted)
        args = PatchArguments.of(*arguments, ones, 1, 0.5)
        close(moments_patch.by_patches(x, args), wanted)
        if moments_shift.possible(args.window):
            correlate = moments_shift.by_convolution
            close(moments_patch.by_shifts(x, args, correlate), wanted)
        size = rows.shape[2] + int(ones)
        diagonal = wanted[:, [r * (r + 3) // 2 for r in range(size)]]
        close(ops.patch_diagonal_moment(x, *arguments, ones, 0.5), diagonal)


@pytest.mark.parametrize(
    ("channels", "groups", "ones", "pieces"),
    [(4, 1, False, 4), (4, 1, False, 6), (4, 2, False, 2), (3, 1, True, 4), (3, 1, True, 7)],
)
def test_pieces_of_patches(channels: int, groups: int, ones: bool, pieces: int) -> None:
    x = normal(2, channels, 6, 5)
    window = [3, 3], [1, 1], [1, 1], [1, 1], groups, False, [0, 0]
    wanted = expected(patches(x, *window), ones, pieces, 1.0)
    close(ops.patch_moment(x, *window, ones, pieces, 1.0), wanted)
    moved = PatchArguments.of(*window, ones, pieces, 1.0)
    if moments_shift.divides(x, moved):
        correlate = moments_shift.by_convolution
        close(moments_patch.by_shifts(x, moved, correlate), wanted)


def test_patches_are_those_of_unfold() -> None:
    x = normal(2, 3, 8, 7)
    rows = F.unfold(x, (3, 2), (2, 1), (1, 1), (2, 1)).transpose(1, 2).reshape(1, -1, 18)
    found = ops.patch_moment(x, [3, 2], [2, 1], [1, 1], [2, 1], 1, False, [0, 0], True, 1, 1.0)
    close(found, expected(rows, True, 1, 1.0))


def test_one_entry_stands_for_all_dimensions() -> None:
    x = normal(2, 2, 6, 6)
    short = ops.patch_moment(x, [3, 3], [2], [1], [1], 1, False, [0], False, 1, 1.0)
    full = [3, 3], [2, 2], [1, 1], [1, 1], 1, False, [0, 0]
    assert torch.equal(short, ops.patch_moment(x, *full, False, 1, 1.0))


def test_layout_of_the_image_does_not_matter() -> None:
    x = normal(8, 8, 40, 40)
    window = [3, 3], [1], [1], [1], 1, False, [0], True, 1, 1.0
    plain = ops.patch_moment(x, *window)
    last = x.contiguous(memory_format=torch.channels_last)
    close(ops.patch_moment(last, *window), plain.double())


def test_where_correlations_are_used() -> None:
    def pays(
        x: Tensor, kernel: int, stride: int, groups: int = 1, transposed: bool = False
    ) -> bool:
        window = Window.of([kernel] * 2, [stride], [kernel // 2], [1], transposed, [0])
        return moments_shift.pays(x, window, groups)

    large = torch.empty(64, 16, 32, 32)
    assert pays(large, 3, 1)
    assert pays(large, 3, 1, transposed=True)
    assert pays(large, 3, 1, groups=2)
    assert not pays(large, 3, 1, groups=16)
    assert not pays(large, 3, 2)
    assert not pays(large, 1, 1)
    assert not pays(large.double(), 3, 1)
    assert not pays(large[:1, :4, :8, :8], 3, 1)
    assert not pays(torch.empty(8, 512, 4, 4), 3, 1)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize(("stride", "factor"), [(1, 1.5), (2, 1.1)])
def test_patches_are_never_all_in_memory(stride: int, factor: float) -> None:
    x = normal(32, 16, 64, 64)
    args = PatchArguments.of([3, 3], [stride], [1], [1], 1, False, [0], True, 1, 1.0)
    with Largest() as largest:
        moments_patch.patch_moment(x, args)
    copied = x.numel() * 9 // stride**2
    assert largest.elements < factor * x.numel() < copied


def test_token_counts() -> None:
    indices = torch.tensor([[0, 2, 2], [4, 2, 0]])
    count = ops.token_counts
    assert count(indices, 6, -1, 1.0).tolist() == [[2, 0, 3, 0, 1, 0]]
    assert count(indices, 6, 2, 0.5).tolist() == [[1, 0, 0, 0, 0.5, 0]]
    assert count(indices.to(torch.int32), 5, 9, 1.0).tolist() == [[2, 0, 3, 0, 1]]
    assert count(indices[:0], 3, 0, 1.0).tolist() == [[0, 0, 0]]
    assert count(indices, 6, -1, 1.0).dtype is torch.float32


def example_gradients(run: Any, x: Tensor, grad: Tensor, *parameters: Tensor) -> list[Tensor]:
    """[examples, entries] of each parameter: one backward per example, the statistics shared."""
    each: list[list[Tensor]] = [[] for _ in parameters]
    for n in range(x.shape[0]):
        mask = torch.zeros_like(grad)
        mask[n] = grad[n]
        found = torch.autograd.grad(run(x, *parameters), parameters, mask)
        for kept, gradient in zip(each, found, strict=True):
            kept.append(gradient.flatten())
    return [torch.stack(kept) for kept in each]


def unitwise(gradients: list[Tensor], scale: float) -> Tensor:
    columns = [(gradients[0] ** 2).sum(0)]
    if len(gradients) == 2:
        columns += [(gradients[0] * gradients[1]).sum(0), (gradients[1] ** 2).sum(0)]
    return scale * torch.stack(columns, 1)


@pytest.mark.parametrize("shift", [False, True])
def test_norm_moments(shift: bool) -> None:
    def check(run: Any, view: list[int], mean: Tensor | None, rstd: Tensor, *shapes: Any) -> None:
        statistics_shape, parameter_shape = shapes
        count = math.prod(parameter_shape)
        parameters = [torch.ones(count, dtype=torch.float64).requires_grad_()]
        if shift:
            parameters.append(torch.zeros(count, dtype=torch.float64).requires_grad_())
        wanted = unitwise(example_gradients(run, x, grad, *parameters), 0.5)
        found = ops.norm_moment(
            grad.view(view), x.view(view), mean, rstd, statistics_shape, parameter_shape, shift, 0.5
        )
        close(found, wanted, 1e-12)

    x = normal(4, 6, 3, 5, dtype=torch.float64)
    grad = normal(4, 6, 3, 5, dtype=torch.float64, seed=1)
    eps = 1e-5

    def statistics(view: list[int], dims: list[int]) -> tuple[Tensor, Tensor]:
        values = x.view(view)
        variance = values.var(dims, correction=0)
        return values.mean(dims), (variance + eps).rsqrt()

    def batch(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.batch_norm(x, None, None, scale, shift, True, 0.1, eps)

    check(batch, [4, 6, 3, 5], *statistics([4, 6, 3, 5], [0, 2, 3]), [1, 6, 1, 1], [1, 6, 1, 1])

    def group(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return F.group_norm(x, 2, scale, shift, eps)

    view = [4, 2, 3, 3, 5]
    check(group, view, *statistics(view, [2, 3, 4]), [4, 2, 1, 1, 1], [1, 2, 3, 1, 1])

    def layer(x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        shape = (3, 5)
        return F.layer_norm(
            x, shape, scale.view(shape), None if shift is None else shift.view(shape), eps
        )

    check(layer, [4, 6, 3, 5], *statistics([4, 6, 3, 5], [2, 3]), [4, 6, 1, 1], [3, 5])

    if not shift:
        rstd = (x.square().mean(3) + eps).rsqrt()

        def root(x: Tensor, scale: Tensor) -> Tensor:
            return F.rms_norm(x, (5,), scale, eps)

        check(root, [4, 6, 3, 5], None, rstd, [4, 6, 3, 1], [1, 1, 1, 5])


def test_norm_of_flat_rows_and_of_a_single_example() -> None:
    x, grad = normal(7, 5), normal(7, 5, seed=1)
    rstd = torch.full((7, 1), 2.0)
    found = ops.norm_moment(grad, x, None, rstd, [7, 1], [1, 5], True, 1.0)
    scale, shift = grad.double() * x.double() * 2, grad.double()
    close(found, unitwise([scale, shift], 1.0))
    single = ops.norm_moment(grad[0], x[0], None, rstd[0], [1], [5], True, 1.0)
    close(single, unitwise([scale[:1], shift[:1]], 1.0))


WINDOW = [3, 3], [1, 1], [1, 1], [1, 1], 2, False, [0, 0]
CALLS: dict[str, tuple[Any, ...]] = {
    "second_moment": (normal(2, 5, 3), True, 2, 0.5),
    "diagonal_moment": (normal(2, 5, 3).bfloat16(), True, 0.5),
    "patch_moment": (normal(2, 4, 6, 5), *WINDOW, False, 2, 0.5),
    "patch_diagonal_moment": (normal(2, 4, 6, 5), *WINDOW, True, 0.5),
    "token_counts": (torch.tensor([1, 0, 1]), 4, 0, 1.0),
    "norm_moment": (
        normal(2, 3, 4), normal(2, 3, 4, seed=1), None, torch.ones(2, 3, 1), [2, 3, 1], [1, 1, 4],
        True, 0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_registration_and_fake_results(name: str) -> None:
    operator = getattr(ops, name).default
    torch.library.opcheck(operator, CALLS[name])


@pytest.mark.slow
def test_inductor_runs_them_all() -> None:
    def all_of_them(rows: Tensor, x: Tensor, indices: Tensor) -> list[Tensor]:
        doubled = x * 2
        return [
            ops.second_moment(rows + 1, True, 2, 0.5) * 3,
            ops.diagonal_moment(rows, True, 0.5) + 1,
            ops.patch_moment(doubled, *WINDOW, False, 2, 0.5).sum(),
            ops.patch_diagonal_moment(doubled, *WINDOW, True, 0.5) + 1,
            ops.token_counts(indices, 4, 0, 1.0) + 1,
            ops.norm_moment(doubled, x, None, x[:, :, 0, :1], [2, 4, 1, 1], [1, 4, 1, 1], True, 1),
        ]

    given = normal(2, 5, 3), normal(2, 4, 6, 5), torch.tensor([1, 0, 1])
    compiled = torch.compile(all_of_them, fullgraph=True)
    # Inductor's cache on disk does not tell vector instructions apart by itself.
    with torch.compiler.config.patch(cache_key_tag=torch.backends.cpu.get_cpu_capability()):
        results = compiled(*given)
    for found, wanted in zip(results, all_of_them(*given), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_bad_input_is_refused() -> None:
    rows, x = normal(1, 4, 5), normal(2, 3, 6, 6)
    window = [3, 3], [1], [1], [1]
    for run, message in (
        (lambda: ops.second_moment(rows, True, 4, 1.0), "6 columns cannot be cut into pieces=4"),
        (lambda: ops.second_moment(rows, False, 0, 1.0), "pieces=0"),
        (lambda: ops.second_moment(rows[0], False, 1, 1.0), r"not \(4, 5\)"),
        (lambda: ops.diagonal_moment(rows[0], False, 1.0), r"not \(4, 5\)"),
        (lambda: ops.second_moment(rows.to(torch.int64), False, 1, 1.0), "not of torch.int64"),
        (
            lambda: ops.patch_moment(x, *window, 2, False, [0], False, 1, 1.0),
            "does not fit a convolution with a kernel of shape .3, 3. in 2 groups",
        ),
        (
            lambda: ops.patch_moment(x[0], *window, 1, False, [0], False, 1, 1.0),
            "does not fit a convolution",
        ),
        (
            lambda: ops.patch_moment(x, [3, 3], [1] * 3, [1], [1], 1, False, [0], False, 1, 1.0),
            "does not fit a kernel of shape",
        ),
        (lambda: ops.token_counts(rows, 4, -1, 1.0), "not by torch.float32"),
    ):
        with pytest.raises(ArgumentError, match=message):
            run()
