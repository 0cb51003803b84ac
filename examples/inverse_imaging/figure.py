"""The figure: crops down, methods across, for the trained and for a new operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from graphopt.examples.common import panels
from graphopt.examples.inverse_imaging.classical import psnr


def draw(
    path: Path,
    truth: Tensor,
    seen: Sequence[Tensor],
    found: Mapping[str, Sequence[Tensor]],
) -> None:
    """Write the figure.

    Args:
        path: of the file.
        truth: crops (crops, 1, height, width); the middle and the last are shown.
        seen: their observations by the trained and by a new operator.
        found: reconstructions by method, for both operators.
    """
    places = (len(truth) // 2, len(truth) - 1)
    titles = ["truth", "observed", *found]
    with panels(path, 4, len(titles), width=11.0, height=1.75) as axes:
        for row in axes:
            for axis in row:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
        for operator, label in enumerate(("trained A", "new A")):
            for crop, place in enumerate(places):
                row = axes[2 * operator + crop]
                row[0].set_ylabel(label)
                pictures = [truth, seen[operator], *(p[operator] for p in found.values())]
                for axis, picture in zip(row, pictures, strict=True):
                    shown = picture[place, 0].clamp(0, 1).cpu().numpy()
                    axis.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                for axis, picture in zip(row[2:], pictures[2:], strict=True):
                    value = float(psnr(picture[place : place + 1], truth[place : place + 1]))
                    axis.set_xlabel(f"{value:.1f} dB", fontsize=9)
        for axis, title in zip(axes[0], titles, strict=True):
            axis.set_title(title, fontsize=9)
