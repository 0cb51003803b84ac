"""Four uses of deep learning in imaging, on the operator of the training and on new ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.inverse_imaging.classical import plug_and_play, psnr, smoothed
from graphopt.examples.inverse_imaging.data import (
    HELD_OUT,
    SIZE,
    TEST,
    TRAIN,
    Operator,
    draw_operator,
    load_pictures,
    measure,
)
from graphopt.examples.inverse_imaging.figure import draw
from graphopt.examples.inverse_imaging.model import (
    BackProjectionUNet,
    DeepImagePrior,
    Denoiser,
    MoDL,
)

BATCH = 8
NEW = 3
STREAM = 10**6  # of random numbers, behind those of the steps
DENOISED = 0.05  # deviation of the noise that the denoiser of plug-and-play removes
PRIOR_CROPS, PRIOR_STEPS = 5, 200
SMOOTHING = (0.01, 0.03, 0.1, 0.3)
COUPLING = (0.01, 0.03, 0.1, 0.3)
# The axes of the taxonomy, by method.
USES = {
    name: {"A in training": training, "A at test": test, "learns from": pictures}
    for name, training, test, pictures in (
        ("smoothing", "no", "yes", "nothing"),
        ("U-Net", "yes", "A^T only", "pictures, observations"),
        ("MoDL", "yes", "yes", "pictures, observations"),
        ("plug-and-play", "no", "yes", "pictures"),
        ("deep image prior", "no", "yes", "the observation"),
    )
}


@dataclass(frozen=True)
class Data:
    """Pictures, operators and observations of a run.

    Attributes:
        train: crops (crops, 1, 32, 32).
        held_out: crops of other pictures, for choices.
        test: crops of other pictures again.
        operators: that of the training, then new ones.
        seen: observations of ``test``, one batch per operator.
        held_out_seen: observations of ``held_out`` by the first operator.
    """

    train: Tensor
    held_out: Tensor
    test: Tensor
    operators: list[Operator]
    seen: list[Tensor]
    held_out_seen: Tensor


def load(run: Run) -> Data:
    """Operators and noise follow the seed; pictures and their split do not."""
    generator = run.generator(STREAM)
    parts = (load_pictures(TRAIN, 60), load_pictures(HELD_OUT, 12), load_pictures(TEST, 8))
    train, held_out, test = (part.to(run.device) for part in parts)
    operators = [draw_operator(generator).to(run.device) for _ in range(1 + NEW)]
    seen = [measure(test, operator, generator) for operator in operators]
    held_out_seen = measure(held_out, operators[0], generator)
    return Data(train, held_out, test, operators, seen, held_out_seen)


def batch(run: Run, data: Data, step: int) -> tuple[Tensor, torch.Generator]:
    """Crops of a step, randomly mirrored, and the generator for its noise."""
    generator = run.generator(step)
    rows = torch.randint(len(data.train), (BATCH,), generator=generator)
    across, down = torch.randint(2, (2,), generator=generator).tolist()
    axes = [axis for axis, flipped in ((2, down), (3, across)) if flipped]
    return data.train[rows.to(run.device)].flip(axes), generator


def train_reconstruction(run: Run, name: str, model: nn.Module, data: Data, steps: int) -> None:
    """Supervised: observations by the first operator, squared error of the picture."""
    run.optimize(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(step: int) -> Tensor:
        x, generator = batch(run, data, step)
        operator = data.operators[0]
        return F.mse_loss(model(measure(x, operator, generator), *operator), x)

    run.fit(name, model, optimizer, loss, steps, scheduler=scheduler, clip=1.0)


def train_denoiser(run: Run, model: nn.Module, data: Data, steps: int) -> None:
    """On pictures with white noise; no operator enters."""
    run.optimize(model)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def loss(step: int) -> Tensor:
        x, generator = batch(run, data, step)
        noise = torch.randn(x.shape, generator=generator).to(run.device)
        return F.mse_loss(model(x + DENOISED * noise), x)

    run.fit("denoiser", model, optimizer, loss, steps, scheduler=scheduler)


class PriorFits:
    """Deep image prior: one network, started anew for each observation.

    Args:
        run: whose device and seed are used.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._model = DeepImagePrior()
        self._z = 0.1 * torch.rand(1, 16, SIZE, SIZE, generator=run.generator(STREAM + 1)).to(
            run.device
        )
        run.optimize(self._model)
        self._start = {k: v.clone() for k, v in self._model.state_dict().items()}

    def __call__(self, name: str, y: Tensor, operator: Operator) -> Tensor:
        """The picture (1, 1, 32, 32) for one observation of that shape."""
        self._model.load_state_dict(self._start)
        optimizer = torch.optim.Adam(self._model.parameters(), 3e-3)

        def loss(_: int) -> Tensor:
            seen: Tensor = self._model(self._z, *operator)
            return (seen - y).square().sum() / operator.mask.sum()

        self._run.fit(name, self._model, optimizer, loss, PRIOR_STEPS)
        with torch.no_grad():
            return self._model.picture(self._z)


def main(run: Run) -> None:
    """Train, reconstruct everything, compare, draw."""
    torch.manual_seed(run.seed)  # also when resumed, so that networks start as they did
    data = load(run)
    unet, denoiser = BackProjectionUNet(16), Denoiser(16)
    train_denoiser(run, denoiser, data, 150 * run.epochs)
    modl = MoDL(Denoiser(16))
    modl.denoiser.load_state_dict(denoiser.state_dict())  # goes on from where plug-and-play is
    train_reconstruction(run, "MoDL", modl, data, 60 * run.epochs)
    train_reconstruction(run, "U-Net", unet, data, 100 * run.epochs)

    def plugged(y: Tensor, operator: Operator, rho: float) -> Tensor:
        start = smoothed(y, *operator, smoothing)
        return plug_and_play(y, *operator, denoiser, rho, start=start)

    def score(found: Tensor) -> float:
        return float(psnr(found, data.held_out).mean())

    trained, seen = data.operators[0], data.held_out_seen
    smoothing = max(SMOOTHING, key=lambda weight: score(smoothed(seen, *trained, weight)))
    rho = max(COUPLING, key=lambda weight: score(plugged(seen, trained, weight)))
    run.value("MoDL lambda", float(modl.log_weight.detach().exp()))
    run.value("smoothing weight", smoothing)
    run.value("plug-and-play rho", rho)
    with torch.no_grad():
        found = {
            "smoothing": [smoothed(y, *a, smoothing) for y, a in _seen(data)],
            "U-Net": [unet(y, *a) for y, a in _seen(data)],
            "MoDL": [modl(y, *a) for y, a in _seen(data)],
            "plug-and-play": [plugged(y, a, rho) for y, a in _seen(data)],
        }
    rows = shown_rows(data)
    shown = {name: [p[rows] for p in pictures[:2]] for name, pictures in found.items()}
    shown["deep image prior"] = fit_priors(run, data, rows)
    report(run, data, found, shown)
    draw(run.output / "figure.svg", data.test[rows], [y[rows] for y in data.seen[:2]], shown)


def fit_priors(run: Run, data: Data, rows: list[int]) -> list[Tensor]:
    """Test crops ``rows`` from their observations by the first two operators."""
    fits = PriorFits(run)
    found = []
    for number, (y, operator) in enumerate(_seen(data)[:2]):
        pictures = [
            fits(f"deep image prior {number} {row}", y[row : row + 1], operator) for row in rows
        ]
        found.append(torch.cat(pictures))
    return found


def report(
    run: Run, data: Data, found: dict[str, list[Tensor]], shown: dict[str, list[Tensor]]
) -> None:
    """The table of the taxonomy, and what is required of it.

    Args:
        run: to record in.
        data: with the true pictures.
        found: all test crops by method and operator.
        shown: some of them by method, and for the first two operators.
    """
    trained: dict[str, float] = {}
    lost: dict[str, float] = {}
    for name, pictures in found.items():
        trained[name], *new = (float(psnr(p, data.test).mean()) for p in pictures)
        lost[name] = trained[name] - sum(new) / len(new)
        columns = {"trained A": trained[name], f"{NEW} new A": sum(new) / len(new)}
        run.row(f"PSNR in dB, {len(data.test)} crops", method=name, **columns, lost=lost[name])
    truth = data.test[shown_rows(data)]
    for name, pictures in shown.items():
        first, second = (float(psnr(p, truth).mean()) for p in pictures)
        columns = {"trained A": first, "new A": second}
        run.row(f"PSNR in dB, {len(truth)} crops", method=name, **USES[name], **columns)
    run.require("trained A: MoDL - U-Net, dB", trained["MoDL"] - trained["U-Net"], at_least=0.0)
    run.require("new A: MoDL loses, dB", lost["MoDL"], at_most=1.0)
    run.require("new A: plug-and-play loses, dB", lost["plug-and-play"], at_most=1.0)
    run.require("new A: U-Net loses, dB", lost["U-Net"], at_least=3.0)
    gain = trained["MoDL"] - trained["smoothing"]
    run.require("trained A: MoDL - smoothing, dB", gain, at_least=0.5, gate=False)


def shown_rows(data: Data) -> list[int]:
    """Test crops for the deep image prior and the figure, evenly spaced."""
    step = (len(data.test) - 1) / (PRIOR_CROPS - 1)
    return [round(step * place) for place in range(PRIOR_CROPS)]


def _seen(data: Data) -> list[tuple[Tensor, Operator]]:
    return list(zip(data.seen, data.operators, strict=True))


def case(device: torch.device) -> Case:
    """A MoDL step: five unrolled steps with conjugate gradients in each."""
    generator = torch.Generator().manual_seed(0)
    operator = draw_operator(generator).to(device)
    x = load_pictures(TRAIN[:1], BATCH).to(device)
    torch.manual_seed(0)
    model = MoDL(Denoiser(16)).to(device)
    inputs = (measure(x, operator, generator), *operator)
    return Case(model, inputs, lambda found: F.mse_loss(found, x))


WORKLOAD = Workload(
    name="inverse_imaging",
    title="U-Net, MoDL, plug-and-play and deep image prior, on trained and on new operators.",
    run=main,
    case=case,
    epochs=10,
    long_epochs=200,
)

if __name__ == "__main__":
    WORKLOAD.main()
