"""Forecast and fill in a field with an ensemble of Bayesian neural fields and its rivals."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.spatiotemporal.baselines import BASELINES
from graphopt.examples.spatiotemporal.data import (
    WEEKS,
    YEAR,
    Samples,
    make_split,
    with_validation,
)
from graphopt.examples.spatiotemporal.figure import draw
from graphopt.examples.spatiotemporal.model import Ensemble, Features, Field, Variational
from graphopt.examples.spatiotemporal.scores import Prediction, predict_mixture, score

UPDATES_PER_EPOCH = 20
PARTICLES = 8
RATE = 1e-2
VARIATIONAL_DRAWS = 30
CANDIDATES = {
    "plain": Features(),
    "seasons": Features((4, 0, 0), (YEAR, 4.0), 2),
    "seasons and space": Features((4, 2, 2), (YEAR, 4.0), 2),
}


def run(run: Run) -> None:
    """Choose features on validation samples, train on all but the test samples, compare there."""
    split = make_split(run.generator())
    steps = UPDATES_PER_EPOCH * run.epochs
    chosen, lowest = "", math.inf
    for name, features in CANDIDATES.items():
        means, sds = _map_ensemble(
            run, f"choice: {name}", features, split.training, split.validation, 3, steps // 2
        )
        found = score(predict_mixture(means, sds), split.validation.values)
        run.row("features, on validation samples", features=name, **asdict(found))
        if found.mis < lowest:
            chosen, lowest = name, found.mis
    run.value("features chosen", chosen)

    training, test = with_validation(split), split.test
    features = CANDIDATES[chosen]
    means, sds = _map_ensemble(run, "ensemble", features, training, test, PARTICLES, steps)
    ensemble = predict_mixture(means, sds)
    single = [
        score(predict_mixture(m[None], s[None]), test.values)
        for m, s in zip(means, sds, strict=True)
    ]
    predictions = {
        f"ensemble of {PARTICLES}": ensemble,
        "variational": _variational(run, features, training, test, steps),
    }
    for name, fit in BASELINES.items():
        parts = run.once(name, partial(_as_dict, fit, training, test))
        predictions[name] = Prediction(**parts)
    scores = {name: score(p, test.values) for name, p in predictions.items()}
    for name, found in scores.items():
        run.row("test samples", model=name, **asdict(found))
    alone = {k: sum(asdict(s)[k] for s in single) / PARTICLES for k in ("rmse", "mis", "coverage")}
    run.row("test samples", model=f"one particle (mean of {PARTICLES})", **alone)

    ours = scores[f"ensemble of {PARTICLES}"]
    rest = [scores[name] for name in BASELINES if name != "Gaussian process"]
    for what, rivals, gate in (
        ("all baselines", [scores[name] for name in BASELINES], True),
        ("boosting, forest and surface", rest, False),
    ):
        rmse = ours.rmse / min(rival.rmse for rival in rivals)
        mis = ours.mis / min(rival.mis for rival in rivals)
        run.require(f"RMSE / lowest of {what}", rmse, at_most=1.0, gate=gate)
        run.require(f"interval score / lowest of {what}", mis, at_most=0.75, gate=gate)
    run.require("interval score / one particle's", ours.mis / alone["mis"], at_most=0.5)
    run.require("coverage of 95 % intervals", ours.coverage, at_least=0.85)
    run.require("coverage of 95 % intervals", ours.coverage, at_most=0.98)
    draw(run.output / "figure.svg", training, test, ensemble, run.results.tables["test samples"])


def _particles(run_seed: int, features: Features, training: Samples, count: int) -> list[Field]:
    torch.manual_seed(run_seed)
    fields = [Field(features, torch.tensor([float(WEEKS), 1.0, 1.0])) for _ in range(count)]
    for field in fields:
        field.log_noise.data.fill_(math.log(float(training.values.std()) / 2))
    return fields


def _map_ensemble(
    run: Run,
    name: str,
    features: Features,
    training: Samples,
    at: Samples,
    count: int,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Means (particles, n) of the samples `at`, and noise (particles,), after training."""
    ensemble = Ensemble(_particles(run.seed, features, training, count))
    run.optimize(ensemble)
    optimizer = torch.optim.Adam(ensemble.parameters(), RATE, fused=True)
    inputs, values = training.inputs.to(run.device), training.values.to(run.device)

    def loss(_step: int) -> Tensor:
        posterior: Tensor = ensemble(inputs, values)[0]
        return posterior.sum() / len(values)

    run.fit(name, ensemble, optimizer, loss, steps, scheduler=_cosine(optimizer, steps))
    with torch.no_grad():
        places, unused = at.inputs.to(run.device), at.values.to(run.device)
        means = ensemble.mapped(list(ensemble.stacked), places, unused)[1]
    return means.cpu(), ensemble.noise().cpu()


def _variational(
    run: Run, features: Features, training: Samples, at: Samples, steps: int
) -> Prediction:
    model = Variational(_particles(run.seed, features, training, 1)[0])
    run.optimize(model)
    optimizer = torch.optim.Adam(model.parameters(), RATE, fused=True)
    inputs, values = training.inputs.to(run.device), training.values.to(run.device)

    def noise(draws: int, stream: int) -> list[Tensor]:
        generator = run.generator(stream)
        return [
            torch.randn(draws, *p.shape, generator=generator).to(run.device) for p in model.means
        ]

    def loss(step: int) -> Tensor:
        bound: Tensor = model(inputs, values, noise(model.ensemble.size, step))
        return bound / len(values)

    run.fit("variational", model, optimizer, loss, steps, scheduler=_cosine(optimizer, steps))
    with torch.no_grad():
        drawn = model.draw(noise(VARIATIONAL_DRAWS, steps))
        places, unused = at.inputs.to(run.device), at.values.to(run.device)
        means = model.ensemble.mapped(drawn, places, unused)[1]
        sds = model.ensemble.noise(drawn)
    return predict_mixture(means.cpu(), sds.cpu())


def _cosine(
    optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.CosineAnnealingLR:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def _as_dict(fit: object, training: Samples, test: Samples) -> dict[str, Tensor]:
    assert callable(fit)
    prediction: Prediction = fit(training, test)
    return {"mean": prediction.mean, "lower": prediction.lower, "upper": prediction.upper}


def case(device: torch.device) -> Case:
    """A training step of the ensemble of eight with all features."""
    training = with_validation(make_split(torch.Generator().manual_seed(0)))
    ensemble = Ensemble(_particles(0, CANDIDATES["seasons and space"], training, PARTICLES))
    inputs, values = training.inputs.to(device), training.values.to(device)
    return Case(ensemble.to(device), (inputs, values), lambda output: output[0].sum() / len(values))


WORKLOAD = Workload(
    name="spatiotemporal",
    title="Bayesian neural fields: forecasts with calibrated intervals.",
    run=run,
    case=case,
    epochs=30,
    long_epochs=250,
    backend="eager",
)

if __name__ == "__main__":
    WORKLOAD.main()
