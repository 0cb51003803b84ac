"""The formats that a float32 tensor can be lowered to; another one is another row."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A floating-point format.

    Attributes:
        name: in the spec language.
        dtype: of its tensors.
        bound: largest error that a whole step in this format may have, relative to the largest
            magnitude of each compared tensor.
    """

    name: str
    dtype: torch.dtype
    bound: float

    @property
    def unit(self) -> float:
        """Unit roundoff: half of the distance from 1 to the next number."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def wide(self) -> bool:
        """Whether it has about the range of float32, so that sums do not overflow."""
        return torch.finfo(self.dtype).max > 1e30


# A step rounds tens to hundreds of times in a row, and the sum of its errors grows with the square
# root: 32 unit roundoffs, so 0.125 for bfloat16 and 0.016 for float16.
_ROUNDINGS = 32

FORMATS = {
    name: Format(name, dtype, _ROUNDINGS * torch.finfo(dtype).eps / 2)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
}
"""By name."""
