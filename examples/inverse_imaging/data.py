"""Crops of the pictures in scikit-image's wheel, and random operators."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.examples.common import WorkloadError, check_count, check_tensor
from graphopt.examples.inverse_imaging.operators import observe

SIZE = 32
NOISE = 0.02
# Pictures, not crops, are split. All of these files lie in the wheel; none is downloaded.
TRAIN = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coins.png",
    "ihc.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
)
HELD_OUT = ("coffee.png", "rocket.jpg")
TEST = ("camera.png", "clock_motion.png", "hubble_deep_field.jpg", "moon.png", "text.png")


class Operator(NamedTuple):
    """A: a blur and the pixels that are kept.

    Attributes:
        transfer: Fourier transform of the kernel, complex (32, 17).
        mask: (32, 32), of 0 and 1.
    """

    transfer: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> Operator:
        """The same elsewhere."""
        return Operator(self.transfer.to(device), self.mask.to(device))


def draw_operator(generator: torch.Generator, kept: float = 0.7) -> Operator:
    """A coded blur (8 of 7 x 7 cells are open) of which a share ``kept`` of the pixels is seen."""
    if not 0 < kept <= 1:
        raise WorkloadError(f"a share of {kept} of the pixels is kept", "give one above 0, up to 1")
    kernel, mask = torch.zeros(49), torch.zeros(SIZE * SIZE)
    kernel[torch.randperm(49, generator=generator)[:8]] = 1 / 8
    mask[torch.randperm(len(mask), generator=generator)[: int(kept * len(mask))]] = 1.0
    return Operator(torch.fft.rfft2(kernel.view(7, 7), s=(SIZE, SIZE)), mask.view(SIZE, SIZE))


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

    if not files:
        raise WorkloadError("no files of pictures are given", "give names as in TEST")
    if per_picture is not None:
        check_count("crops per picture", per_picture)
    crops = []
    for name in files:
        path = Path(skimage.__file__).parent / "data" / name
        if not path.exists():
            raise WorkloadError(f"{path} does not exist", "install scikit-image from its wheel")
        picture = np.asarray(imread(path), dtype=np.float32) / 255
        grey = torch.from_numpy(rgb2gray(picture[..., :3]) if picture.ndim == 3 else picture)
        found = cut(F.avg_pool2d(grey[None], 2)[0], name)
        count = min(per_picture or len(found), len(found))
        crops.append(found[torch.linspace(0, len(found) - 1, count).round().long()])
    return check_tensor("crops", torch.cat(crops), (None, 1, SIZE, SIZE))


def cut(picture: Tensor, name: str) -> Tensor:
    """Crops (crops, 1, 32, 32) of a grey picture (height, width) whose deviation is over 0.04."""
    check_tensor(name, picture, (None, None))
    if min(picture.shape) < SIZE:
        raise WorkloadError(
            f"{name} has {picture.shape[0]} x {picture.shape[1]} pixels, and crops have {SIZE}",
            "give a larger picture",
        )
    tiles = picture.unfold(0, SIZE, SIZE).unfold(1, SIZE, SIZE).reshape(-1, 1, SIZE, SIZE)
    found = tiles[tiles.std((1, 2, 3)) > 0.04]
    return check_tensor(f"crops of {name} with contrast", found, (None, 1, SIZE, SIZE))
