"""Reconstructing crystals from electron diffraction, data-parallel and in lower precision."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from graphopt.examples.common import Case, Run, Workload, WorkloadError
from graphopt.examples.materials_imaging.baselines import ridge
from graphopt.examples.materials_imaging.data import DEFOCUS, Specimens, make_specimens
from graphopt.examples.materials_imaging.figure import draw
from graphopt.examples.materials_imaging.model import (
    huber_loss,
    predict,
    relative_error,
    small_net,
)
from graphopt.examples.materials_imaging.peaks import match

TRAIN, VALIDATION, TEST, BATCH = 1200, 64, 128, 16
RATE = 3e-3
SHORT = 50  # steps of the trainings in each format
# On a processor without fast products in 16 bits nothing would be lowered for its measured times.
LOWER = "precision{{cost=roofline,format={format}}}"


def train(run: Run, name: str, data: Specimens, steps: int, lower: str = "") -> nn.Module:
    """Train a network; in a job each rank takes its share of every batch.

    Args:
        run: with the seed.
        name: of the training.
        data: to train on.
        steps: how many.
        lower: format of the operators that `precision` lowers; empty for none of them.

    Returns:
        The trained network.
    """
    torch.manual_seed(run.seed)
    ranks, rank = _job()
    passes = ["cleanup"]
    if lower:
        passes.append(LOWER.format(format=lower))
    if ranks > 1:
        passes += ["schedule", "group_gradients"]
    model = run.optimize(small_net(), passes=",".join(passes))
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    scheduler = OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.2)

    def loss(number: int) -> Tensor:
        epoch, position = divmod(number, TRAIN // BATCH)
        order = torch.randperm(TRAIN, generator=run.generator(10 + epoch))
        batch = order[BATCH * position : BATCH * (position + 1)]
        mine = batch[rank::ranks].to(run.device)
        return huber_loss(model(data.patterns[mine]), data.potential[mine])

    run.fit(name, model, optimizer, loss, steps, scheduler=scheduler)
    return model


def run(run: Run) -> None:
    """Train, hold against linear reconstruction and the opposite defocus, and compare formats."""
    ranks, _ = _job()
    if BATCH % ranks:
        raise WorkloadError(f"{ranks} ranks cannot share {BATCH} specimens evenly", "use 2 ranks")
    recorded = _specimens(run, DEFOCUS)
    data, validation, test = _prepared(run, recorded)
    *_, opposite = _prepared(run, _specimens(run, -DEFOCUS))
    mean = float(data.potential.mean())
    steps = math.ceil(run.epochs * TRAIN / BATCH)

    def error(model: nn.Module, specimens: Specimens) -> float:
        return relative_error(predict(model, specimens.patterns), specimens.potential, mean)

    linear = run.once("ridge", lambda: ridge(*recorded))
    in_disc = run.once("ridge in the disc", lambda: ridge(data, validation, test))
    model = train(run, "FC-DenseNet", data, steps)
    predicted = run.once("predictions", lambda: predict(model, test.patterns).cpu())
    ours = relative_error(predicted.to(run.device), test.potential, mean)
    # Whoever only knew what crystals look like would do as well with any patterns.
    control = run.once("control", lambda: error(model, opposite))
    atoms = match(predicted, test.atoms)
    true = match(test.potential, test.atoms)

    for name, value in (
        ("mean of training", 1.0),
        ("ridge regression, patterns as recorded", linear["test"]),
        ("ridge regression, patterns within the disc", in_disc["test"]),
        ("FC-DenseNet", ours),
        ("FC-DenseNet, given patterns of the opposite defocus", control),
    ):
        run.row("reconstruction", method=name, relative_error=value)
    short = min(SHORT, steps)
    in_format: dict[str, float] = {}
    # The backward of a convolution in float16 takes fifty times as long as in float32 on a CPU.
    formats = ("fp32", "bf16", "fp16") if run.device.type == "cuda" else ("fp32", "bf16")
    for name in formats if run.backend != "none" else ():
        lower = "" if name == "fp32" else name
        lowered = train(run, f"{short} steps in {name}", data, short, lower)
        in_format[name] = run.once(
            f"error after {short} steps in {name}", partial(error, lowered, test)
        )
        run.row("formats", format=name, steps=short, relative_error=in_format[name])

    run.value("ranks", ranks)
    run.value("peaks that are atoms", atoms.precision)
    run.value("atoms found in the true potential", true.recall)
    run.require("relative error", ours, at_most=0.40)
    run.require("relative error over that of ridge regression", ours / linear["test"], at_most=0.65)
    run.require(
        "relative error over that of ridge regression within the disc",
        ours / in_disc["test"],
        at_most=1.0,
        gate=False,
    )
    run.require("relative error given the opposite defocus", control, at_least=0.95)
    run.require("atoms with a peak within 1 px", atoms.recall, at_least=0.90)
    for name in list(in_format)[1:]:
        run.require(
            f"relative error in {name} minus that in fp32, after {short} steps",
            in_format[name] - in_format["fp32"],
            at_most=0.02,
        )
    if run.first:
        draw(run.output / "figure.svg", test, predicted)


def case(device: torch.device) -> Case:
    """A training step."""
    torch.manual_seed(0)
    data = make_specimens(BATCH, torch.Generator().manual_seed(0))
    data = data.prepared(data.patterns.mean(0), 0.1).to(device)
    return Case(
        small_net().to(device),
        (data.patterns,),
        lambda predicted: huber_loss(predicted, data.potential),
    )


def _job() -> tuple[int, int]:
    """How many ranks there are, and which this is."""
    if not dist.is_initialized():
        return 1, 0
    return dist.get_world_size(), dist.get_rank()


def _specimens(run: Run, defocus: float) -> list[Specimens]:
    """For training, validation and test, as recorded; the same crystals for every defocus."""
    sizes = (TRAIN, VALIDATION, TEST)
    return [make_specimens(size, run.generator(i), defocus) for i, size in enumerate(sizes)]


def _prepared(run: Run, parts: list[Specimens]) -> list[Specimens]:
    """The same, prepared by what is known from the first of them, on the run's device."""
    centre = parts[0].patterns.mean(0)
    scale = float(parts[0].prepared(centre, 1.0).patterns.std())
    return [part.prepared(centre, scale).to(run.device) for part in parts]


WORKLOAD = Workload(
    name="materials_imaging",
    title="Crystals from electron diffraction with an FC-DenseNet, data-parallel.",
    run=run,
    case=case,
    epochs=13,
    long_epochs=60,
)

if __name__ == "__main__":
    WORKLOAD.main()
