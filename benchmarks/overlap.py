"""Overlap of backward and gradient reduction: graphopt against DDP over a rate-limited link.

Two ranks, one core and one thread each, over a link that `benchmarks.link` makes. A pair of
processes holds all variants of a model, and measures them over one link after the other; blocks of
steps alternate in random order, and a block counts with the median of its steps. Ratios are medians
of paired blocks with bootstrap intervals. Run ``python -m benchmarks.overlap --models mlp,densenet
--rates 1 --seconds 150`` on an idle machine; the results go to ``benchmarks/results/overlap.json``,
cell by cell, and a cell that is there is not measured again.

Compiling takes longer than measuring. With ``--when FILE`` a pair waits for that file, once all
that knows nothing of the link is compiled, and takes it away: first for each rate to make the
variants that are planned for it, then for each to measure. ``FILE.ready`` names the rate that
waits. So a machine has to be idle in between only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, keep, milliseconds, ratio
from benchmarks.link import Link, link
from benchmarks.overlap_models import MODELS
from benchmarks.overlap_peers import PEERS
from benchmarks.overlap_variants import CAPS, DEFAULT, GRAPHOPT, OURS, PLAIN, cap_name
from benchmarks.overlap_worker import MIN_BLOCKS, WORLD, Config, write

ROOT = Path(__file__).parents[1]
BEST = "ddp best cap"
BEST_UNCOMPILED = "ddp best, not compiled"
BEST_PEER = "ddp best"
BESTS = (BEST, BEST_UNCOMPILED, BEST_PEER)
LIMIT = 5400.0  # seconds that a pair may take to its next result, the wait for `--when` included
Cells = Iterator[tuple[float, dict[str, Any]]]


def measure(model: str, rates: Sequence[float], options: argparse.Namespace) -> Cells:
    """Run one pair of ranks; the rates with what was found, as soon as it is."""
    with tempfile.TemporaryDirectory() as folder, link(rates[0]) as way:
        config = Config(
            model=model,
            folder=folder,
            rates=rates,
            seconds=options.seconds,
            blocks=options.blocks,
            steps=options.steps,
            without=options.without.split(";"),
        )
        pair = _Pair(config, way, options.when)
        try:
            for rate in rates:
                began = time.time()
                ranks = pair.results(rate, began + LIMIT)
                told = str(replace(way, rate=rate))  # the pair may ask for the next rate by now
                yield rate, {"link": told, "date": _today(), **summary(ranks)}
            pair.join()
        finally:
            pair.end()


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
        "caps measured": [cap for cap in CAPS if cap_name(cap) in times],
        "best cap by median": min(_caps(times), key=lambda n: ms[n]),
        "best peer by median": min(_peers(times), key=lambda n: ms[n]),
        "variants that failed": first["failed"],
        "order of backward": {n: v for n, v in first["order"].items() if v},
        "equal gradients on all ranks": all(
            ranks[0]["gradients"][n]["hash"] == rank["gradients"][n]["hash"]
            for n in names
            for rank in ranks
        ),
        "relative distance of the gradients from ddp default": {
            n: first["gradients"][n]["error"] for n in names if n != DEFAULT
        },
    }
    times[BEST] = _best(times, _caps(times))
    times[BEST_UNCOMPILED] = _best(times, [n for n in _peers(times) if n not in PEERS])
    times[BEST_PEER] = _best(times, _peers(times))
    for best in (BEST, BEST_UNCOMPILED, BEST_PEER):
        result["over ddp default"][best] = ratio(times, best, DEFAULT)
    for ours in OURS:
        if ours in times:
            result[f"{ours}, over"] = {
                best: ratio(times, ours, best) for best in (BEST, BEST_UNCOMPILED, BEST_PEER)
            }
    if (predicted := first["predicted"].get(GRAPHOPT)) is not None:
        result["graphopt exposed ms, predicted"] = round(1e3 * predicted, 2)
    return result


def _exposed(times: dict[str, list[float]], name: str) -> float:
    """Milliseconds that reducing adds to a step, as the median over blocks."""
    return 1e3 * statistics.median(a - b for a, b in zip(times[name], times[PLAIN], strict=True))


def _caps(times: Mapping[str, Any]) -> list[str]:
    return [name for name in map(cap_name, CAPS) if name in times]


def _peers(times: Mapping[str, Any]) -> list[str]:
    """All variants of DistributedDataParallel."""
    return [name for name in times if name.startswith("ddp ") and name not in BESTS]


def _best(times: Mapping[str, list[float]], names: Sequence[str]) -> list[float]:
    """Per block, the variant that is the best on the blocks of the other parity.

    The minimum of several noisy medians on the same blocks would be lower than any of them is.
    """
    chosen = [
        min(names, key=lambda n, other=1 - parity: statistics.median(times[n][other::2]))
        for parity in (0, 1)
    ]
    return [times[chosen[block % 2]][block] for block in range(len(times[PLAIN]))]


class _Pair:
    """Two ranks and their link; ended, and only they, on a failure or at a time limit."""

    def __init__(self, config: Config, way: Link, when: str) -> None:
        self.config, self.way, self.when = config, way, when
        self._answered = 0
        self._logs = [Path(config.folder) / f"rank{rank}.log" for rank in range(WORLD)]
        path = write(config)
        self._processes: list[subprocess.Popen[bytes]] = []
        for rank, log in enumerate(self._logs):
            environment = {
                **os.environ,
                "GLOO_SOCKET_IFNAME": way.interfaces[rank],
                "OMP_NUM_THREADS": "1",
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "PYTHONPATH": str(ROOT),
            }
            command = [sys.executable, "-m", "benchmarks.overlap_worker", str(path), str(rank)]
            with log.open("wb") as out:
                self._processes.append(
                    subprocess.Popen(
                        [*way.prefixes[rank], *command],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        cwd=ROOT,
                    )
                )

    def results(self, rate: float, until: float) -> list[dict[str, Any]]:
        """What each rank found at this rate."""
        paths = [Path(self.config.folder) / f"rank{r}.{rate:g}.json" for r in range(WORLD)]
        while not all(path.exists() for path in paths):
            self._check(until)
            self._answer()
            time.sleep(0.05)
        return [json.loads(path.read_text()) for path in paths]

    def join(self) -> None:
        """Wait for the end of both."""
        until = time.time() + 60
        while any(p.poll() is None for p in self._processes):
            self._check(until)
            time.sleep(0.2)

    def end(self) -> None:
        """End what still runs."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def _answer(self) -> None:
        """Give the link the rate that is asked for, and the ranks the machine."""
        folder = Path(self.config.folder)
        wanted = folder / f"wanted{self._answered + 1}"
        if not wanted.exists():
            return
        rate = json.loads(wanted.read_text())
        if self.when:
            signal = Path(self.when)
            if not signal.exists():
                Path(f"{signal}.ready").write_text(f"{self.config.model} {rate:g}\n")
                return
            signal.unlink()
            Path(f"{signal}.ready").unlink(missing_ok=True)
        self._answered += 1
        self.way = self.way.limited(rate)
        (folder / f"done{self._answered}").touch()

    def _check(self, until: float) -> None:
        if any(p.returncode for p in self._processes if p.poll() is not None):
            self.end()
        elif time.time() < until:
            return
        tails = "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in self._logs)
        raise RuntimeError(f"{self.config.model} over {self.way} did not finish:\n{tails}")


def show(model: str, result: dict[str, Any]) -> None:
    """A table for a terminal."""
    print(
        f"\n{model}, {result['link']}: {result['blocks']} blocks of {result['steps per block']} "
        f"steps; best cap {result['best cap by median']}, best peer {result['best peer by median']}"
    )
    print(f"{'':36}{'ms':>9}{'exposed':>9}{'messages':>9}  over ddp default")
    for name, value in result["milliseconds"].items():
        over = result["over ddp default"].get(name)
        print(
            f"  {name:34}{value:9.1f}{result['exposed ms'].get(name, 0.0):9.1f}"
            f"{len(result['messages'].get(name, ())):9}  {_interval(over) if over else ''}"
        )
    for best in BESTS:
        print(f"  {best:34}{'':27}  {_interval(result['over ddp default'][best])}")
    for ours in OURS:
        for best, found in result.get(f"{ours}, over", {}).items():
            print(f"  {ours} over {best}: {_interval(found)}")
    print(f"  order of backward: {result['order of backward'].get(GRAPHOPT)}")
    print(f"  graphopt predicted: {result.get('graphopt exposed ms, predicted', '-')} ms exposed")
    for name, error in result["variants that failed"].items():
        print(f"  failed: {name}: {error}")
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
    parser.add_argument("--seconds", type=float, default=150.0, help="for each cell")
    parser.add_argument("--without", default="", help="variants to leave out, with ; between them")
    parser.add_argument("--when", default="", help="file to wait for before each cell")
    parser.add_argument("--keep", default="overlap", help="name of the results")
    options = parser.parse_args()
    models, rates = options.models.split(","), [float(rate) for rate in options.rates.split(",")]
    if unknown := set(models) - set(MODELS):
        parser.error(f"unknown models: {', '.join(sorted(unknown))}")
    if options.blocks < MIN_BLOCKS:
        parser.error(f"--blocks is {MIN_BLOCKS} at least")
    path = RESULTS / f"{options.keep}.json"
    results: dict[str, Any] = json.loads(path.read_text())["results"] if path.exists() else {}
    for model in models:
        left = [rate for rate in rates if _cell(model, rate) not in results]
        for rate, result in measure(model, left, options) if left else ():
            show(model, result)
            results[_cell(model, rate)] = result
            keep(options.keep, results)
    print("kept in", path.name)


def _cell(model: str, rate: float) -> str:
    return f"{model}, {rate:g} Gbit/s" if rate else f"{model}, unlimited"


if __name__ == "__main__":
    main()
