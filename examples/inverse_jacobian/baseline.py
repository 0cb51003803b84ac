"""The best linear reconstruction: ridge regression of images on measurements."""

from __future__ import annotations

from torch import Tensor, from_numpy

from graphopt.examples.inverse_jacobian.data import Pairs, Problem
from graphopt.examples.inverse_jacobian.model import squared_error

STRENGTHS = tuple(10.0**k for k in range(-3, 4))


def best_ridge(problem: Problem) -> float:
    """Squared error on test images, with the strength that is best on validation images."""
    from sklearn.linear_model import Ridge

    def error(fitted: Ridge, pairs: Pairs) -> float:
        found: Tensor = from_numpy(fitted.predict(pairs.measured.numpy()))
        return float(squared_error(found, pairs.images))

    tried = []
    for strength in STRENGTHS:
        fitted = Ridge(strength).fit(
            problem.training.measured.numpy(), problem.training.images.numpy()
        )
        tried.append((error(fitted, problem.validation), error(fitted, problem.test)))
    return min(tried)[1]
