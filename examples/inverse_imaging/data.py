"""Crops of the pictures in scikit-image's wheel, and random operators."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphopt.examples.common import WorkloadError, check_tensor
from graphopt.examples.inverse_imaging.operators import observe

SIZE = 32
NOISE = 0.02
# Pictures, not crops, are split. All of these files lie in the wheel; none is downloaded.
TRAIN = ("astronaut.png", "brick.png", "chelsea.png", "coins.png", "motorcycle_left.png")
TRAIN += ("rocket.jpg", "page.png", "retina.jpg", "ihc.png")
HELD_OUT = ("coffee.png",)
TEST = ("camera.png", "clock_motion.png", "hubble_deep_field.jpg", "moon.png", "text.png")


class Operator(NamedTuple):
    """A: a blur and the pixels that are kept.

    Attributes:
        kernel: (7, 7), sums to 1.
        mask: (32, 32), of 0 and 1.
    """

    kernel: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Operator:
        """The same elsewhere."""
        return Operator(self.kernel.to(device), self.mask.to(device))


def draw_operator(generator: torch.Generator, kept: float = 0.7) -> Operator:
    """A coded blur (each of 7 x 7 cells open or shut) and a share ``kept`` of the pixels."""
    kernel = (torch.rand(7, 7, generator=generator) < 0.2).float()
    kernel[3, 3] = 1.0
    mask = torch.zeros(SIZE * SIZE)
    mask[torch.randperm(SIZE * SIZE, generator=generator)[: int(kept * SIZE * SIZE)]] = 1.0
    return Operator(kernel / kernel.sum(), mask.view(SIZE, SIZE))


def measure(x: Tensor, operator: Operator, generator: torch.Generator) -> Tensor:
    """Observations of pictures (batch, 1, 32, 32) with white noise on the pixels that are kept."""
    noise = NOISE * torch.randn(x.shape, generator=generator).to(x.device)
    return observe(x, *operator) + operator.mask * noise


def load_pictures(files: tuple[str, ...], per_picture: int | None = None) -> Tensor:
    """Grey crops (crops, 1, 32, 32) in [0, 1] of pictures at half resolution.

    Crops do not overlap; those without contrast are left out.

    Args:
        files: names in scikit-image's data folder.
        per_picture: keep that many of each, evenly spaced; None keeps all.
    """
    import skimage
    from skimage.color import rgb2gray
    from skimage.io import imread
    from skimage.transform import downscale_local_mean
    from skimage.util import img_as_float

    crops = []
    for name in files:
        path = Path(skimage.__file__).parent / "data" / name
        if not path.exists():
            raise WorkloadError(f"{path} does not exist", "install scikit-image from its wheel")
        picture = img_as_float(imread(path))
        grey = rgb2gray(picture[..., :3]) if picture.ndim == 3 else picture
        found = cut(torch.from_numpy(downscale_local_mean(grey, (2, 2)).astype(np.float32)), name)
        count = min(per_picture or len(found), len(found))
        crops.append(found[torch.linspace(0, len(found) - 1, count).round().long()])
    return check_tensor("crops", torch.cat(crops), (None, 1, SIZE, SIZE))


def cut(picture: Tensor, name: str) -> Tensor:
    """Crops (crops, 1, 32, 32) of a grey picture (height, width) whose deviation is over 0.04."""
    check_tensor(name, picture, (None, None))
    tiles = picture.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).reshape(-1, 1, SIZE, SIZE)
    found = tiles[tiles.std((1, 2, 3)) > 0.04]
    return check_tensor(f"crops of {name} with contrast", found, (None, 1, SIZE, SIZE))
