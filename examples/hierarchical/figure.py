"""The figure: what was measured, what is expected, and how sure that is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphopt.examples.common import panels
from graphopt.examples.hierarchical.data import Field
from graphopt.hierarchical.processes.gaussian_process import Prediction


def draw(path: Path, field: Field, found: Prediction) -> None:
    """Draw four panels; colours of the first three have one scale."""
    side = round(len(field.truth) ** 0.5)

    def image(values: Tensor) -> NDArray[np.float64]:
        found: NDArray[np.float64] = values.reshape(side, side).T.numpy()
        return found

    limit = float(field.truth.abs().max())
    of_field = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    extent = {"origin": "lower", "extent": (0, 1, 0, 1)}
    with panels(path, 1, 4, width=12.0, height=3.2) as axes:
        measured, mean, truth, deviation = axes[0]
        measured.scatter(*field.points.T.numpy(), c=field.values.numpy(), s=2, **of_field)
        measured.set(title=f"{len(field.values)} measurements", xlim=(0, 1), ylim=(0, 1))
        mean.imshow(image(found.mean), **of_field, **extent)
        mean.set_title("expected field")
        shown = truth.imshow(image(field.truth), **of_field, **extent)
        truth.set_title("true field")
        mean.figure.colorbar(shown, ax=truth, shrink=0.8)
        spread = deviation.imshow(image(found.variance.sqrt()), cmap="viridis", vmin=0, **extent)
        deviation.set_title("standard deviation")
        deviation.figure.colorbar(spread, ax=deviation, shrink=0.8)
        for own in axes[0]:
            own.set_aspect("equal")
            own.set(xticks=(0, 1), yticks=(0, 1))
