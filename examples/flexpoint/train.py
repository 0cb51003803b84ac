"""Train an AlexNet, a ResNet or a Wasserstein GAN in one or more number formats.

The networks are small and the images come with scikit-learn; nothing is downloaded. A training is
the same in each format, hyperparameters included: only the passes differ.
Run: ``python -m examples.flexpoint.train --model resnet --format flex16+5``; see ``--help``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs from any folder

from examples.flexpoint.classify import ALEXNET, RESNET, Classifier, Run
from examples.flexpoint.formats import ALL, CONTROLS, FORMATS
from examples.flexpoint.gan import Gan

TASKS: dict[str, Classifier | Gan] = {"alexnet": ALEXNET, "resnet": RESNET, "gan": Gan()}
DEFAULT = ("fp32", "flex16+5")


def line(format: str, run: Run) -> str:
    """One training for a terminal."""
    test = ", ".join(f"{name} {value:.4f}" for name, value in run.test.items())
    words = f"{format:<17} loss {run.loss:.5f}   test: {test}   {run.seconds:.1f} s"
    if run.flex:
        words += (
            f"   {run.flex['bits']:.1f} bits in use, {run.flex['saturated']:.1e} of elements "
            f"saturated, in {run.flex['overflows']:.2%} of tensors and steps"
        )
    return words


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=TASKS, default="alexnet")
    parser.add_argument(
        "--format", choices=ALL, action="append", help=f"default: {' and '.join(DEFAULT)}"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many")
    parser.add_argument("--explain", action="store_true", help="say what the passes have done")
    chosen = parser.parse_args(arguments)
    task = TASKS[chosen.model]
    for format in chosen.format or DEFAULT:
        run = task.train(format, chosen.seed, chosen.steps)
        print(line(format, run), flush=True)
        if chosen.explain:
            for model in run.models:
                print(model.explain())


__all__ = ["ALL", "CONTROLS", "FORMATS", "TASKS", "line", "main"]

if __name__ == "__main__":
    main()
