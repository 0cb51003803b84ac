"""Inference of models that nobody tuned for, beside `torch.compile` in three settings.

Run ``python -m benchmarks.inference [--warm] [MODEL[:BATCH] ...]`` on an otherwise idle machine.
Without models, all those of `benchmarks.inference_models`, with a batch of 1 and of 4. Each of them
adds its entry to ``results/inference.json``. With ``--warm`` code is generated and nothing is kept,
so that the next run finds it on the disk.

Target: over `torch.compile` a median of at most 0.85, and no model above 1.00.
"""

from __future__ import annotations

import copy
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.harness import RESULTS, alternate, keep, milliseconds, ratio
from benchmarks.inference_models import CNNS, TRANSFORMERS, make

SPEC = "cleanup,fold_inference"
BATCHES = (1, 4)
SECONDS = 12.0
NAME = "inference"

PEERS: dict[str, Callable[[nn.Module], Any]] = {
    "compile": torch.compile,
    "max-autotune": lambda model: torch.compile(model, mode="max-autotune"),
    "freezing": lambda model: torch.compile(model, options={"freezing": True}),
}


def variants(model: nn.Module) -> dict[str, Any]:
    """Everything that is measured."""
    found: dict[str, Any] = {"eager": model}
    found |= {name: peer(copy.deepcopy(model)) for name, peer in PEERS.items()}
    found["graphopt"] = graphopt.optimize(copy.deepcopy(model), passes=SPEC, backend="inductor")
    return found


def measure(name: str, batch: int, is_warm_up: bool) -> dict[str, object]:
    """One model and batch."""
    torch._dynamo.reset()
    model, x = make(name, batch)
    made = variants(model)
    with torch.no_grad():
        expected: Tensor = model(x)
        different = {n: _difference(run(x), expected) for n, run in made.items() if n != "eager"}
        if is_warm_up:
            return {"difference from eager": different}
        once = alternate({n: (lambda run=run: run(x)) for n, run in made.items()}, 3, warmup=1)
        taken = sum(statistics.median(values) for values in once.values())
        rounds = max(9, min(101, int(SECONDS / taken)))
        times = alternate({n: (lambda run=run: run(x)) for n, run in made.items()}, rounds, 2)
    best = min(PEERS, key=lambda peer: statistics.median(times[peer]))
    result: dict[str, object] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "rounds": rounds,
        "milliseconds": milliseconds(times),
        **_form(made["graphopt"]),
        "difference from eager": different,
        "best peer": best,
    }
    for peer in ("eager", *PEERS):
        result[f"over {peer}"] = ratio(times, "graphopt", peer)
    return result


def _difference(result: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest value."""
    return float((result - expected).abs().max() / expected.abs().max())


def _form(model: nn.Module) -> dict[str, object]:
    """Which of its forms graphopt runs, and what each of them took when it chose."""
    from graphopt.model.surface import controller_of

    controller = controller_of(model)
    assert controller is not None
    run = controller.variants[0].engine._forward._run  # type: ignore[attr-defined]
    seconds = getattr(run, "seconds", {})
    forms = {name: round(1e3 * value, 3) for name, value in seconds.items()}
    return {"runs": str(getattr(run, "choice", "plain")), "milliseconds of forms": forms}


def main(chosen: list[str]) -> None:
    """Measure these models."""
    is_warm_up = "--warm" in chosen
    names = [name for name in chosen if name != "--warm"] or [*CNNS, *TRANSFORMERS]
    for text in names:
        name, _, given = text.partition(":")
        for batch in [int(given)] if given else BATCHES:
            result = measure(name, batch, is_warm_up)
            print(name, batch, json.dumps(result, indent=1), flush=True)
            if not is_warm_up:
                _add(f"{name}, batch {batch}", result)


def _add(name: str, result: dict[str, object]) -> None:
    file = RESULTS / f"{NAME}.json"
    known = json.loads(file.read_text())["results"]["models"] if file.exists() else {}
    known[name] = result
    ratios = [entry["over compile"]["median"] for entry in known.values()]
    summary = {
        "models": len(known),
        "median over compile (target 0.85)": round(statistics.median(ratios), 4),
        "worst over compile (target 1.00)": max(ratios),
    }
    for peer in ("eager", "max-autotune", "freezing"):
        values = [entry[f"over {peer}"]["median"] for entry in known.values()]
        summary[f"median over {peer}"] = round(statistics.median(values), 4)
    keep(NAME, {"summary": summary, "models": known})


if __name__ == "__main__":
    main(sys.argv[1:])
