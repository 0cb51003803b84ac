"""The formats that a float32 tensor can be lowered to; another one is another row."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A format of 16 or 8 bits.

    Attributes:
        name: in the spec language.
        dtype: of its tensors; of its elements, where they have scales.
        bound: largest error that a whole step in this format may have, relative to the largest
            magnitude of each compared tensor.
    """

    name: str
    dtype: torch.dtype
    bound: float

    @property
    def unit(self) -> float:
        """Largest relative error of a rounding; of integers, relative to the largest one."""
        if not self.dtype.is_floating_point:
            return 2.0 ** (1 - 8 * self.dtype.itemsize)
        return torch.finfo(self.dtype).eps / 2

    @property
    def wide(self) -> bool:
        """Whether it has about the range of float32, so that sums do not overflow."""
        return self.dtype.is_floating_point and torch.finfo(self.dtype).max > 1e30

    @property
    def loses_gradients(self) -> bool:
        """Whether small gradients vanish: it has neither float32's range nor scales of its own."""
        return self.dtype is torch.float16


# A step rounds tens to hundreds of times in a row, and the sum of its errors grows with the square
# root: 32 unit roundoffs, so 0.125 for bfloat16 and 0.016 for float16.
_ROUNDINGS = 32

# Operands of 8 bits are rounded once per product, by at most an eighth of what shares their scale,
# and a sum of many averages that. Where gradients cancel or a ReLU changes sides there is no bound:
# verification adds what the rounding alone does to a model.
FORMATS = {
    format.name: format
    for format in (
        *(
            Format(name, dtype, _ROUNDINGS * torch.finfo(dtype).eps / 2)
            for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16))
        ),
        Format("flex16", torch.int16, _ROUNDINGS * 2.0**-15),
        Format("mxfp8", torch.float8_e4m3fn, 0.25),
        Format("float8", torch.float8_e4m3fn, 0.25),
    )
}
"""By name."""
