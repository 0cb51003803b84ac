"""Train with large batches: warm-up by RMSprop, K workers, and batches that grow.

Run: ``python -m graphopt.examples.large_batch.train``; ``--help`` for options.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.large_batch.data import Images, digits
from graphopt.examples.large_batch.figure import draw
from graphopt.examples.large_batch.model import Workers, network
from graphopt.examples.large_batch.training import MICRO, Outcome, Recipe, fixed, gradual, train
from graphopt.optim import BatchSchedule, RMSpropWarmup, linear_scaling

SMALL, LARGE = 32, 512
RATE = 0.1  # at batches of SMALL
REPEATS = 3  # trainings of each recipe in a run, with a split of the data and weights of their own
WORKERS = LARGE // SMALL
WORKER_STEPS = 12


def recipes(epochs: int) -> list[Recipe]:
    """All of them; `epochs` is the length of those that see the data as often as the small batch.

    Equal updates take as many epochs as there are small batches for a large one, rounded down.
    """
    rate = linear_scaling(LARGE, rate=RATE, reference=SMALL)
    small, large = fixed(SMALL), fixed(LARGE)
    warm = (3 * epochs / 8, epochs / 4)
    equal = 14 * epochs  # 42 steps an epoch against 3
    quarter = max(1, epochs // 4)
    return [
        Recipe("small", RATE, epochs, small),
        Recipe("large, rate of small", RATE, epochs, large),
        Recipe("large, no warm-up", rate, epochs, large),
        Recipe("large, gradual warm-up", rate, epochs, large, schedule=gradual),
        Recipe("large, RMSprop warm-up", rate, epochs, large, warmup=warm),
        Recipe("equal updates, no warm-up", rate, equal, large),
        Recipe("equal updates, RMSprop warm-up", rate, equal, large, warmup=(10.0, 5.0)),
        Recipe(
            "small, rate halved",
            RATE,
            epochs,
            small,
            schedule=lambda epoch, _: 0.5 ** (epoch // quarter),
        ),
        Recipe(
            "AdaBatch",
            RATE,
            epochs,
            lambda model: BatchSchedule(model, smallest=1, largest=32, double_every=quarter),
            schedule=None,
        ),
        Recipe(
            "noise scale",
            RATE,
            epochs,
            lambda model: BatchSchedule(model, smallest=2, largest=64),
            micro=MICRO // 2,
            schedule=None,
        ),
    ]


def run(run: Run) -> None:
    found: dict[str, list[Outcome]] = {}
    torch.manual_seed(run.seed)
    # Without parts that wait for the end of a step, two micro-batches tell the noise.
    model = run.optimize(network(), passes="cleanup")
    for repeat in range(REPEATS):
        data = digits(run.generator(repeat), run.device)
        start = _weights(run, repeat)
        for recipe in recipes(run.epochs):
            model.load_state_dict(start)
            outcome = train(run, f"{recipe.name}, {repeat}", recipe, model, data)
            found.setdefault(recipe.name, []).append(outcome)
    data = digits(run.generator(), run.device)
    distances = run.once("workers", lambda: list(_workers(run, data.train)))
    _judge(run, found, distances)
    if run.first:
        draw(run.output / "figure.svg", found, len(data.train))


def _weights(run: Run, repeat: int) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(1000 * run.seed + repeat)
        return {name: value.clone() for name, value in network().state_dict().items()}


def _workers(run: Run, images: Images) -> tuple[float, float]:
    """How far weights end from those of one batch: K workers, and one that accumulates.

    Relative norms of the difference, after `WORKER_STEPS` updates in float64.
    """
    torch.manual_seed(run.seed)
    one = network(batch_norm=False).to(run.device).double()
    models = [one, copy.deepcopy(one), run.optimize(copy.deepcopy(one))]
    optimizers = [
        RMSpropWarmup(
            m.parameters(),
            linear_scaling(LARGE, rate=RATE, reference=SMALL),
            steps_per_epoch=3,
            center=1.0,
            period=2.0,
        )
        for m in models
    ]
    workers, batch = Workers(models[1], WORKERS), fixed(LARGE)(models[2])
    for step in range(WORKER_STEPS):
        drawn = torch.randperm(len(images), generator=run.generator(10_000 + step))[:LARGE]
        pixels, labels = images.pixels[drawn].double(), images.labels[drawn]
        for m in models:
            m.zero_grad()
        F.cross_entropy(one(pixels), labels).backward()
        workers.backward(pixels, labels)
        micro = list(zip(pixels.split(MICRO), labels.split(MICRO), strict=True))
        for accumulated in batch.steps(micro):
            for own, targets in accumulated:
                accumulated.backward(F.cross_entropy(models[2](own), targets))
        for optimizer in optimizers:
            optimizer.step()
    first, second = (_distance(m, one) for m in models[1:])
    return first, second


def _distance(ours: nn.Module, theirs: nn.Module) -> float:
    a, b = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (ours, theirs))
    return float((a - b).norm() / b.norm())


def _mean(outcomes: Sequence[Outcome]) -> float:
    return statistics.mean(outcome.accuracy for outcome in outcomes)


def _judge(run: Run, found: dict[str, list[Outcome]], distances: Sequence[float]) -> None:
    for name, outcomes in found.items():
        run.row(
            "trainings",
            recipe=name,
            updates=round(statistics.mean(o.updates for o in outcomes)),
            accuracy=round(_mean(outcomes), 2),
            least=round(min(o.accuracy for o in outcomes), 2),
            most=round(max(o.accuracy for o in outcomes), 2),
        )
    for name in ("AdaBatch", "noise scale"):
        for change in found[name][0].changes:
            run.row("batch sizes of the first training", recipe=name, change=str(change))
    right = {name: _mean(outcomes) for name, outcomes in found.items()}
    updates = {name: statistics.mean(o.updates for o in own) for name, own in found.items()}
    run.require(
        "warm-up by RMSprop - none, points",
        right["large, RMSprop warm-up"] - right["large, no warm-up"],
        at_least=5,
    )
    run.require(
        "equal updates: batch of 32 - 512, points",
        right["small"] - right["equal updates, RMSprop warm-up"],
        at_most=1,
    )
    run.require("weights of K workers: distance to one batch", distances[0], at_most=1e-6)
    run.require("weights of accumulation: distance to one batch", distances[1], at_most=1e-6)
    run.require(
        "AdaBatch: fixed batch - doubled, points",
        right["small, rate halved"] - right["AdaBatch"],
        at_most=0.5,
    )
    run.require(
        "AdaBatch: updates / those of the fixed batch",
        updates["AdaBatch"] / updates["small, rate halved"],
        at_most=0.5,
    )
    run.require(
        "batch by noise scale: fixed batch - followed, points",
        right["small, rate halved"] - right["noise scale"],
        at_most=0.5,
        gate=False,
    )
    run.require(
        "batch by noise scale: updates / those of the fixed batch",
        updates["noise scale"] / updates["small, rate halved"],
        at_most=0.5,
        gate=False,
    )
    run.require(
        "warm-up by RMSprop - gradual, points",
        right["large, RMSprop warm-up"] - right["large, gradual warm-up"],
        at_least=0,
        gate=False,
    )


def case(device: torch.device) -> Case:
    data = digits(torch.Generator().manual_seed(0), device).train
    images, labels = data.pixels[:MICRO], data.labels[:MICRO]
    model = network().to(device)
    return Case(model, (images,), lambda scores: F.cross_entropy(scores, labels))


WORKLOAD = Workload(
    "large_batch",
    "Large batches on digits: warm-up by RMSprop, and batches that grow.",
    run,
    case,
    epochs=8,
    long_epochs=24,
)

if __name__ == "__main__":
    WORKLOAD.main()
