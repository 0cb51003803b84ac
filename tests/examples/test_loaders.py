"""Every loader names what is wrong with its data or its options, in one sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from graphopt.examples.climate_segmentation import data as climate
from graphopt.examples.common import WorkloadError
from graphopt.examples.data_assimilation import data as assimilation
from graphopt.examples.inverse_imaging import data as imaging
from graphopt.examples.inverse_jacobian import data as jacobian
from graphopt.examples.inverse_tikhonov import data as tikhonov
from graphopt.examples.materials_imaging import data as materials
from graphopt.examples.neural_populations import data as populations
from graphopt.examples.noise_scale import data as digits
from graphopt.examples.spatiotemporal import data as spatiotemporal
from graphopt.examples.unknown_operator import data as operator


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _fields(values: torch.Tensor, labels: torch.Tensor) -> climate.Fields:
    return climate.Fields(values, labels)


GRID = (climate.HEIGHT, climate.WIDTH)
VALUES, LABELS = torch.zeros(2, 8, *GRID), torch.zeros(2, *GRID, dtype=torch.long)

CASES: dict[str, tuple[Callable[[], object], str]] = {
    "float labels": (lambda: _fields(VALUES, LABELS.float()), "labels is of float32"),
    "an eighth class": (lambda: _fields(VALUES, LABELS + 7), "labels go from 7 to 7"),
    "float64 fields": (lambda: _fields(VALUES.double(), LABELS), "fields is of float64"),
    "NumPy fields": (
        lambda: _fields(VALUES.numpy(), LABELS),  # type: ignore[arg-type]
        "fields is of type ndarray",
    ),
    "no fields": (lambda: climate.make_fields(0, _generator()), "0 fields"),
    "fewer than no fields": (lambda: climate.make_fields(-1, _generator()), "-1 fields"),
    "no crystals": (lambda: materials.make_specimens(0, _generator()), "0 crystals"),
    "a potential that is NaN": (
        lambda: materials.record(torch.full((1, 32, 32), torch.nan), _generator()),
        "potential holds 1024 values that are NaN",
    ),
    "a flat potential": (
        lambda: materials.record(torch.zeros(1, 32), _generator()),
        r"potential has shape \[1, 32\]",
    ),
    "an infinite defocus": (
        lambda: materials.record(torch.zeros(1, 32, 32), _generator(), torch.inf),
        "a defocus of inf",
    ),
    "no pairs": (lambda: operator.draw("pairs", 0, _generator()), "0 pairs"),
    "integer images": (
        lambda: jacobian.check_images(torch.zeros(2, 64, dtype=torch.long)),
        "images is of int64",
    ),
    "too few images to test on": (
        lambda: jacobian.make_problem(torch.zeros(100, 64), 10, _generator()),
        "100 images leave none to test on",
    ),
    "more images than a quarter": (
        lambda: jacobian.make_problem(torch.zeros(1797, 64), 1000, _generator()),
        r"1000 training images of 1797(.|\n)*between 1 and 449",
    ),
    "no words": (lambda: populations.population(5, 0, _generator()), "0 words"),
    "a raster of truth values": (
        lambda: populations.check_raster("words", torch.ones(5, 4, dtype=torch.bool)),
        "words is of bool",
    ),
    "a small picture": (
        lambda: imaging.cut(torch.rand(10, 10), "stamp.png"),
        "stamp.png has 10 x 10 pixels",
    ),
    "a picture of bytes": (
        lambda: imaging.cut(torch.ones(64, 64, dtype=torch.uint8), "stamp.png"),
        "stamp.png is of uint8",
    ),
    "no pictures": (lambda: imaging.load_pictures(()), "no files of pictures"),
    "no crops": (lambda: imaging.load_pictures(imaging.TEST, 0), "0 crops per picture"),
    "all pixels twice": (lambda: imaging.draw_operator(_generator(), 2.0), "a share of 2.0"),
    "no pixels at all": (lambda: imaging.draw_operator(_generator(), torch.nan), "a share of nan"),
    "no times": (
        lambda: assimilation.trajectories(assimilation.PENDULUM, 3, 0, _generator()),
        "0 times",
    ),
    "no trajectories": (
        lambda: assimilation.trajectories(assimilation.PENDULUM, 0, 3, _generator()),
        "0 trajectories",
    ),
    "a digit above nine": (
        lambda: digits.checked(torch.zeros(2, 64), torch.tensor([0, 11])),
        "labels go from 0 to 11, expected 0 to 9",
    ),
    "integer inputs": (
        lambda: spatiotemporal.Samples(torch.zeros(2, 3).long(), torch.zeros(2)).check("test"),
        "test inputs is of int64",
    ),
    "integer parameters": (
        lambda: tikhonov.load_pairs(torch.ones(2, 3).long(), torch.ones(2, 3)),
        "parameters is of int64",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_named(case: str) -> None:
    load, says = CASES[case]
    with pytest.raises(WorkloadError, match=says) as raised:
        load()
    assert "\n  try: " in str(raised.value)
