"""Learns to invert an operator from pairs alone, with more and more of them."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.common import COLOURS, GREY, Best, Case, Run, Workload, panels
from graphopt.examples.unknown_operator.data import Pairs, draw, signals
from graphopt.examples.unknown_operator.linear import Dense, Filter, Wiener, mean_square
from graphopt.examples.unknown_operator.model import UNet

SIZES = (8, 32, 128, 512, 2048)
BATCH = 32
CHECK = 64  # pairs of an evaluation, of validation in all
_TEST = 2048
_STEPS_PER_EPOCH = 100
_RATE = 8e-3


@torch.no_grad()
def estimate(model: nn.Module, observed: Tensor) -> Tensor:
    """In parts of one size, so that there is one graph."""
    return torch.cat([model(part) for part in torch.split(observed, CHECK)])


def train(run: Run, name: str, model: nn.Module, pairs: Pairs, validation: Pairs) -> None:
    """Minimise the squared error on ``pairs``, and keep the weights that validation likes best."""
    steps, check = _STEPS_PER_EPOCH * run.epochs, max(1, run.epochs // 3) * 10
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = Best(model)
    pairs, held = Pairs(*(t.to(run.device) for t in pairs)), validation.observed.to(run.device)

    def step(number: int) -> Tensor:
        chosen = torch.randint(len(pairs.signal), (BATCH,), generator=run.generator(number))
        chosen = chosen.to(run.device)
        optimizer.zero_grad()
        loss = F.mse_loss(model(pairs.observed[chosen]), pairs.signal[chosen])
        torch.autograd.backward(loss)
        optimizer.step()
        decay.step()
        if (number + 1) % check == 0 or number == steps - 1:
            best.offer(mean_square(estimate(model, held).cpu(), validation.signal))
        return loss.detach()

    run.loop(name, [model, optimizer, decay, best], step, steps)
    best.restore()


def run(run: Run) -> None:
    """Compare estimators on the same test pairs."""
    everything = draw("training pairs", SIZES[-1], run.generator(1))
    validation = draw("validation pairs", CHECK, run.generator(2))
    test = draw("test pairs", _TEST, run.generator(3))
    wiener = Wiener(signals(20_000, run.generator(4)))
    oracle = mean_square(wiener(test.observed), test.signal)
    identity = mean_square(test.observed, test.signal)
    torch.manual_seed(run.seed)
    start = UNet()
    model = run.optimize(UNet())
    dense, filtered, unet = [], [], []
    shown = {"f": test.signal[0, 0], "T f + noise": test.observed[0, 0]}
    for size in SIZES:
        pairs = Pairs(everything.observed[:size], everything.signal[:size])
        linear = Dense(pairs, validation)
        model.load_state_dict(start.state_dict())
        train(run, f"U-net, n = {size}", model, pairs, validation)
        found = estimate(model, test.observed.to(run.device)).cpu()
        dense.append(mean_square(linear(test.observed), test.signal))
        filtered.append(mean_square(Filter(pairs)(test.observed), test.signal))
        unet.append(mean_square(found, test.signal))
        run.row(
            "mean squared error",
            n=size,
            dense=dense[-1],
            filter=filtered[-1],
            unet=unet[-1],
            wiener=oracle,
            identity=identity,
        )
        shown["U-net"] = found[0, 0]
    shown["Wiener, T known"] = wiener(test.observed)[0, 0]
    for size, a, b in zip(SIZES, unet, dense, strict=True):
        if size <= 32:
            run.require(f"n = {size}: U-net / dense", a / b, at_most=0.7)
        if size >= 128:
            run.require(f"n = {size}: U-net / Wiener with known T", a / oracle, at_most=1.05)
    run.require(
        f"n = {SIZES[-1]}: U-net / learned filter",
        unet[-1] / filtered[-1],
        at_most=0.8,
        gate=False,
    )
    growth = max(b / a for a, b in itertools.pairwise(unet))
    run.require("U-net: largest growth of the error from one n to the next", growth, at_most=1.05)
    draw_figure(run.output / "figure.svg", dense, filtered, unet, oracle, identity, shown)


def draw_figure(
    path: Path,
    dense: list[float],
    filtered: list[float],
    unet: list[float],
    oracle: float,
    identity: float,
    shown: dict[str, Tensor],
) -> None:
    """Errors against the number of pairs, and one test signal."""
    with panels(path, 1, 2, height=3.6) as axes:
        axis = axes[0, 0]
        axis.loglog(SIZES, dense, "o-", color=COLOURS[1], label="dense linear")
        axis.loglog(SIZES, filtered, "o-", color=COLOURS[3], label="learned filter")
        axis.loglog(SIZES, unet, "o-", color=COLOURS[0], label="U-net")
        axis.axhline(oracle, color=COLOURS[2], linestyle="--", label="Wiener, T known")
        axis.axhline(identity, color=GREY, linestyle=":", label="observation itself")
        axis.set_xlabel("training pairs, n")
        axis.set_ylabel("mean squared error on test pairs")
        axis.legend(fontsize=8)
        axis = axes[0, 1]
        styles = {"f": (GREY, "-"), "T f + noise": (GREY, ":"), "U-net": (COLOURS[0], "-")}
        for name, values in shown.items():
            colour, line = styles.get(name, (COLOURS[2], "--"))
            axis.plot(values, line, color=colour, label=name, linewidth=1.3)
        axis.set_xlabel("point on the circle")
        axis.set_ylabel(f"signal; U-net of n = {SIZES[-1]}")
        axis.legend(fontsize=8)


def case(device: torch.device) -> Case:
    """A step on one minibatch."""
    torch.manual_seed(0)
    pairs = draw("pairs", BATCH, torch.Generator().manual_seed(0))
    signal = pairs.signal.to(device)
    return Case(
        UNet().to(device), (pairs.observed.to(device),), lambda found: F.mse_loss(found, signal)
    )


WORKLOAD = Workload(
    "unknown_operator",
    "U-nets that invert an operator known only from pairs.",
    run,
    case,
    epochs=8,
    long_epochs=60,
)

if __name__ == "__main__":
    WORKLOAD.main()
