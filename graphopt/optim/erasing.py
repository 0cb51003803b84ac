"""Random erasing with zero fill.

Zhong et al., arXiv 1708.04896, in the variant of SP-NGD's code: zeros, and an aspect ratio that is
drawn uniformly from [aspect, 1] and inverted half of the time.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from graphopt.errors import ArgumentError


def random_erasing(
    images: Tensor,
    *,
    rate: float = 0.5,
    area: tuple[float, float] = (0.02, 0.25),
    aspect: float = 0.3,
    generator: Generator | None = None,
) -> Tensor:
    """Set a random rectangle of some images to 0, in all channels.

    Sides are rounded to whole pixels and clipped to the image, which can happen to long rectangles;
    at least one pixel is erased. All positions inside the image are equally likely. With running
    mixup, SP-NGD erases the mixed images.

    Args:
        images: [n, channels, height, width]; normalise before, so that 0 is the mean.
        rate: probability that an image is erased, 0 to 1.
        area: least and largest erased area, as parts of the image's, within [0, 1].
        aspect: least ratio of the shorter to the longer side, above 0 and at most 1.
        generator: a CPU generator; without it, PyTorch's global one.

    Returns:
        A new tensor like `images`.

    Raises:
        ArgumentError: `images` is not a batch of images or is empty, or a number is out of range.
    """
    least, most = area
    if not (0 <= rate <= 1 and 0 <= least <= most <= 1 and 0 < aspect <= 1):
        raise ArgumentError(
            f"rate={rate}, area={area}, aspect={aspect} are out of range",
            hint="use rate=0.5, area=(0.02, 0.25), aspect=0.3",
        )
    if images.dim() != 4 or images.numel() == 0:
        raise ArgumentError(
            f"images of shape {tuple(images.shape)} are no batch [n, channels, height, width]",
            hint="pass a batch of at least one image",
        )
    count, _, height, width = images.shape
    # One draw on the CPU for the whole batch: the same whatever the images' device.
    draw = torch.rand((6, count), dtype=torch.float64, generator=generator)
    chosen = draw[0] < rate
    pixels = (least + (most - least) * draw[1]) * (height * width)
    ratio = aspect + (1.0 - aspect) * draw[2]
    ratio = torch.where(draw[3] < 0.5, ratio, 1.0 / ratio)
    rows = _inside(images, draw[4], (pixels * ratio).sqrt(), height, chosen)
    columns = _inside(images, draw[5], (pixels / ratio).sqrt(), width, chosen)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


def _inside(images: Tensor, draw: Tensor, side: Tensor, size: int, chosen: Tensor) -> Tensor:
    """Which of `size` lines the rectangle of each image covers: bool [n, size]."""
    side = side.round().clamp(1, size)
    first = (draw * (size - side + 1)).floor()
    lines = torch.arange(size)
    inside = (lines >= first[:, None]) & (lines < (first + side)[:, None]) & chosen[:, None]
    return inside.to(images.device)
