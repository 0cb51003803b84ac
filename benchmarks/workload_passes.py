"""What passes do to the scientific workloads: grouping, precision and K-FAC, a row each.

- Grouping: FC-DenseNet of `materials_imaging` on two ranks over a limited link, against DDP.
- Precision: the same network and Tiramisu in bfloat16, against `torch.autocast`.
- K-FAC: the U-net of `unknown_operator` against SGD and AdamW, all tuned by the same budget.

Run ``python -m benchmarks.workload_passes [grouping|precision|kfac ...]`` on an otherwise idle
machine (half an hour); the results go to ``benchmarks/results/workload_passes.json``, and
rows that were not asked for stay.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from benchmarks import convergence, overlap
from benchmarks.harness import RESULTS, alternate, keep, milliseconds, ratio
from benchmarks.precision_step import saved
from examples.kfac_digits.comparison import ADAMW, KFAC, SGD_MOMENTUM, Batch, Task
from graphopt.examples.climate_segmentation import train as climate
from graphopt.examples.common import Case
from graphopt.examples.materials_imaging import train as materials
from graphopt.examples.unknown_operator import train as operator
from graphopt.examples.unknown_operator.data import draw
from graphopt.examples.unknown_operator.model import UNet

NAME = "workload_passes"
RATES_OF_LINK = (0.3, 1.0)  # Gbit/s each way
ROUNDS = 15
PAIRS = 512


def grouping() -> dict[str, Any]:
    """Steps of two ranks at two rates of the link."""
    options = argparse.Namespace(blocks=20, steps=3, without_graphopt=False)
    found = {}
    for rate in RATES_OF_LINK:
        result = overlap.measure("fc_densenet", rate, 120.0, options)
        overlap.show("fc_densenet", result)
        found[f"{rate:g} Gbit/s"] = result
    return found


def precision() -> dict[str, Any]:
    """Steps and saved bytes in bfloat16."""
    device = torch.device("cpu")
    cases = {"FC-DenseNet": materials.case(device), "Tiramisu": climate.case(device)}
    return {name: _in_bfloat16(case) for name, case in cases.items()}


def _in_bfloat16(case: Case) -> dict[str, Any]:
    lowered = {
        "precision": "cleanup,precision",
        "all lowered": "cleanup,precision{cost=roofline}",
    }
    models = {"float32": copy.deepcopy(case.model), "autocast": copy.deepcopy(case.model)} | {
        name: graphopt.optimize(copy.deepcopy(case.model), passes=spec, backend="eager")
        for name, spec in lowered.items()
    }

    def step(name: str, model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            loss = case.loss(model(*case.inputs))
        loss.backward()

    steps = {name: (lambda n=name, m=model: step(n, m)) for name, model in models.items()}
    times = alternate(steps, ROUNDS)
    return {
        "milliseconds": milliseconds(times),
        "precision over float32": ratio(times, "precision", "float32"),
        "precision over autocast": ratio(times, "precision", "autocast"),
        "all lowered over autocast": ratio(times, "all lowered", "autocast"),
        "saved bytes": {name: saved(step) for name, step in steps.items()},
    }


def kfac() -> dict[str, Any]:
    """Steps and seconds of the U-net to a test error of two thirds of the Wiener filter's."""
    task = _operator()
    rates = {
        SGD_MOMENTUM: (0.01, 0.03, 0.1, 0.3, 1.0),
        ADAMW: (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
        KFAC: (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),  # see its damping
    }
    torch.set_num_threads(1)
    found: dict[str, Any] = convergence.measure(task, rates, (100, 101), (0, 1, 2, 3, 4))
    print(convergence.table({task.name: found}))
    return found


def _operator() -> Task:
    pairs = draw("training pairs", PAIRS, torch.Generator().manual_seed(1))
    test = draw("test pairs", 1024, torch.Generator().manual_seed(3))

    def batches(seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(PAIRS, (operator.BATCH,), generator=generator)
            yield pairs.observed[chosen], pairs.signal[chosen]

    return Task(
        name="unknown operator",
        model=UNet,
        batches=batches,
        loss=F.mse_loss,
        evaluate=lambda m: float(F.mse_loss(operator.estimate(m, test.observed), test.signal)),
        target=0.010,
        rising=False,
        steps=600,
        every=10,
        # The loss is a mean over the points of a signal; see `examples.kfac_language_model`.
        kfac=f"cleanup,kfac{{damping={1e-3 / test.signal.shape[-1]}}}",
        rates={},
    )


def main() -> None:
    """Measure what was asked for."""
    rows = {"grouping": grouping, "precision": precision, "kfac": kfac}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(rows))
    options = parser.parse_args()
    if unknown := set(options.rows) - set(rows):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}")
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in options.rows or rows:
        start = time.monotonic()
        results[name] = rows[name]()
        print(name, json.dumps(results[name], indent=1) if name != "kfac" else "")
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
        keep(NAME, results)


if __name__ == "__main__":
    main()
