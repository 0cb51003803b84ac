"""Hold the network models against published runs: fit some points, predict the others.

Run ``python -m benchmarks.simulator_holdouts``; the result goes to
``benchmarks/results/simulator_holdouts.json``. Hold-outs are published figures that no parameter
saw. The predictions at the end are those of `benchmarks.simulator_predictions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from math import ceil, log, sqrt
from typing import Any, NamedTuple

from benchmarks.simulator_predictions import ASSUMED as ASSUMED_AT_SCALE
from benchmarks.simulator_predictions import BACKWARD, predictions, tensor_cost_of
from benchmarks.simulator_profiles import NETWORKS
from graphopt.network.straggler import expected_maximum
from graphopt.plan.grouping import Ready

MIB = 1 << 20
Cost = Callable[[float], float]

HOROVOD_RATE = {"Inception-V3": 134.4, "ResNet-101": 119.4, "VGG-16": 130.9}  # one GPU, images/s
HOROVOD = {"Inception-V3": 0.90, "ResNet-101": 0.90, "VGG-16": 0.68}  # efficiency at 512 GPUs
CORI = dict(zip((1 << k for k in range(11)),
                (1, 0.979, 0.978, 0.970, 0.968, 0.959, 0.943, 0.939, 0.934, 0.931, 0.916),
                strict=True))  # fmt: skip
# Seconds: compute, exposed communication of WFBP (one message per gradient) and of MG-WFBP.
ASC = {
    "ResNet-152": (0.274, 0.682, 0.436),
    "DenseNet-201": (0.219, 0.559, 0.156),
    "Inception-v4": (0.189, 0.529, 0.320),
    "BERT-Base": (0.305, 0.705, 0.757),
}
ASSUMED = {
    "all": (
        "backward is 2/3 of the step, and a layer takes the share of its multiply-adds",
        "gradients are fp32, and their shapes are those of the published architectures",
    ),
    "Horovod": (
        "64 images per GPU",
        "4 GPUs per node share one 25 Gbit/s link, used at 92 %, in a ring",
        "64 MiB fusion buffer and a cycle of 5 ms",
        "no stragglers: the start-up cost of a message takes all that is left",
    ),
    "Cori": (
        "communication is hidden (lag 1), so ranks lose time to the slowest one only;"
        " lag and machine are inferred from the scripts beside the table",
    ),
    "ASC": (
        "a message per parameter tensor",
        "8 or 32 nodes (the source is unclear) and a ring at the measured 9.43 Gbit/s",
    ),
    **ASSUMED_AT_SCALE,
}


class Row(NamedTuple):
    """One line of the table; `error` is predicted less published."""

    experiment: str
    case: str
    role: str
    published: float
    predicted: float
    note: str = ""

    @property
    def error(self) -> float:
        return self.predicted - self.published


def fused(ready: Sequence[Ready], cost: Cost, cap: float = 64 * MIB, cycle: float = 5e-3) -> float:
    """When Horovod is done: in each cycle, what is ready goes as one message of up to `cap`."""
    free, index = 0.0, 0
    while index < len(ready):
        start = ceil(max(free, ready[index].seconds) / cycle - 1e-9) * cycle
        size = ready[index].bytes
        index += 1
        while (
            index < len(ready)
            and ready[index].seconds <= start
            and size + ready[index].bytes <= cap
        ):
            size += ready[index].bytes
            index += 1
        free = start + cost(size)
    return free


def each(ready: Iterable[Ready], cost: Cost) -> float:
    """When WFBP is done: every gradient is a message of its own."""
    free = 0.0
    for one in ready:
        free = max(free, one.seconds) + cost(one.bytes)
    return free


def merged(ready: Sequence[Ready], cost: Cost) -> float:
    """When MG-WFBP is done: a gradient waits for the next if that saves more than it costs."""
    free, size, startup = 0.0, 0.0, cost(0)
    for index, one in enumerate(ready):
        size += one.bytes
        start = max(free, one.seconds)
        end = start + cost(size)
        if index + 1 < len(ready):
            following = ready[index + 1].seconds
            if following < end and (start > following or following - start < startup):
                continue
        free, size = end, 0.0
    return free


def affine(a: float, b: float) -> Cost:
    return lambda size: a + b * size


def grid(low: float, high: float, count: int) -> list[float]:
    """`count` values from `low` to `high`, evenly by logarithm."""
    return [low * (high / low) ** (k / (count - 1)) for k in range(count)]


def horovod() -> tuple[list[Row], dict[str, Any]]:
    """Fit the link on Inception-V3 and ResNet-101, and predict VGG-16, at 512 GPUs."""
    steps = {name: 64 / rate for name, rate in HOROVOD_RATE.items()}
    ready = {name: NETWORKS[name]().ready(BACKWARD * step) for name, step in steps.items()}
    fitted = ("Inception-V3", "ResNet-101")

    def efficiency(name: str, link: tuple[float, float]) -> float:
        step = steps[name]
        finish = fused(ready[name], affine(*link))
        return step / ((1 - BACKWARD) * step + max(BACKWARD * step, finish))

    def loss(link: tuple[float, float]) -> float:
        return sum((efficiency(name, link) - HOROVOD[name]) ** 2 for name in fitted)

    line = 2 * 511 / 512 / (0.92 * 25e9 / 8)
    links = list(product(grid(1e-4, 0.1, 40), grid(2e-10, 3e-9, 40)))
    ways = {
        "a fitted, b from the line rate": min(((a, line) for a in grid(1e-4, 0.1, 300)), key=loss),
        "a and b fitted": min(links, key=loss),
    }
    rows = []
    for way, link in ways.items():
        for name, published in HOROVOD.items():
            role = "fit" if name in fitted else "hold-out"
            rows.append(Row("Horovod 512", name, role, published, efficiency(name, link), way))
    valley = [efficiency("VGG-16", link) for link in links if loss(link) < 2 * 0.01**2]
    facts = {
        "links": ways,
        "VGG-16 over all (a, b) that fit within a point": (min(valley), max(valley)),
    }
    return rows, facts


def asymptotic_maximum(ranks: int) -> float:
    """The bound that `expected_maximum` slowly approaches from below."""
    return sqrt(2 * log(ranks))


def cori() -> tuple[list[Row], dict[str, Any]]:
    """Fit the jitter of a step up to 64 ranks, and predict up to 1,024."""
    rows, facts = [], {}
    for way, maximum in (("exact", expected_maximum), ("sqrt(2 ln P)", asymptotic_maximum)):
        seen = [(maximum(p), 1 / e - 1) for p, e in CORI.items() if 1 < p <= 64]
        sigma = sum(m * loss for m, loss in seen) / sum(m * m for m, _ in seen)
        facts[f"sigma / step, {way}"] = sigma
        rows += [
            Row(
                "Cori",
                f"{p} ranks",
                "fit" if p <= 64 else "hold-out",
                e,
                1 / (1 + sigma * maximum(p)),
                way,
            )
            for p, e in CORI.items()
            if p > 1
        ]
    return rows, facts


def asc() -> tuple[list[Row], dict[str, Any]]:
    """Fit the link on two convolutional networks, and predict the others and BERT's inversion."""
    ready = {n: NETWORKS[n]().ready(BACKWARD * times[0]) for n, times in ASC.items()}
    fitted = ("ResNet-152", "DenseNet-201")
    rules = ((each, 1, "WFBP"), (merged, 2, "MG-WFBP"))

    def exposed(name: str, rule: Callable[..., float], link: tuple[float, float]) -> float:
        return max(0.0, rule(ready[name], affine(*link)) - BACKWARD * ASC[name][0])

    def loss(link: tuple[float, float]) -> float:
        return sum(
            (exposed(name, rule, link) - ASC[name][column]) ** 2
            for name in fitted
            for rule, column, _ in rules
        )

    starts = grid(5e-5, 5e-3, 40)
    ways = {
        f"a fitted, b from the line rate, {p} nodes": min(
            ((a, 2 * (p - 1) / p / (9.43e9 / 8)) for a in starts), key=loss
        )
        for p in (8, 32)
    }
    ways["a and b fitted"] = min(product(starts, grid(2e-10, 4e-9, 40)), key=loss)
    rows, inverted = [], {}
    for way, link in ways.items():
        for name, (rule, column, label) in product(ASC, rules):
            role = "fit" if name in fitted else "hold-out"
            value = exposed(name, rule, link)
            rows.append(Row("ASC", f"{name} {label}", role, ASC[name][column], value, way))
        inverted[way] = exposed("BERT-Base", merged, link) > exposed("BERT-Base", each, link)
    line = 2 * 31 / 32 / (9.43e9 / 8)
    below = [
        a
        for a in grid(1e-6, 5e-3, 60)
        if exposed("BERT-Base", merged, (a, line)) > exposed("BERT-Base", each, (a, line))
    ]
    facts = {
        "links": ways,
        "MG-WFBP behind WFBP on BERT": inverted,
        "a (1 us to 5 ms) for which it would be, line rate of 32 nodes": (min(below), max(below))
        if below
        else None,
    }
    return rows, facts


def compute() -> dict[str, Any]:
    """Everything: rows of the table, what was fitted, predictions and assumptions."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    for name, experiment in (("Horovod", horovod), ("Cori", cori), ("ASC", asc)):
        more, facts[name] = experiment()
        rows += more
    jitter = facts["Cori"]["sigma / step, exact"]
    facts["2x at 6,000"] = {
        "us per tensor and rank at the coordinator that would give it": 1e6 * tensor_cost_of(2.0)
    }
    return {
        "rows": rows,
        "fitted": facts,
        "predictions": predictions(jitter),
        "assumed": ASSUMED,
    }


def main() -> None:
    from benchmarks.harness import keep

    results = compute()
    print(f"{'experiment':12} {'case':22} {'role':9} {'publ.':>6} {'pred.':>6} {'error':>7}  how")
    for row in results["rows"]:
        print(
            f"{row.experiment:12} {row.case:22} {row.role:9} {row.published:6.3f} "
            f"{row.predicted:6.3f} {row.error:+7.3f}  {row.note}"
        )
    for name, facts in results["fitted"].items():
        for key, value in facts.items():
            print(f"{name}: {key}: {value}")
    print("\nPredictions, not fitted, on assumed inputs:")
    for one in results["predictions"]:
        low, high = one["band"]
        print(
            f"{one['case']}, {one['world']:,} GPUs, {one['figure']}: {one['predicted']:.3f} "
            f"({low:.3f} to {high:.3f}), published {one['published']}, error {one['error']:+.3f}; "
            f"assumed {one['assumed']}"
        )
    for name, lines in ASSUMED.items():
        print(f"assumed ({name}): {'; '.join(lines)}")
    rows = [{**row._asdict(), "error": row.error} for row in results["rows"]]
    print(keep("simulator_holdouts", {**results, "rows": rows}))


if __name__ == "__main__":
    main()
