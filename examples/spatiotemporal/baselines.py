"""What the field is compared with: models of scikit-learn, given the same seasons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from graphopt.examples.spatiotemporal.data import WEEKS, Samples
from graphopt.examples.spatiotemporal.scores import LEVEL, Prediction

Array = NDArray[np.float64]
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
NORMAL = 1.959963985


def features(samples: Samples) -> Array:
    """Week and place within [0, 1], and cos and sin of the year and of four weeks, (n, 7)."""
    inputs = samples.inputs.double().numpy()
    week = inputs[:, :1]
    seasons = [f(2 * np.pi * week / period) for period in (52.0, 4.0) for f in (np.cos, np.sin)]
    return np.concatenate((week / WEEKS, inputs[:, 1:], *seasons), 1)


def boosting(training: Samples, test: Samples) -> Prediction:
    """Gradient boosting: one model of the mean, and one for each end of the interval."""
    from sklearn.ensemble import HistGradientBoostingRegressor as Boosting

    x, y, at = features(training), training.values.numpy(), features(test)
    mean = Boosting(random_state=0).fit(x, y).predict(at)
    lower, upper = (
        Boosting(loss="quantile", quantile=p, random_state=0).fit(x, y).predict(at) for p in TAILS
    )
    return _prediction(mean, lower, upper)


def forest(training: Samples, test: Samples) -> Prediction:
    """A random forest; the interval is that of the trees' predictions."""
    from sklearn.ensemble import RandomForestRegressor

    at = features(test)
    fitted = RandomForestRegressor(200, min_samples_leaf=3, random_state=0)
    fitted.fit(features(training), training.values.numpy())
    trees = np.stack([tree.predict(at) for tree in fitted.estimators_])
    lower, upper = np.quantile(trees, TAILS, axis=0)
    return _prediction(trees.mean(0), lower, upper)


def surface(training: Samples, test: Samples) -> Prediction:
    """Ridge regression on all cubic polynomials of place, time and seasons."""
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    fitted = make_pipeline(PolynomialFeatures(3), StandardScaler(), RidgeCV(np.logspace(-2, 4, 13)))
    x, y = features(training), training.values.numpy()
    mean = fitted.fit(x, y).predict(features(test))
    reach = NORMAL * float(np.std(y - fitted.predict(x)))
    return _prediction(mean, mean - reach, mean + reach)


def gaussian_process(training: Samples, test: Samples) -> Prediction:
    """A Gaussian process on place, time and seasons; its kernel is fitted to 500 samples."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    x, y = features(training), training.values.double().numpy()
    start = ConstantKernel(1.0) * RBF(np.ones(x.shape[1])) + WhiteKernel(0.1)
    few = np.random.default_rng(0).permutation(len(x))[:500]
    kernel = GaussianProcessRegressor(start, normalize_y=True).fit(x[few], y[few]).kernel_
    fitted = GaussianProcessRegressor(kernel, optimizer=None, normalize_y=True).fit(x, y)
    mean, sd = fitted.predict(features(test), return_std=True)
    return _prediction(mean, mean - NORMAL * sd, mean + NORMAL * sd)


BASELINES: dict[str, Callable[[Samples, Samples], Prediction]] = {
    "gradient boosting": boosting,
    "random forest": forest,
    "trend surface": surface,
    "Gaussian process": gaussian_process,
}


def _prediction(mean: Any, lower: Any, upper: Any) -> Prediction:
    return Prediction(*(torch.from_numpy(np.asarray(part)) for part in (mean, lower, upper)))
