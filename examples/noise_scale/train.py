"""Measure the noise scale along a training, and what batch sizes cost.

Run: ``python -m graphopt.examples.noise_scale.train``; ``--help`` for options.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.common import Case, Run, Workload, panels
from graphopt.examples.noise_scale.data import digits
from graphopt.examples.noise_scale.model import (
    Hyperbola,
    Noise,
    exact_noise,
    fit_hyperbola,
    mlp,
    two_batch_noise,
)

STEPS = 150  # of the long training, per epoch
# Where in it the noise is measured, as parts of the whole; at first it changes fast.
POINTS = (0, 1 / 48, 1 / 24, 1 / 12, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1)
SIZES = (16, 256)  # of the estimator
DRAWS = 400  # of each size
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
RATES = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
GOAL = 0.35  # loss over all images
MOST = 500  # steps with large batches; small ones may take more


def run(run: Run) -> None:
    images, labels = (part.to(run.device) for part in digits())
    points = _along_training(run, images, labels)
    steps = _steps_to_goal(run, images, labels)
    batches = [batch for batch in BATCHES if steps[batch] is not None]
    fit = fit_hyperbola(batches, [float(steps[batch] or 0) for batch in batches])
    _judge(run, points, steps, fit)
    _draw(run, points, steps, fit)


@dataclass(frozen=True)
class Point:
    """Of the long training: the noise there, exactly and from two batch sizes."""

    step: int
    loss: float
    exact: Noise
    estimated: Noise


def _along_training(run: Run, images: Tensor, labels: Tensor) -> list[Point]:
    torch.manual_seed(run.seed)
    model = run.optimize(mlp())
    total, done = STEPS * run.epochs, 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    # Rates that end at zero: with others |g| stays where the noise keeps it.
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    found = []
    for part in POINTS:
        until = round(total * part)
        if until > done:
            start = done

            def loss(step: int, start: int = start) -> Tensor:
                batch = _draw_batch(run, start + step, 32, len(images))
                return F.cross_entropy(model(images[batch]), labels[batch])

            name = f"training to step {until}"
            run.fit(name, model, optimizer, loss, until - done, scheduler=scheduler)
            done = until
        squares = run.once(
            f"gradients at step {until}", lambda: _squares(run, model, images, labels)
        )
        with torch.no_grad():
            value = F.cross_entropy(model(images), labels).item()
        exact = exact_noise(model, images, labels)
        found.append(Point(until, value, exact, two_batch_noise(squares[0], squares[1], SIZES)))
    return found


def _squares(run: Run, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Squared norms of gradients, (2 sizes, draws)."""
    rows = []
    for size in SIZES:
        row = []
        for draw in range(DRAWS):
            batch = _draw_batch(run, 10_000_000 + draw, size, len(images), stream=size)
            model.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            row.append(sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None))
        rows.append(torch.tensor([float(value) for value in row], dtype=torch.float64))
    model.zero_grad()
    return torch.stack(rows)


def _steps_to_goal(run: Run, images: Tensor, labels: Tensor) -> dict[int, int | None]:
    """By batch size, with the learning rate of `RATES` that needs the fewest."""
    torch.manual_seed(run.seed)
    model = run.optimize(mlp())
    start = {name: value.clone() for name, value in model.state_dict().items()}
    found: dict[int, int | None] = {}
    for size in BATCHES:
        most = MOST * (1 + 24 // size)
        fewest: int | None = None
        for rate in RATES:
            model.load_state_dict(start)
            limit = most if fewest is None else fewest
            steps = _train_to_goal(run, model, images, labels, size, rate, limit)
            fewest = steps if steps is not None else fewest
        found[size] = fewest
    return found


def _train_to_goal(
    run: Run, model: nn.Module, images: Tensor, labels: Tensor, size: int, rate: float, most: int
) -> int | None:
    """How many steps it takes, or None if more than ``most``."""
    optimizer = torch.optim.SGD(model.parameters(), rate)

    def step(number: int) -> Tensor:
        batch = _draw_batch(run, number, size, len(images), stream=size)
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        with torch.no_grad():  # one batch is too noisy a judge
            return F.cross_entropy(model(images), labels)

    values = run.loop(
        f"batch {size}, rate {rate}", [model, optimizer], step, most, enough=lambda v: v <= GOAL
    )
    return len(values) if values[-1] <= GOAL else None


def _draw_batch(run: Run, step: int, size: int, images: int, stream: int = 0) -> Tensor:
    generator = run.generator(step + 100_000 * stream)
    return torch.randint(images, (size,), generator=generator).to(run.device)


def _judge(
    run: Run,
    points: Sequence[Point],
    steps: dict[int, int | None],
    fit: Hyperbola,
) -> None:
    for point in points:
        run.row(
            "noise scale",
            step=point.step,
            loss=round(point.loss, 3),
            exact=round(point.exact.scale),
            estimated=round(point.estimated.scale),
        )
    for size, needed in steps.items():
        run.row("steps", batch=size, steps=needed or "none", fit=round(fit.steps(size), 1))
    error = abs(points[0].estimated.scale / points[0].exact.scale - 1)
    run.require("error of the two-batch estimate at the start", error, at_most=0.15)
    run.require(
        "growth of the noise scale over the training",
        points[-1].exact.scale / points[0].exact.scale,
        at_least=10,
    )
    run.require("hyperbola: rms of log steps", fit.error, at_most=0.15)
    # The critical batch is of trainings that end at the goal, so is the noise it is held against.
    before = statistics.mean(point.exact.scale for point in points if point.loss > GOAL)
    ratio = max(fit.critical / before, before / fit.critical)
    run.require("critical batch and noise scale before the goal: factor", ratio, at_most=10)
    run.value("noise scale before the goal, examples", before)
    run.value("S_min, steps", fit.fewest)
    run.value("B_crit, examples", fit.critical)


def _draw(
    run: Run,
    points: Sequence[Point],
    steps: dict[int, int | None],
    fit: Hyperbola,
) -> None:
    if not run.first:
        return
    with panels(run.output / "figure.svg", 1, 2) as axes:
        left, right = axes[0]
        numbers = [point.step for point in points]
        left.plot(numbers, [point.exact.scale for point in points], label="every example")
        left.plot(
            numbers,
            [point.estimated.scale for point in points],
            "o",
            label=f"batches of {SIZES[0]} and {SIZES[1]}",
        )
        left.set(yscale="log", xlabel="step", ylabel="noise scale (examples)")
        left.legend()
        known = {size: needed for size, needed in steps.items() if needed is not None}
        right.plot(list(known), list(known.values()), "o", label="measured")
        right.plot(list(known), [fit.steps(s) for s in known], label="S$_{min}$(1 + B$_{crit}$/B)")
        right.axvline(fit.critical, linestyle=":", color="#808080")
        right.set(
            xscale="log", yscale="log", xlabel="batch (examples)", ylabel=f"steps to loss {GOAL}"
        )
        right.legend()


def case(device: torch.device) -> Case:
    images, labels = (part[:256].to(device) for part in digits())
    return Case(mlp().to(device), (images,), lambda scores: F.cross_entropy(scores, labels))


WORKLOAD = Workload(
    "noise_scale",
    "The gradient noise scale of a classifier of digits, and what batch sizes cost.",
    run,
    case,
    epochs=8,
    long_epochs=40,
)

if __name__ == "__main__":
    WORKLOAD.main()
