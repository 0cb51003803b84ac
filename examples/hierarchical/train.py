"""Find scales, variance and noise of a field from measurements, and predict it everywhere."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphopt.examples.common.figure import drawable
from graphopt.examples.hierarchical.data import NOISE, SCALES, VARIANCE, Field, draw_field
from graphopt.examples.hierarchical.figure import draw
from graphopt.hierarchical.kernels import Matern32
from graphopt.hierarchical.processes.gaussian_process import GaussianProcess, Prediction


@dataclass(frozen=True)
class Fitted:
    """What a regression has found.

    Attributes:
        process: with the hyperparameters of the last step.
        likelihoods: of all steps, in nats.
        bounds: of their errors.
    """

    process: GaussianProcess
    likelihoods: list[float]
    bounds: list[float]

    @property
    def hyperparameters(self) -> list[float]:
        """Both scales, variance, noise."""
        kernel, noise = self.process.kernel, float(self.process.noise)
        scales = torch.as_tensor(kernel.scale).tolist()
        return [*scales, float(torch.as_tensor(kernel.variance)), noise]


def fit(field: Field, steps: int, tolerance: float, rate: float = 0.15) -> Fitted:
    """Maximise the likelihood by Adam over logarithms of the hyperparameters."""
    logarithms = torch.tensor([0.2, 0.2, 0.5, 0.1], dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.Adam([logarithms], rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    likelihoods, bounds = [], []
    for number in range(steps):
        process = _process(logarithms, field.points, tolerance)
        found = process.log_likelihood(field.values)
        likelihoods.append(float(found.value.detach()))
        bounds.append(found.bound)
        print(f"step {number + 1:2d}: {likelihoods[-1]:.3f} +- {bounds[-1]:.3f} nats", flush=True)
        optimizer.zero_grad()
        (-found.value / len(field.values)).backward()
        optimizer.step()
        schedule.step()
    return Fitted(_process(logarithms.detach(), field.points, tolerance), likelihoods, bounds)


def _process(logarithms: Tensor, points: Tensor, tolerance: float) -> GaussianProcess:
    values = logarithms.exp()
    return GaussianProcess(Matern32(values[:2], values[2]), values[3], points, tolerance=tolerance)


def quality(field: Field, found: Prediction) -> dict[str, float]:
    """Of a prediction, where the field is known.

    Returns:
        The root mean square error, the share of values within 95 % intervals, and the largest
        bounds of the errors of means and variances.
    """
    error = found.mean - field.truth
    inside = error.abs() <= 1.96 * found.variance.sqrt()
    return {
        "error": math.sqrt(float(error.square().mean())),
        "coverage": float(inside.double().mean()),
        "mean bound": float(found.mean_bound.max()),
        "variance bound": float(found.variance_bound.max()),
    }


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1500, help="measurements")
    parser.add_argument("--steps", type=int, default=25, help="of the optimizer")
    parser.add_argument("--side", type=int, default=36, help="of the grid of predictions")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="nats for each point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("hierarchical"), help="a folder")
    options = parser.parse_args()
    drawable()
    generator = torch.Generator().manual_seed(options.seed)
    field = draw_field(options.points, options.side, generator)
    fitted = fit(field, options.steps, options.tolerance)
    names = ("scale, first coordinate", "scale, second coordinate", "variance", "noise")
    truth = (*SCALES, VARIANCE, NOISE)
    for name, value, wanted in zip(names, fitted.hyperparameters, truth, strict=True):
        print(f"{name}: {value:.4f} (drawn from {wanted})")
    prediction = fitted.process.predict(field.values, field.grid)
    for name, value in quality(field, prediction).items():
        print(f"{name}: {value:.3g}")
    options.output.mkdir(parents=True, exist_ok=True)
    draw(options.output / "figure.svg", field, prediction)
    print(f"figure: {options.output / 'figure.svg'}")


if __name__ == "__main__":
    main()
