"""What each step of the ladder gains over DDP's default, beside the best that DDP can be.

Run ``python -m benchmarks.ladder`` after `benchmarks.overlap`; it reads that benchmark's results,
prints a table and writes ``docs/images/overlap.svg``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bars import Bar, bar_chart

RESULTS = Path(__file__).parent / "results"
IMAGE = Path(__file__).parents[1] / "docs" / "images" / "overlap.svg"
# As `benchmarks.overlap` names them; importing it would import torch only to read a file.
RUNGS = {
    "graphopt grouping only": "graphopt, grouping",
    "graphopt": "graphopt, the default",
    "graphopt, Inductor": "graphopt, Inductor",
    "ddp best cap": "best of ten uniform caps",
    "ddp best, not compiled": "best DDP, not compiled",
    "ddp best": "best DDP",
}
# A run without one of these is left out; what is compiled takes part where it was asked for.
NEEDED = ("graphopt grouping only", "graphopt", "ddp best cap")


def ladder(results: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """Per model and link, the step over that of DDP's default, with its interval.

    Args:
        results: what `benchmarks.overlap` kept, by model and link. Runs without a rung that
            is `NEEDED` are left out.
    """
    return {
        case: [
            Bar("DDP default", 1.0, 1.0, 1.0),
            *(
                Bar(label, over["median"], over["low"], over["high"])
                for name, label in RUNGS.items()
                if (over := found["over ddp default"].get(name))
            ),
        ]
        for case, found in results.items()
        if found["over ddp default"].keys() >= set(NEEDED)
    }


def table(rungs: Mapping[str, list[Bar]]) -> str:
    """The same for a terminal."""
    lines = []
    for case, bars in rungs.items():
        lines.append(case)
        lines += [f"  {b.label:36}{b.value:7.3f} [{b.low:.3f}, {b.high:.3f}]" for b in bars]
    return "\n".join(lines)


def chart(rungs: Mapping[str, list[Bar]], about: Mapping[str, Any]) -> str:
    """The same as a picture; `about` holds date, machine and version of the measurement."""
    return bar_chart(
        "Data-parallel step, measured",
        f"two ranks of one core each, torch {about['torch']}, {about['machine'].split(',')[0]}, "
        f"{about['date'][:10]}; median of paired blocks with its 95 % interval",
        "step time over that of DDP's default (below 1 is faster)",
        rungs,
    )


def main(name: str = "overlap") -> None:
    record = json.loads((RESULTS / f"{name}.json").read_text())
    rungs = ladder(record["results"])
    if not rungs:
        missing = NEEDED[0]
        raise SystemExit(
            f"no run in {name}.json has the variant {missing!r}; repeat benchmarks.overlap"
        )
    print(table(rungs))
    IMAGE.parent.mkdir(exist_ok=True)
    IMAGE.write_text(chart(rungs, record))


if __name__ == "__main__":
    main(*sys.argv[1:])
