"""`HMatrix`: blocks over two cluster trees that stand for a matrix, and a bound of the error."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.blocks import Block, Dense, dense, placed, transposed
from graphopt.hierarchical.bounded import Bounded
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.packed import Packed, pack


class HMatrix:
    """A matrix in blocks. HODLR, BLR, and H with weak or strong admissibility are all this type.

    Args:
        root: its blocks, in the order of positions of both trees; None to make them from `packed`
            when they are first read.
        rows: clusters of rows.
        columns: clusters of columns.
        bound: an upper bound of the Frobenius norm of the difference to the matrix that it stands
            for, rounding included.
        packed: the same blocks in groups; None to copy them from `root` for the first product.
        confidence: the probability with which `bound` holds; 1 unless it was estimated.
    """

    def __init__(
        self,
        root: Block | None,
        rows: ClusterTree,
        columns: ClusterTree,
        bound: float,
        packed: Packed | None = None,
        confidence: float = 1.0,
    ) -> None:
        if root is None and packed is None:
            raise ArgumentError("a matrix without blocks", hint="pass root or packed")
        self._root = root
        self._packed = packed
        self.rows = rows
        self.columns = columns
        self.bound = bound
        self.confidence = confidence

    @property
    def root(self) -> Block:
        """The blocks as a tree."""
        if self._root is None:
            self._root = self.packed.root()
        return self._root

    @property
    def packed(self) -> Packed:
        """The blocks in groups."""
        if self._packed is None:
            assert self._root is not None
            self._packed = pack(self._root, self.rows, self.columns)
        return self._packed

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return len(self.rows), len(self.columns)

    @property
    def dtype(self) -> torch.dtype:
        """Of all entries."""
        if self._packed is not None:
            return self._packed.dtype
        block = next(placed(self.root)).block
        return block.values.dtype if isinstance(block, Dense) else block.left.dtype

    @property
    def device(self) -> torch.device:
        """Of all entries."""
        if self._packed is not None:
            return self._packed.device
        block = next(placed(self.root)).block
        return block.values.device if isinstance(block, Dense) else block.left.device

    def to(self, device: torch.device | str) -> HMatrix:
        """On a device, where products are then computed; a kernel's derivatives stay on the CPU."""
        packed = self.packed.to(torch.device(device))
        return HMatrix(None, self.rows, self.columns, self.bound, packed, self.confidence)

    @property
    def nbytes(self) -> int:
        """Of all blocks; memory that several of them share counts once."""
        sizes: dict[int, int] = {}
        if self._packed is not None:
            memory = [t.untyped_storage() for g in self._packed.groups for t in g.tensors]
            sizes.update((m.data_ptr(), m.nbytes()) for m in memory)
        if self._root is not None:
            for place in placed(self._root):
                for tensor in vars(place.block).values():
                    if tensor is not None:
                        own = tensor.untyped_storage()
                        sizes[own.data_ptr()] = own.nbytes()
        return sum(sizes.values())

    @property
    def T(self) -> HMatrix:
        """The transpose, in the same memory."""
        root = None if self._root is None else transposed(self._root)
        packed = None if self._packed is None else self._packed.transposed()
        return HMatrix(root, self.columns, self.rows, self.bound, packed, self.confidence)

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with [n] or [n, q], in the original order of rows and columns.

        Differentiable by `x` and by the parameters of the kernel that the matrix was built from.
        """
        columns = self._columns(x)
        found = self._product(self.columns.to_positions(columns), None)
        return self.rows.to_original(found).reshape(self.shape[0], *x.shape[1:])

    def apply(self, x: Tensor) -> Bounded[Tensor]:
        """``self @ x``, and a bound for each column of its distance to the exact product.

        The exact product is that of the matrix that this one stands for with `x`.

        Raises:
            ArgumentError: an operand of another shape, dtype or device, or not finite.
        """
        product = self @ x
        sizes = torch.linalg.vector_norm(x.detach().double(), dim=0)
        size = float(sizes.max()) if sizes.numel() else 0.0
        if not math.isfinite(size):
            raise ArgumentError("the operand is not finite", hint="mend it first")
        bound = (self.bound + self.packed.rounding) * size * (1 + 1e-12)
        return Bounded(product, bound)

    def apply_level(self, number: int, x: Tensor) -> Tensor:
        """The product of [n, q] with the blocks whose lowest common ancestor has this level.

        That is of the clusters of rows and columns, in one tree. Levels above that of the leaves
        have the off-diagonal blocks, the level of the leaves those on the diagonal. Rows of `x`
        and of the result are in the order of *positions*. Differentiable as ``@`` is.
        """
        found = self._product(self._columns(x), number)
        return found.reshape(self.shape[0], *x.shape[1:])

    def level_norms(self, number: int) -> Tensor:
        """[2**number] squared Frobenius norms of these blocks, for each cluster of the level."""
        return self.packed.level_norms(number)

    def inner_gradient(self, w: Tensor, v: Tensor, number: int | None = None) -> list[Tensor]:
        """Derivatives of ``sum(w * apply_level(number, v))`` by the parameters of the kernel.

        All blocks take part without a number. Rows of both [n, k] are in the order of positions.
        """
        return self.packed.inner_gradient(w, v, number)

    def dense(self) -> Tensor:
        """[m, n] in the original order and in float64; for small matrices and tests."""
        inner = dense(self.root, torch.float64)
        return self.columns.to_original(self.rows.to_original(inner).T).T

    def _columns(self, x: Tensor) -> Tensor:
        """[n, q] of the right dtype."""
        if x.dim() not in (1, 2) or x.shape[0] != len(self.columns):
            raise ArgumentError(
                f"a matrix of {self.shape[0]} x {self.shape[1]} times {tuple(x.shape)}",
                hint=f"pass a tensor of [{self.shape[1]}] or [{self.shape[1]}, q]",
            )
        if x.dtype != self.dtype:
            raise ArgumentError(
                f"a matrix of {self.dtype} times {x.dtype}",
                hint=f"convert it by x.to({self.dtype})",
            )
        if x.device != self.device:
            raise ArgumentError(
                f"a matrix on {self.device} times a tensor on {x.device}",
                hint="move one of them by to(device)",
            )
        return x.unsqueeze(1) if x.dim() == 1 else x

    def _product(self, x: Tensor, level: int | None) -> Tensor:
        packed = self.packed
        if packed.trainable:
            return packed.product(x, level)
        if torch.is_grad_enabled() and (x.requires_grad or packed.parameters):
            apply: Callable[..., Tensor] = _Product.apply
            return apply(packed, level, x, *packed.parameters)
        return packed.product(x, level)

    @cached_property
    def norm(self) -> float:
        """The Frobenius norm of what is stored."""
        return self.packed.norm


class _Product(torch.autograd.Function):
    """A product that keeps its operand and nothing else for the backward."""

    @staticmethod
    def forward(
        ctx: Any, packed: Packed, level: int | None, x: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.packed, ctx.level = packed, level
        ctx.save_for_backward(x)
        return packed.product(x, level)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        own = None
        if ctx.needs_input_grad[2]:
            own = ctx.packed.transposed().product(gradient, ctx.level)
        hyper: list[Tensor | None] = [None] * len(ctx.packed.parameters)
        if any(ctx.needs_input_grad[3:]):
            hyper = list(ctx.packed.inner_gradient(gradient, x, ctx.level))
        return None, None, own, *hyper
