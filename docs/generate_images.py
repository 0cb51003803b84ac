"""Write `docs/images/scaling.svg`, the chart of a simulation.

Run ``python docs/generate_images.py`` after a change to the simulator or its chart; a test holds
the picture against it. `docs/images/overlap.svg` is measured, and written by `benchmarks.ladder`.
"""

from __future__ import annotations

from pathlib import Path

from graphopt.cli.main import app

ROOT = Path(__file__).parents[1]
CHART = ROOT / "docs" / "images" / "scaling.svg"
MODEL = ROOT / "examples" / "data_parallel" / "resnet50.py"
MACHINE = ("--mesh", "dp=27600", "--cluster", "summit", "--flops", "2e13")
COMMAND = ("simulate", f"{MODEL}:make", *MACHINE)


if __name__ == "__main__":
    CHART.parent.mkdir(exist_ok=True)
    app([*COMMAND, "--chart", str(CHART)])
