"""Whether figures that were kept still hold: a few of them measured again, in about five minutes.

Run ``python -m benchmarks.check``, or ``make bench-check``. Ratios only, such as a step over
eager's, so that another machine says little. Each is compared with the one that
``benchmarks/results/`` has, and may be larger by its limit, which is wide: what is found are
regressions that a user feels, not those of a percent. Nothing is kept.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS

MINUTES = 5.0


@dataclass(frozen=True)
class Check:
    """One figure; smaller is better.

    Attributes:
        name: what it is of.
        file: the result that has it.
        place: where in the result, from the outermost key in.
        limit: how many times the kept figure the new one may be.
        measure: measures it again.
    """

    name: str
    file: str
    place: tuple[str, ...]
    limit: float
    measure: Callable[[], float]

    def kept(self, folder: Path = RESULTS) -> float | None:
        """The figure that was kept; ``None`` where none was."""
        path = folder / f"{self.file}.json"
        if not path.exists():
            return None
        found: Any = json.loads(path.read_text())["results"]
        for key in self.place:
            if key not in found:
                return None
            found = found[key]
        return float(found)


@dataclass(frozen=True)
class Verdict:
    """What a check has found.

    Attributes:
        check: the check.
        kept: the figure that was kept, if any.
        now: the figure of today, if it could be measured.
        error: why it could not.
    """

    check: Check
    kept: float | None
    now: float | None = None
    error: str = ""

    @property
    def problem(self) -> str:
        """One line where the figure does not hold, else nothing."""
        if self.error:
            return f"{self.check.name} was not measured: {self.error}"
        if self.kept is None or self.now is None or self.now <= self.check.limit * self.kept:
            return ""
        return (
            f"{self.check.name} is {self.now:.3f} and was {self.kept:.3f}: {self._times:.2f} times "
            f"as much, above the limit of {self.check.limit:.2f}"
        )

    @property
    def row(self) -> tuple[str, ...]:
        """Its line of the table."""
        kept, now = ("-" if v is None else f"{v:.3f}" for v in (self.kept, self.now))
        word = "REGRESSION" if self.problem else "holds" if self.kept is not None else "not kept"
        times = f"{self._times:.2f}" if self.kept and self.now is not None else "-"
        return self.check.name, kept, now, times, f"{self.check.limit:.2f}", word

    @property
    def _times(self) -> float:
        return (self.now or 0.0) / self.kept if self.kept else float("inf")


def run(
    checks: Iterable[Check],
    folder: Path = RESULTS,
    seconds: float = 60 * MINUTES,
    clock: Callable[[], float] = time.monotonic,
) -> list[Verdict]:
    """Measure one after the other; those for which no time is left are problems, too."""
    end = clock() + seconds
    found = []
    for check in checks:
        kept = check.kept(folder)
        if clock() >= end:
            found.append(Verdict(check, kept, error="the time was up"))
            continue
        try:
            found.append(Verdict(check, kept, check.measure()))
        except Exception as error:
            text = str(error).partition("\n")[0]
            found.append(Verdict(check, kept, error=f"{type(error).__name__}: {text}"))
    return found


def table(verdicts: Sequence[Verdict]) -> str:
    """All verdicts in columns, and a line for each problem behind them."""
    head = ("figure", "kept", "now", "times", "limit", "")
    rows = [head, *(verdict.row for verdict in verdicts)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, *(v.problem for v in verdicts if v.problem)])


def _step(name: str) -> float:
    from benchmarks.zoo_steps import measure

    return float(measure(name)["graphopt over eager"]["median"])


def _peak(name: str) -> float:
    from benchmarks.memory import measure

    found = measure(name, ["eager", "graphopt"])
    return found["graphopt"]["peak"] / found["eager"]["peak"]


def _inference() -> float:
    import torch

    import graphopt
    from benchmarks.harness import alternate, ratio
    from benchmarks.inference import SPEC
    from benchmarks.inference_models import make

    model, x = make("mobilenet_v3", 1)
    torch.set_num_threads(os.cpu_count() or 1)  # as they were kept
    try:
        ours = graphopt.optimize(copy.deepcopy(model), passes=SPEC, backend="inductor")
        with torch.no_grad():
            times = alternate({"eager": lambda: model(x), "graphopt": lambda: ours(x)}, 41)
    finally:
        torch.set_num_threads(1)
    return ratio(times, "graphopt", "eager")["median"]


def _first_call() -> float:
    from benchmarks.first_call import measured, share

    variant = "graphopt eager"
    return share(measured("resnet18", [variant], warm=1)[variant], "processor")


def _passes() -> float:
    from benchmarks.pass_time import SHARE, measure

    return measure(1)[SHARE]


def _verification() -> float:
    from benchmarks.verification import measure

    return measure("resnet", ["eager"])["eager, share of the capture"]


_OVER = ("graphopt over eager", "median")
_SHARE_OF_PASSES = "pass and verify over capture (target 0.10)"
CHECKS = (
    *(
        Check(
            f"step over eager, {n}",
            "zoo_steps_cpu",
            ("models", n, *_OVER),
            1.15,
            partial(_step, n),
        )
        for n in ("corpus resnet", "corpus vit", "MLP", "BERT")
    ),
    *(
        Check(
            f"memory over eager, {n}",
            "memory_cpu",
            (n, "peak over eager"),
            1.02,
            partial(_peak, n),
        )
        for n in ("digits ResNet", "Llama")
    ),
    Check("passes over capture", "pass_time", (_SHARE_OF_PASSES,), 2.0, _passes),
    Check(
        "verification over capture, resnet",
        "verification_cpu",
        ("resnet", "eager, share of the capture"),
        2.0,
        _verification,
    ),
    Check(
        "first call, warm over cold, resnet18",
        "first_call",
        ("eager", "resnet18", "warm over cold", "graphopt eager", "processor"),
        2.0,
        _first_call,
    ),
    Check(
        "inference over eager, mobilenet_v3",
        "inference",
        ("models", "mobilenet_v3, batch 1", "over eager", "median"),
        1.25,
        _inference,
    ),
)


def main() -> int:
    """Measure, print, and tell by the exit code."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ["XDG_CACHE_HOME"] = cache  # nothing of earlier runs
        verdicts = run(CHECKS)
    print(table(verdicts))
    return int(any(verdict.problem for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
