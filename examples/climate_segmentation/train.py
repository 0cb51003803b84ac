"""Finding storms in climate data: weighted losses, LARC and gradients that come one step late."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from graphopt.examples.climate_segmentation.data import CLASSES, Fields, make_fields
from graphopt.examples.climate_segmentation.figure import draw
from graphopt.examples.climate_segmentation.metrics import CYCLONE, Scores, confusion, predict
from graphopt.examples.climate_segmentation.model import (
    Weighting,
    class_weights,
    small_deeplab,
    small_tiramisu,
    weighted_loss,
)
from graphopt.examples.common import Case, Run, Workload
from graphopt.optim import LARC, groups
from graphopt.study import ConstantDelay

TRAIN, TEST, BATCH = 192, 64, 8
RATE = 3e-3
# Norms behind convolutions are folded into them where the model is evaluated.
PASSES = "cleanup,fold_inference"


@dataclass(frozen=True)
class Variant:
    """One of the trainings that are compared.

    Attributes:
        name: in tables.
        weighting: of the loss.
        lag: steps by which gradients are late.
        larc: whether LARC is around Adam.
        deeplab: DeepLabv3+ instead of the Tiramisu.
    """

    name: str
    weighting: Weighting = "1/sqrt(f)"
    lag: int = 0
    larc: bool = True
    deeplab: bool = False

    def model(self) -> nn.Module:
        """A new network."""
        return small_deeplab() if self.deeplab else small_tiramisu()


VARIANTS = (
    Variant("no weights", "none"),
    Variant("1/sqrt(f)"),
    Variant("1/f", "1/f"),
    Variant("1/sqrt(f), lag 1", lag=1),
    Variant("1/sqrt(f), without LARC", larc=False),
    Variant("1/sqrt(f), DeepLabv3+", deeplab=True),
)


@dataclass
class Outcome:
    """What a training has led to.

    Attributes:
        early: scores on test fields after a quarter of the steps.
        final: those at the end.
        losses: of all steps.
        predicted: labels of the test fields at the end.
    """

    early: Scores
    final: Scores
    losses: list[float]
    predicted: Tensor = field(repr=False)


def train(run: Run, variant: Variant, data: Fields, test: Fields) -> Outcome:
    """Train one variant; all of them start from the same weights and see the same batches."""
    torch.manual_seed(run.seed)
    model = run.optimize(variant.model(), passes=PASSES)
    weights = class_weights(data.labels, variant.weighting)
    steps = run.epochs * TRAIN // BATCH
    # By the graph's roles: LARC leaves norms and biases alone.
    parameters = groups(model, data.values[:BATCH], weight_decay=0.0)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(parameters, RATE)
    if variant.larc:
        optimizer = LARC(optimizer)
    training = ConstantDelay(optimizer, variant.lag)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / steps)

    def step(number: int) -> Tensor:
        epoch, position = divmod(number, TRAIN // BATCH)
        order = torch.randperm(TRAIN, generator=run.generator(10 + epoch))
        chosen = order[BATCH * position : BATCH * (position + 1)].to(run.device)

        def loss() -> Tensor:
            return weighted_loss(model(data.values[chosen]), data.labels[chosen], weights)

        value = training.step(loss)
        if number >= variant.lag:  # before, there was nothing to apply
            scheduler.step()
        return value

    def evaluate() -> dict[str, Tensor]:
        predicted = predict(model, test)
        found = confusion(test.labels, predicted)
        return {"confusion": found.cpu(), "predicted": predicted.cpu()}

    parts: list[Any] = [model, training, scheduler]
    first = steps // 4
    start = run.loop(f"{variant.name}, first quarter", parts, step, first)
    early = run.once(f"{variant.name}, scores after a quarter", evaluate)
    rest = run.loop(f"{variant.name}, rest", parts, lambda n: step(first + n), steps - first)
    final = run.once(f"{variant.name}, scores", evaluate)
    return Outcome(
        Scores(early["confusion"]), Scores(final["confusion"]), start + rest, final["predicted"]
    )


def run(run: Run) -> None:
    """Train all variants and compare them."""
    data = make_fields(TRAIN, run.generator(1)).to(run.device)
    test = make_fields(TEST, run.generator(2)).to(run.device)
    outcomes = {variant.name: train(run, variant, data, test) for variant in VARIANTS}
    background = Scores(confusion(test.labels, torch.zeros_like(test.labels)).cpu())

    for name, scores in [("all background", background)] + [
        (name, outcome.final) for name, outcome in outcomes.items()
    ]:
        early = outcomes[name].early if name in outcomes else background
        run.row(
            "test fields",
            training=name,
            early_recall=early.recall[CYCLONE],
            recall=scores.recall[CYCLONE],
            cyclone_iou=scores.iou[CYCLONE],
            river_iou=scores.iou[1],
            mean_iou=scores.mean_iou,
            accuracy=scores.accuracy,
        )
    for index, label in enumerate(CLASSES):
        run.value(f"share of {label} in training", float((data.labels == index).double().mean()))

    none, root, full, lag = (outcomes[variant.name] for variant in VARIANTS[:4])
    run.require(
        "cyclone recall after a quarter, 1/sqrt(f) over no weights (or over 0.01)",
        root.early.recall[CYCLONE] / max(none.early.recall[CYCLONE], 0.01),
        at_least=5.0,
    )
    run.require(
        "final cyclone IoU, 1/sqrt(f) minus 1/f",
        root.final.iou[CYCLONE] - full.final.iou[CYCLONE],
        at_least=0.07,
    )
    run.require("mean IoU, 1/sqrt(f)", root.final.mean_iou, at_least=0.75)
    run.require("mean IoU of all background", background.mean_iou, at_most=0.34)
    run.require(
        "mean IoU, lag 1 off synchronous",
        abs(lag.final.mean_iou - root.final.mean_iou),
        at_most=0.03,
    )
    run.require(
        "mean IoU, DeepLabv3+", outcomes[VARIANTS[5].name].final.mean_iou, at_least=0.75, gate=False
    )
    shown = {"no weights": none, "1/sqrt(f)": root, "1/f": full, "lag 1": lag}
    draw(run.output / "figure.svg", test, shown)


def case(device: torch.device) -> Case:
    """A training step of the Tiramisu."""
    torch.manual_seed(0)
    data = make_fields(BATCH, torch.Generator().manual_seed(0)).to(device)
    weights = class_weights(data.labels, "1/sqrt(f)")
    return Case(
        small_tiramisu().to(device),
        (data.values,),
        lambda logits: weighted_loss(logits, data.labels, weights),
    )


WORKLOAD = Workload(
    name="climate_segmentation",
    title="Storms in climate data: weighted losses, LARC, gradient lag.",
    run=run,
    case=case,
    epochs=8,
    long_epochs=32,
)

if __name__ == "__main__":
    WORKLOAD.main()
