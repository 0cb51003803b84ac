"""The slowest stage over the proven optimum: graphopt's stages and those of known heuristics.

Graphs are captured from real models; times are the roofline of an assumed GPU, so nothing is
measured here but the time that solving takes. "Compute" is the slowest stage by its computation
alone (transfers are free). With a link of 100 Gbit/s Ethernet, the slowest is a stage or a link
where transfers are overlapped, and a stage with the transfers that it waits for where they are
not. Every method cuts with the same costs; only the exact search and PipeDream's rule look at
transfers, and that rule knows the overlapped ones only.

Run ``python -m benchmarks.partition_quality``; the result goes to
``benchmarks/results/partition_quality.json``.
"""

from __future__ import annotations

import time

from benchmarks.harness import keep
from benchmarks.partition_models import models
from graphopt.analysis.gradient_order import ASSUMED
from graphopt.capture import capture
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.baselines import baselines
from graphopt.partitioning.downsets import downsets
from graphopt.partitioning.from_graph import from_graph
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Link, Problem

STAGES = (2, 4, 8)
ETHERNET = Link(seconds_per_byte=8 / 100e9, latency=5e-6)
SETTINGS = {
    "compute": (Link(), Objective(overlap=True)),
    "overlapped link": (ETHERNET, Objective(overlap=True)),
    "awaited link": (ETHERNET, Objective(overlap=False)),
}


def main() -> None:
    results: dict[str, object] = {}
    for name, (model, x) in models().items():
        graph = capture(model, (x,)).graph
        row: dict[str, object] = {}
        for setting, (link, objective) in SETTINGS.items():
            started = time.perf_counter()
            problem = from_graph(graph, device=ASSUMED["cuda"], link=link)
            atoms = atoms_of(problem)
            found = downsets(atoms)
            row["operators"] = len(problem.operators)
            row["that can be separated"] = len(atoms)
            row["downsets"] = None if found is None else len(found)
            row["reading seconds"] = round(time.perf_counter() - started, 3)
            row[setting] = {str(k): _compared(problem, k, objective) for k in STAGES}
        results[name] = row
        print(name, row)
    print("kept in", keep("partition_quality", results).name)


def _compared(problem: Problem, stages: int, objective: Objective) -> dict[str, object]:
    ours = plan(problem, stages, objective)
    certificate = ours.certificate
    assert certificate is not None
    best = certificate.lower
    ratios = {"graphopt": ours.value / best}
    for name, partition in baselines(problem, stages, objective).items():
        ratios[name] = partition.value / best
    return {
        "proven optimum, microseconds": round(1e6 * best, 2),
        "proof": certificate.proof,
        "solve seconds": round(ours.solve_seconds, 3),
        "over the optimum": {name: round(ratio, 4) for name, ratio in ratios.items()},
    }


if __name__ == "__main__":
    main()
