"""Deep Bayesian filtering of a pendulum, against filters that know its equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.data_assimilation.baselines import (
    EnsembleSettings,
    ensemble_kalman,
    particle_filter,
    rmse,
    tuned_ensemble,
    tuned_jitter,
)
from graphopt.examples.data_assimilation.data import (
    LORENZ96,
    PENDULUM,
    System,
    Trajectories,
    trajectories,
)
from graphopt.examples.data_assimilation.figure import draw
from graphopt.examples.data_assimilation.kalman import largest_difference
from graphopt.examples.data_assimilation.model import DeepBayesianFilter, mlp

BATCH = 64
TIMES = 60
LEAD = 20  # time steps of the forecast
STEPS_PER_EPOCH = 50
EPOCHS, LONG_EPOCHS = 40, 1000
LORENZ_FROM = 200  # epochs from which on the second system is run, too

DEEP = "deep Bayesian filter"
ENSEMBLE = "ensemble Kalman filter"
PARTICLES = "particle filter"
MEMORYLESS = "memoryless network"
CLIMATOLOGY = "climatology"
PERSISTENCE = "persistence"


@dataclass(frozen=True)
class Setting:
    """A system, and what is tuned to it.

    Attributes:
        system: what is filtered.
        planes: of the latent state.
        width: of the hidden layers.
        fastest: of the initial angles, radians per time step.
        rate: of Adam.
        members: sizes of ensembles that are tried.
        particles: of the particle filter; 0 for none.
    """

    system: System
    planes: int
    width: int
    fastest: float
    rate: float
    members: tuple[int, ...]
    particles: int

    def model(self) -> DeepBayesianFilter:
        """A filter with fresh weights."""
        probe = trajectories(self.system, 1, 1, torch.Generator())
        seen, states = probe.observations.shape[-1], probe.states.shape[-1]
        return DeepBayesianFilter(
            seen, states, planes=self.planes, width=self.width, fastest=self.fastest
        )


ONE_PENDULUM = Setting(PENDULUM, 10, 64, 0.6, 4e-3, (50, 200), 2000)
EIGHT_CELLS = Setting(LORENZ96, 50, 100, 1.0, 2e-3, (50, 200), 0)


class Batches:
    """Fresh trajectories for every step, drawn for a whole epoch at a time."""

    def __init__(self, run: Run, system: System) -> None:
        self._run = run
        self._system = system
        self._epoch = -1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Observations (B, T, p) and states (B, T, d) of a step, float32."""
        epoch, index = divmod(step, STEPS_PER_EPOCH)
        if epoch != self._epoch:
            generator = self._run.generator(1000 + epoch)
            drawn = trajectories(self._system, STEPS_PER_EPOCH * BATCH, TIMES, generator)
            self._observations = torch.split(drawn.observations.float(), BATCH)
            self._states = torch.split(drawn.states.float(), BATCH)
            self._epoch = epoch
        device = self._run.device
        return self._observations[index].to(device), self._states[index].to(device)


def train_filter(run: Run, setting: Setting) -> DeepBayesianFilter:
    """A deep Bayesian filter trained on pairs of states and observations."""
    model = setting.model()
    for part in (model.evidence, model.recursion, model.likelihood):
        run.optimize(part)  # the loop over time is outside: see time_loops.py
    steps = run.epochs * STEPS_PER_EPOCH
    optimizer = torch.optim.Adam(model.parameters(), setting.rate)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.rate, total_steps=steps, pct_start=0.05
    )
    batches = Batches(run, setting.system)

    def loss(step: int) -> Tensor:
        observations, states = batches(step)
        shape = (2, BATCH, TIMES, setting.planes)
        noise = torch.randn(shape, generator=run.generator(500_000 + step), dtype=torch.float64)
        value: Tensor = model(observations, states, noise.to(run.device))
        return value

    name = f"{setting.system.name}: deep Bayesian filter"
    run.fit(name, model, optimizer, loss, steps, scheduler=scheduler, clip=10.0)
    return model


def train_memoryless(run: Run, setting: Setting) -> nn.Module:
    """A network that estimates each state from the observation of the same time alone."""
    batches = Batches(run, setting.system)
    observations, states = batches(0)
    model = run.optimize(mlp(observations.shape[-1], states.shape[-1], setting.width, 2))
    steps = min(run.epochs, 12) * STEPS_PER_EPOCH
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(step: int) -> Tensor:
        observations, states = batches(step)
        error: Tensor = model(observations) - states
        return error.square().mean()

    name = f"{setting.system.name}: memoryless network"
    run.fit(name, model, optimizer, loss, steps, scheduler=scheduler)
    return model


def known_filters(run: Run, setting: Setting, seen: Tensor) -> dict[str, Tensor]:
    """Estimates of the filters that know the system, tuned on validation data."""
    system = setting.system
    validation = trajectories(system, 256, TIMES, run.generator(1))

    def ensemble() -> dict[str, Any]:
        tuned = tuned_ensemble(system, validation, setting.members, run.seed)
        found = ensemble_kalman(system, seen, EnsembleSettings(**tuned), run.generator(2), LEAD)
        return {"estimates": found, "settings": tuned}

    def particles() -> Tensor:
        few = Trajectories(validation.states[:48], validation.observations[:48])
        jitter = tuned_jitter(system, few, setting.particles, run.seed)
        return particle_filter(system, seen, setting.particles, jitter, run.generator(3), LEAD)

    tuned = run.once(f"{system.name}: {ENSEMBLE}", ensemble)
    for name, value in tuned["settings"].items():
        run.value(f"{system.name}, {ENSEMBLE}: {name}", value)
    estimates: dict[str, Tensor] = {ENSEMBLE: tuned["estimates"]}
    if setting.particles:
        estimates[PARTICLES] = run.once(f"{system.name}: {PARTICLES}", particles)
    return estimates


def compare(run: Run, setting: Setting, *, gate: bool) -> None:
    """Train, filter test trajectories by every method, and record the errors."""
    name = setting.system.name
    test = trajectories(setting.system, 256, TIMES + LEAD, run.generator(4))
    seen, states = test.observations[:, :TIMES], test.states
    model = train_filter(run, setting)
    memoryless = train_memoryless(run, setting)
    small = seen.float().to(run.device)
    with torch.no_grad():
        estimates = {
            DEEP: model.estimate(small, LEAD).cpu().double(),
            **known_filters(run, setting, seen),
            MEMORYLESS: memoryless(small).cpu().double(),
            CLIMATOLOGY: states.mean((0, 1)).expand_as(states),
        }
    errors, ahead = {}, {}
    for method, found in estimates.items():
        errors[method] = rmse(found[:, :TIMES], states[:, :TIMES], TIMES // 2)
        last = found[:, TIMES - 1 : TIMES].expand(-1, LEAD, -1)  # where nothing is forecast
        forecast = found[:, TIMES:] if found.shape[1] > TIMES else last
        ahead[method] = rmse(forecast, states[:, TIMES:])
        run.row(f"{name}: RMSE", method=method, filtered=errors[method], forecast=ahead[method])
    still = estimates[DEEP][:, TIMES - 1 : TIMES].expand(-1, LEAD, -1)
    ahead[PERSISTENCE] = rmse(still, states[:, TIMES:])
    run.row(f"{name}: RMSE", method=PERSISTENCE, filtered="", forecast=ahead[PERSISTENCE])

    for other, most in ((ENSEMBLE, 0.75), (MEMORYLESS, 0.5)):
        ratio = errors[DEEP] / errors[other]
        run.require(f"{name}: error / error of {other}", ratio, at_most=most, gate=gate)
    ratio = ahead[DEEP] / ahead[PERSISTENCE]
    run.require(f"{name}: forecast error / {PERSISTENCE}", ratio, at_most=1.0, gate=gate)
    if gate:
        draw(run.output / "figure.svg", test, estimates, TIMES)


def assimilate(run: Run) -> None:
    """The pendulum, which is the test; and Lorenz-96, which needs a long training."""
    difference = max(largest_difference(planes, 40, run.seed) for planes in (1, 4))
    run.require("largest difference from the Kalman filter", difference, at_most=1e-10)
    compare(run, ONE_PENDULUM, gate=True)
    if run.epochs >= LORENZ_FROM:
        compare(run, EIGHT_CELLS, gate=False)


def case(device: torch.device) -> Case:
    """The pendulum's training on the time steps of one call of the recursion, as one graph."""
    torch.manual_seed(0)
    model = ONE_PENDULUM.model().to(device)
    drawn = trajectories(PENDULUM, BATCH, model.steps, torch.Generator().manual_seed(0))
    noise = torch.randn(2, BATCH, model.steps, model.planes, dtype=torch.float64, device=device)
    batch = drawn.observations.float().to(device), drawn.states.float().to(device)
    return Case(model, (*batch, noise), lambda loss: loss)


WORKLOAD = Workload(
    "data_assimilation",
    "Deep Bayesian filtering: a pendulum is followed by a noisy sine of its angle.",
    assimilate,
    case,
    epochs=EPOCHS,
    long_epochs=LONG_EPOCHS,
    backend="inductor",
)

if __name__ == "__main__":
    WORKLOAD.main()
