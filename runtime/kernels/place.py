"""Where an elementwise kernel reads and writes, for tensors of any strides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """Two blocks of memory with the same element at the same place.

    Attributes:
        source: the elements of the tensor, dense, in the order in which they are in `result`.
        result: where the results go, dense.
        returned: what `finish` returns, with the strides of `torch.empty_like`.
    """

    source: Tensor
    result: Tensor
    returned: Tensor

    @classmethod
    def of(cls, tensor: Tensor, dtype: torch.dtype, *, in_order: bool = False) -> Place:
        """Room for results of `dtype`, copying where the tensor has gaps.

        Args:
            tensor: any strides.
            dtype: of the results.
            in_order: whether element i in memory has to be element i in contiguous order.
        """
        tensor = tensor.detach()
        returned = torch.empty_like(tensor, dtype=dtype)
        # `empty_like` keeps strides only if they leave no gaps and nothing overlaps.
        is_dense = tensor.stride() == returned.stride()
        if tensor.is_contiguous() or (is_dense and not in_order):
            return cls(tensor, returned, returned)
        result = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
        return cls(tensor.contiguous(), result, returned)

    def finish(self) -> Tensor:
        """The results with their strides, after the kernel has been started."""
        return self.returned if self.result is self.returned else self.returned.copy_(self.result)
