"""Linear reconstruction: what the patterns tell without a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.examples.materials_imaging.data import Specimens
from graphopt.examples.materials_imaging.model import relative_error

PENALTIES = tuple(10.0**power for power in range(-5, 4))


def ridge(train: Specimens, validation: Specimens, test: Specimens) -> dict[str, float]:
    """Ridge regression from all pixels of all patterns to all pixels of the potential.

    Solved for as many unknowns as there are specimens:
    ``W x = (K + penalty)^-1 X x`` with ``K = X X^T`` of the centred patterns.

    Returns:
        The relative errors ``validation`` and ``test`` for the ``penalty`` that is best in
        validation.
    """
    centre = train.patterns.mean(0)
    x, x_validation, x_test = ((d.patterns - centre).flatten(1) for d in (train, validation, test))
    mean = train.potential.mean(0)
    y = (train.potential - mean).flatten(1)
    values, vectors = torch.linalg.eigh(x @ x.T)
    rotated = vectors.T @ y

    def error(inputs: Tensor, truth: Tensor, penalty: float) -> float:
        weights = vectors @ (rotated / (values + penalty)[:, None])
        predicted = (inputs @ x.T) @ weights
        return relative_error(predicted.view_as(truth) + mean, truth, float(train.potential.mean()))

    return _best(
        lambda penalty: error(x_validation, validation.potential, penalty),
        lambda penalty: error(x_test, test.potential, penalty),
    )


def _best(validation: Callable[[float], float], test: Callable[[float], float]) -> dict[str, float]:
    penalty = min(PENALTIES, key=validation)
    return {"penalty": penalty, "validation": validation(penalty), "test": test(penalty)}
