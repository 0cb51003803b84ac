"""Overlap of backward and gradient reduction: graphopt against DDP over a rate-limited link.

Two ranks, one core and one thread each, over a link that `benchmarks.link` makes. Each pair of
processes holds all variants; blocks of steps alternate in random order, and a block counts with the
median of its steps. Ratios are medians of paired blocks with bootstrap intervals. Run
``python -m benchmarks.overlap --models mlp,densenet --rates 1 --minutes 5`` on an idle machine; the
results go to ``benchmarks/results/overlap.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import keep, milliseconds, ratio
from benchmarks.link import Link, link
from benchmarks.overlap_models import MODELS
from benchmarks.overlap_variants import CAPS, DEFAULT, GRAPHOPT, PLAIN, cap_name
from benchmarks.overlap_worker import MIN_BLOCKS, WORLD, Config, write

ROOT = Path(__file__).parents[1]
BEST = "ddp best cap"


def measure(model: str, rate: float, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    """Run one pair of ranks and return what was found."""
    began = time.time()
    with tempfile.TemporaryDirectory() as folder, link(rate) as way:
        config = Config(
            model=model,
            folder=folder,
            until=began + seconds,
            blocks=options.blocks,
            steps=options.steps,
            graphopt=not options.without_graphopt,
        )
        _supervise(config, way, began + 2 * seconds + 120)
        ranks = [json.loads((Path(folder) / f"rank{r}.json").read_text()) for r in range(WORLD)]
    return {"link": str(way), "seconds": round(time.time() - began, 1), **summary(ranks)}


def summary(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, ratios, exposed time and agreement of the gradients."""
    first = ranks[0]
    times = {
        name: [statistics.median(block) for block in blocks]
        for name, blocks in first["times"].items()
    }
    names = [n for n in times if n != PLAIN]
    ms = milliseconds(times)
    result: dict[str, Any] = {
        "blocks": len(times[PLAIN]),
        "steps per block": first["steps"],
        "one core per rank": first["own core"],
        "milliseconds": ms,
        "messages": {n: first["buckets"][n] for n in names},
        "exposed ms": {n: round(_exposed(times, n), 2) for n in names},
        "over ddp default": {n: ratio(times, n, DEFAULT) for n in names if n != DEFAULT},
        "best cap by median": min((cap_name(c) for c in CAPS), key=lambda n: ms[n]),
        "equal gradients on all ranks": all(
            ranks[0]["gradients"][n]["hash"] == rank["gradients"][n]["hash"]
            for n in names
            for rank in ranks
        ),
        "relative distance of the gradients from ddp default": {
            n: first["gradients"][n]["error"] for n in names if n != DEFAULT
        },
    }
    times[BEST] = _best_cap(times)
    result["over ddp default"][BEST] = ratio(times, BEST, DEFAULT)
    if GRAPHOPT in times:
        result["graphopt over the best cap"] = ratio(times, GRAPHOPT, BEST)
        predicted = first["predicted"][GRAPHOPT]
        if predicted is not None:
            result["graphopt exposed ms, predicted"] = round(1e3 * predicted, 2)
    return result


def _exposed(times: dict[str, list[float]], name: str) -> float:
    """Milliseconds that reducing adds to a step, as the median over blocks."""
    return 1e3 * statistics.median(a - b for a, b in zip(times[name], times[PLAIN], strict=True))


def _best_cap(times: dict[str, list[float]]) -> list[float]:
    """Per block, the cap that is the best on the blocks of the other parity.

    The minimum of ten noisy medians on the same blocks would be lower than any cap really is.
    """
    caps = [cap_name(cap) for cap in CAPS]
    chosen = [
        min(caps, key=lambda n, other=1 - parity: statistics.median(times[n][other::2]))
        for parity in (0, 1)
    ]
    return [times[chosen[block % 2]][block] for block in range(len(times[PLAIN]))]


def _supervise(config: Config, way: Link, until: float) -> None:
    """Run both ranks; on a failure or at the time limit end them, and only them."""
    path = write(config)
    processes: list[subprocess.Popen[bytes]] = []
    logs = [Path(config.folder) / f"rank{rank}.log" for rank in range(WORLD)]
    try:
        for rank, log in enumerate(logs):
            environment = {
                **os.environ,
                "GLOO_SOCKET_IFNAME": way.interfaces[rank],
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(ROOT),
                # A link that was measured at another rate must not be believed.
                "XDG_CACHE_HOME": str(Path(config.folder) / f"cache{rank}"),
            }
            command = [sys.executable, "-m", "benchmarks.overlap_worker", str(path), str(rank)]
            with log.open("wb") as out:
                processes.append(
                    subprocess.Popen(
                        [*way.prefixes[rank], *command],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=ROOT,
                    )
                )
        while any(p.poll() is None for p in processes):
            if any(p.returncode for p in processes) or time.time() > until:
                break
            time.sleep(0.2)
    finally:
        alive = [p for p in processes if p.poll() is None]
        for process in alive:
            process.kill()
            process.wait()
    if alive or any(p.returncode for p in processes):
        tails = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in logs)
        raise RuntimeError(f"{config.model} over {way} did not finish:\n{tails}")


def show(model: str, result: dict[str, Any]) -> None:
    """A table for a terminal."""
    print(
        f"\n{model}, {result['link']}: {result['blocks']} blocks of {result['steps per block']} "
        f"steps in {result['seconds']} s; best cap {result['best cap by median']}"
    )
    print(f"{'':36}{'ms':>9}{'exposed':>9}{'messages':>9}  over ddp default")
    for name, value in result["milliseconds"].items():
        over = result["over ddp default"].get(name)
        print(
            f"  {name:34}{value:9.1f}{result['exposed ms'].get(name, 0.0):9.1f}"
            f"{len(result['messages'].get(name, ())):9}  {_interval(over) if over else ''}"
        )
    print(f"  {BEST:34}{'':27}  {_interval(result['over ddp default'][BEST])}")
    if "graphopt over the best cap" in result:
        print(f"  graphopt over the best cap: {_interval(result['graphopt over the best cap'])}")
        print(
            f"  graphopt predicted: {result.get('graphopt exposed ms, predicted', '-')} ms exposed"
        )
    worst = max(result["relative distance of the gradients from ddp default"].values())
    print(
        f"  gradients equal on all ranks: {result['equal gradients on all ranks']}; farthest from "
        f"ddp default's: {worst:.1e}",
        flush=True,
    )


def _interval(found: dict[str, float]) -> str:
    return f"{found['median']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=", ".join(MODELS))
    parser.add_argument("--rates", default="0.3,1,2,0", help="Gbit/s each way; 0 is unlimited")
    parser.add_argument("--blocks", type=int, default=20, help=f"at most; {MIN_BLOCKS} at least")
    parser.add_argument("--steps", type=int, default=3, help="of a variant in a block, at most")
    parser.add_argument("--minutes", type=float, default=60.0, help="for all pairs together")
    parser.add_argument("--without-graphopt", action="store_true")
    parser.add_argument("--keep", default="overlap", help="name of the results; empty: none")
    options = parser.parse_args()
    models = options.models.split(",")
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    if options.blocks < MIN_BLOCKS:
        parser.error(f"--blocks is {MIN_BLOCKS} at least")
    pairs = [(model, float(rate)) for rate in options.rates.split(",") for model in models]
    until = time.time() + 60 * options.minutes
    results: dict[str, Any] = {}
    for done, (model, rate) in enumerate(pairs):
        result = measure(model, rate, (until - time.time()) / (len(pairs) - done), options)
        show(model, result)
        results[f"{model}, {rate:g} Gbit/s" if rate else f"{model}, unlimited"] = result
        if options.keep:
            path = keep(options.keep, results)
    if options.keep:
        print("kept in", path.name)


if __name__ == "__main__":
    main()
