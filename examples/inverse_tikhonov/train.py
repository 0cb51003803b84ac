"""Inverse networks against Tikhonov regularisation: deconvolution and heat conduction."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.inverse_tikhonov import baselines
from graphopt.examples.inverse_tikhonov.baselines import Affine, Array, HeatInversion
from graphopt.examples.inverse_tikhonov.data import Pairs, draw_pairs
from graphopt.examples.inverse_tikhonov.figure import Deblurred, draw
from graphopt.examples.inverse_tikhonov.model import (
    NDNN,
    GaussianPrior,
    InverseNetwork,
    McDNN,
    Objective,
    TNet,
    scaling,
    whitening,
)
from graphopt.examples.inverse_tikhonov.problems import Deconvolution, HeatConduction
from graphopt.examples.inverse_tikhonov.training import (
    Recipe,
    relative_error,
    train_affine,
    train_network,
)

T = TypeVar("T")
METHODS: dict[str, type[Objective]] = {"nDNN": NDNN, "mcDNN": McDNN, "TNet": TNet}
HIDDEN = 200
SAMPLES, SIZES, COPIES = 20, (10, 20, 100), 20
HEAT_SAMPLES, SIDE = 50, 10
STREAM = 10**6  # of random numbers, behind those of the steps
RECIPES: tuple[Recipe, ...] = (Recipe(None, 10.0), Recipe(10.0, 3.0))


@dataclass(frozen=True)
class Setting:
    """An inverse problem with its data.

    Attributes:
        problem: the forward map.
        prior: of its parameter.
        noise: standard deviation of observations.
        train: pairs to learn from.
        held_out: for choices.
        test: for the reported errors.
    """

    problem: Deconvolution | HeatConduction
    prior: GaussianPrior
    noise: float
    train: Pairs
    held_out: Pairs
    test: Pairs

    def cast(self, device: torch.device, dtype: torch.dtype) -> Setting:
        """The same elsewhere; modules are moved in place."""
        pairs = (part.to(device, dtype) for part in (self.train, self.held_out, self.test))
        self.problem.to(device, dtype)
        self.prior.to(device, dtype)
        return Setting(self.problem, self.prior, self.noise, *pairs)

    def objective(
        self, kind: type[Objective], data: Pairs, hidden: int, recipe: Recipe
    ) -> Objective:
        """A new network for ``data`` with its loss."""
        if recipe.ridge is None:
            weight = scaling(data.y)
        else:
            weight = whitening(data.y, recipe.ridge * self.noise**2)
        network = InverseNetwork(data.y, weight, data.u.shape[1], hidden)
        return kind(network, self.problem, self.prior, self.noise)


def deconvolution(generator: torch.Generator) -> Setting:
    """50 cells, blur of 1/20 of the interval, noise of 5 % of the deviation of u."""
    problem, prior, noise = Deconvolution(50, 0.05), GaussianPrior((50,), 0.1, 1.0), 0.05

    def draw_some(count: int) -> Pairs:
        return draw_pairs(prior, problem, noise, count, generator)

    return Setting(problem, prior, noise, draw_some(max(SIZES)), draw_some(20), draw_some(500))


def heat(generator: torch.Generator) -> Setting:
    """10 x 10 cells, 25 of them observed; noise of 5 % of the deviation of temperatures."""
    problem, prior = HeatConduction(SIDE, 2), GaussianPrior((SIDE, SIDE), 0.3, 0.5)
    noise = 0.05 * float(draw_pairs(prior, problem, 0.0, 200, generator).y.std())

    def draw_some(count: int) -> Pairs:
        return draw_pairs(prior, problem, noise, count, generator)

    return Setting(problem, prior, noise, draw_some(HEAT_SAMPLES), draw_some(50), draw_some(100))


def run_affine(run: Run, setting: Setting, matrix: Array, inverse: Affine) -> None:
    """Trained affine networks against their closed forms."""
    setting = setting.cast(run.device, torch.float64)
    root = setting.prior.root.cpu().numpy()
    test_y, test_u = setting.test.y.cpu().numpy(), setting.test.u
    worst = 0.0

    def compare(name: str, kind: type[Objective], data: Pairs, closed: Affine) -> None:
        nonlocal worst
        objective = setting.objective(kind, data, 0, Recipe(0.0, 0.0))
        train_affine(run, name, objective, data)
        with torch.no_grad():
            found = objective.invert(setting.test.y)
        oracle = closed(test_y)
        gap = np.abs(found.cpu().numpy() - oracle).max() / np.abs(oracle).max()
        worst = max(worst, float(gap))
        _row(run, "affine", name, len(data.u), relative_error(found, test_u), best)

    best = relative_error(torch.as_tensor(inverse(test_y)).to(run.device), test_u)
    _row(run, "affine", "Tikhonov", 0, best, best)
    for size in SIZES:
        data = setting.train[:size]
        u, y = data.u.cpu().numpy(), data.y.cpu().numpy()
        closed = {
            "nDNN": baselines.affine_ndnn(u, y),
            "mcDNN": baselines.affine_mcdnn(u, y, matrix, root @ root, setting.noise, 1.0),
            "TNet": baselines.affine_tnet(y, inverse),
        }
        for name, kind in METHODS.items():
            compare(f"affine {name} {size}", kind, data, closed[name])
    data = setting.train[:SAMPLES]
    copies = torch.randn(
        COPIES, *data.y.shape, generator=run.generator(STREAM + 1), dtype=torch.float64
    )
    noisy = data.y + setting.noise * copies.to(run.device)
    many = Pairs(data.u.repeat(COPIES, 1), noisy.flatten(0, 1))
    compare(f"affine TNet {SAMPLES} x {COPIES} noisy copies", TNet, many, inverse)
    run.require("affine networks, largest deviation from their closed forms", worst, at_most=1e-8)


def run_networks(
    run: Run, table: str, setting: Setting, samples: int, steps: int, best: float
) -> dict[str, Objective]:
    """Train an MLP per method, choose its recipe on held-out data; the networks by method."""
    data = setting.train[:samples]
    chosen: dict[str, Objective] = {}
    for name, kind in METHODS.items():
        recipes = RECIPES
        if kind is NDNN:  # noise that large may be good for TNet only
            recipes = (*RECIPES, Recipe(None, 1.0))
        scores = []
        for recipe in recipes:
            objective = setting.objective(kind, data, HIDDEN, recipe)
            label = f"{table} {name} {recipe.ridge} {recipe.spread:g}"
            score = train_network(
                run, label, objective, data, setting.held_out, recipe.spread, steps
            )
            scores.append((score, objective))
        chosen[name] = min(scores, key=lambda pair: pair[0])[1]
        with torch.no_grad():
            error = relative_error(chosen[name].invert(setting.test.y), setting.test.u)
        _row(run, table, name, samples, error, best)
    return chosen


def run_deconvolution(run: Run) -> Deblurred:
    """Part one: closed forms are known."""
    setting = deconvolution(run.generator(STREAM))
    root, mean = setting.prior.root.numpy(), setting.prior.mean.numpy()
    matrix = setting.problem(torch.eye(len(root), dtype=torch.float64)).T.numpy()
    inverse = baselines.tikhonov(matrix, root @ root, mean, setting.noise)
    classic = torch.as_tensor(inverse(setting.test.y.numpy()))
    run_affine(run, setting, matrix, inverse)
    setting = setting.cast(run.device, torch.float32)
    best = relative_error(classic.to(run.device), setting.test.u)
    _row(run, "deconvolution", "Tikhonov", 0, best, best)
    networks = run_networks(run, "deconvolution", setting, SAMPLES, 100 * run.epochs, best)
    ratio = _ratios(run, "deconvolution")
    run.require("deconvolution, 20 samples: TNet / Tikhonov", ratio["TNet"], at_most=1.25)
    run.require("deconvolution, 20 samples: nDNN / Tikhonov", ratio["nDNN"], at_least=1.4)
    affine = _ratios(run, "affine")[f"affine nDNN {SAMPLES}"]
    run.require("deconvolution, 20 samples: affine nDNN / Tikhonov", affine, at_least=1.4)
    with torch.no_grad():
        curves = {n: o.invert(setting.test.y[:1])[0].cpu().numpy() for n, o in networks.items()}
    curves["Tikhonov"] = classic[0].numpy()
    return Deblurred(setting.test.u[0].cpu().numpy(), setting.test.y[0].cpu().numpy(), curves)


def run_heat(run: Run) -> None:
    """Part two: a nonlinear map, against Gauss-Newton in error and in time."""
    setting = heat(run.generator(STREAM + 2))
    assert isinstance(setting.problem, HeatConduction)
    iterative = HeatInversion(
        SIDE,
        setting.problem.observed.numpy(),
        setting.prior.root.numpy(),
        setting.prior.mean.numpy(),
        setting.noise,
    )
    observations = setting.test.y.numpy()

    def invert_all() -> dict[str, float]:
        results = [iterative(y) for y in observations]
        found = torch.as_tensor(np.stack([u for u, _ in results]))
        steps = float(np.mean([count for _, count in results]))
        return {"error": relative_error(found, setting.test.u), "steps": steps}

    classic = run.once("heat Gauss-Newton", invert_all)
    iterative_ms = _milliseconds(iterative, list(observations))
    best = classic["error"]
    _row(run, "heat", "Gauss-Newton", 0, best, best)
    run.value("heat: Gauss-Newton steps per inversion", classic["steps"])
    setting = setting.cast(run.device, torch.float32)
    networks = run_networks(run, "heat", setting, HEAT_SAMPLES, 50 * run.epochs, best)
    ratio = _ratios(run, "heat")
    with torch.inference_mode():
        network_ms = _milliseconds(
            lambda y: networks["TNet"].invert(y).cpu(), list(setting.test.y[:, None])
        )
    run.value("heat: ms per inversion, Gauss-Newton", iterative_ms)
    run.value("heat: ms per inversion, TNet", network_ms)
    run.require("heat, 50 samples: TNet / Gauss-Newton", ratio["TNet"], at_most=1.25)
    run.require("heat: times faster than Gauss-Newton", iterative_ms / network_ms, at_least=20)
    run.require("heat: nDNN / TNet", ratio["nDNN"] / ratio["TNet"], at_least=1.0, gate=False)


def main(run: Run) -> None:
    """Both parts and the figure."""
    torch.manual_seed(run.seed)  # also when resumed, so that networks start as they did
    deblurred = run_deconvolution(run)
    run_heat(run)
    draw(run.output / "figure.svg", deblurred, run.results.tables, run.results.values)


def case(device: torch.device) -> Case:
    """A TNet step of heat conduction: a batch of linear solves in the graph."""
    setting = heat(torch.Generator().manual_seed(0)).cast(device, torch.float32)
    torch.manual_seed(0)
    data = setting.train
    objective = setting.objective(TNet, data, HIDDEN, RECIPES[1])
    return Case(objective.to(device), (data.y, data.u), lambda loss: loss)


def _row(run: Run, table: str, method: str, samples: int, error: float, best: float) -> None:
    columns = {"relative error": error, "over Tikhonov": error / best}
    run.row(table, method=method, samples=samples or "-", **columns)


def _ratios(run: Run, table: str) -> dict[str, float]:
    rows = run.results.tables[table]
    return {str(row["method"]): float(row["over Tikhonov"]) for row in rows}


def _milliseconds(invert: Callable[[T], object], observations: list[T]) -> float:
    """Median over ``observations``."""
    seconds = []
    for y in observations:
        start = time.perf_counter()
        invert(y)
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


WORKLOAD = Workload(
    name="inverse_tikhonov",
    title="Networks that solve Tikhonov problems: nDNN, mcDNN and TNet.",
    run=main,
    case=case,
    epochs=30,
    long_epochs=200,
)

if __name__ == "__main__":
    WORKLOAD.main()
