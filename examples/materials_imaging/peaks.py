"""Atoms in a picture, and whether they are where they should be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from graphopt.examples.materials_imaging.data import SIZE

LEAST = 0.15  # radians; the weakest atoms have 0.4
MARGIN = 1.0  # pixels: an atom on the rim has no peak in the picture


@dataclass(frozen=True)
class Found:
    """Atoms and peaks of some pictures.

    Attributes:
        atoms: how many there are, further than a pixel from the rim.
        peaks: how many were found in the same area.
        matched: pairs of an atom and a peak, each used once, within a pixel.
    """

    atoms: int
    peaks: int
    matched: int

    @property
    def recall(self) -> float:
        """Share of the atoms that have a peak."""
        return self.matched / max(self.atoms, 1)

    @property
    def precision(self) -> float:
        """Share of the peaks that are atoms."""
        return self.matched / max(self.peaks, 1)


def find_peaks(picture: NDArray[np.float32]) -> NDArray[np.float64]:
    """Local maxima above `LEAST`, [n, 2], to a fraction of a pixel by a parabola in each direction.

    Args:
        picture: [32, 32], radians.
    """
    top = (picture == maximum_filter(picture, 3, mode="constant", cval=-np.inf)) & (picture > LEAST)
    places = np.argwhere(top).astype(float)
    for place in places:
        row, column = int(place[0]), int(place[1])
        for axis, line in ((0, picture[:, column]), (1, picture[row])):
            middle = (row, column)[axis]
            if 0 < middle < SIZE - 1:
                below, here, above = (float(v) for v in line[middle - 1 : middle + 2])
                bend = below - 2 * here + above
                if bend < 0:
                    place[axis] += 0.5 * (below - above) / bend
    return places


def match(pictures: Tensor, atoms: Tensor, reach: float = 1.0) -> Found:
    """Hold the peaks of pictures against atoms.

    Args:
        pictures: [n, 1, 32, 32], radians.
        atoms: [n, m, 2], pixels; those outside of the picture do not count.
        reach: largest distance of a pair, pixels.
    """
    counts = np.zeros(3, int)
    for picture, places in zip(pictures[:, 0].cpu().numpy(), atoms.cpu().numpy(), strict=True):
        peaks, true = find_peaks(picture), places[_inside(places, 0)]
        distance = np.linalg.norm(true[:, None] - peaks[None], axis=2)
        # Pairs out of reach cost more than any number of others.
        pairs = linear_sum_assignment(np.where(distance <= reach, distance, 1e3))
        near = distance[pairs] <= reach
        kept = _inside(true, MARGIN)
        counts += (kept.sum(), _inside(peaks, MARGIN).sum(), (near & kept[pairs[0]]).sum())
    return Found(*(int(c) for c in counts))


def _inside(places: NDArray[np.floating], margin: float) -> NDArray[np.bool_]:
    inside = (places >= margin) & (places <= SIZE - 1 - margin)
    return np.logical_and(inside[:, 0], inside[:, 1])
