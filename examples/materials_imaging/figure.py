"""The figure: patterns, truth and reconstruction of three specimens."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from graphopt.examples.common import COLOURS, panels
from graphopt.examples.materials_imaging.data import Specimens
from graphopt.examples.materials_imaging.peaks import find_peaks


def draw(path: Path, test: Specimens, predicted: Tensor) -> None:
    """Write the figure.

    Args:
        path: an SVG.
        test: specimens, patterns centred.
        predicted: their potentials, [n, 1, 32, 32], radians.
    """
    with panels(path, 3, 4, height=2.3) as axes:
        for row, specimen in zip(axes, range(3), strict=True):
            truth = test.potential[specimen, 0].cpu().numpy()
            found = predicted[specimen, 0].numpy()
            scale = {"vmin": 0.0, "vmax": 1.0, "cmap": "viridis"}
            row[0].imshow(test.patterns[specimen, 5].cpu().numpy(), cmap="magma")
            row[1].imshow(truth, **scale)
            picture = row[2].imshow(found, **scale)
            places = test.atoms[specimen].cpu().numpy()
            peaks = find_peaks(found)
            row[3].plot(places[:, 1], places[:, 0], "o", color=COLOURS[0], fillstyle="none")
            row[3].plot(peaks[:, 1], peaks[:, 0], ".", color=COLOURS[4])
            row[3].set_xlim(-0.5, truth.shape[1] - 0.5)
            row[3].set_ylim(truth.shape[0] - 0.5, -0.5)
            row[3].set_aspect("equal")
            row[0].set_ylabel("row (pixels)")
            axis_bar = row[2].figure.colorbar(picture, ax=row[2])
            axis_bar.set_label("radians")
        titles = ("one of 16 patterns", "true potential", "reconstruction", "atoms (o), peaks (.)")
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title)
        for axis in axes[-1]:
            axis.set_xlabel("column (pixels)")
