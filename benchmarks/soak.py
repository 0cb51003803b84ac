"""Many steps: does memory, threads, descriptors or the work of a step grow?

Run: ``python -m benchmarks.soak [STEPS]`` (20,000 by default), for the default passes, ``kfac``,
two ranks, and two ranks of DistributedDataParallel beside them, each in processes of its own;
``--only kfac`` runs one. After each hundredth of the steps the process is looked at. Growth is the
median slope of all pairs of looks (Theil and Sen), behind the first tenth, in which caches fill.
Looks are written where they lie from the beginning, as they would be what grows. Memory is what is
the process's own: pages of libraries come and go with what else the machine needs. Time is that of
the processor, and still depends on what else runs; what a step calls does not, and is counted.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import threading
import time
from datetime import timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import graphopt
from benchmarks.harness import RESULTS, keep

DDP = "DistributedDataParallel"
CASES = {
    "default": ("auto", 1),
    "kfac": ("kfac", 1),
    "two ranks": ("auto", 2),
    "two ranks, DDP": (DDP, 2),
}
LOOKS = 100
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
# Steps whose calls are counted in a look: of all three sizes of batches, with all that is done in
# every eighth step only.
COUNTED = 24


class _Heap(ctypes.Structure):
    """What `mallinfo2` of glibc gives; `uordblks` and `hblkhd` are bytes in use."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks"),
            *("fordblks", "keepcost"),
        )
    )


def heap() -> float:
    """Kilobytes of the C heap that are in use; 0 where it is not glibc's."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return 0.0
    mallinfo.restype = _Heap
    found = mallinfo()
    return float(found.uordblks + found.hblkhd) / 1024


def look() -> dict[str, float]:
    """What this process holds: kilobytes, descriptors, threads of the system and of Python."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "kilobytes": float(status["RssAnon"].split()[0]),
        "kilobytes of the heap": heap(),
        "descriptors": float(len(os.listdir("/proc/self/fd"))),
        "threads": float(status["Threads"]),
        "python threads": float(threading.active_count()),
    }


def train(passes: str, steps: int) -> dict[str, list[float]]:
    """Looks at a process that trains a small network with batch norm and dropout."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4)]
    model: Any = nn.Sequential(*layers)
    if passes == DDP:
        model = nn.parallel.DistributedDataParallel(model)
    else:
        model = graphopt.optimize(model, passes=passes)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    calls = 0

    def counts(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def step(number: int) -> None:
        # Of three sizes, so that calls take symbolic ones; targets that change keep it awake.
        x = torch.randn(8 + 4 * (number % 3), 16)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()

    every = max(COUNTED, steps // LOOKS)
    names: list[str] = []
    found = torch.zeros(LOOKS, 16, dtype=torch.float64)
    for number in range(LOOKS):
        begun, spent = time.perf_counter(), time.process_time()
        for at in range(every - COUNTED):
            step(at)
        count = max(1, every - COUNTED)
        wall, spent = time.perf_counter() - begun, time.process_time() - spent
        calls = 0
        sys.setprofile(counts)
        for at in range(COUNTED):
            step(at)
        sys.setprofile(None)
        gc.collect()
        seen = look() | {
            "objects": float(len(gc.get_objects())),
            "calls": calls / COUNTED,
            "milliseconds": 1e3 * wall / count,
            "milliseconds of the processor": 1e3 * spent / count,
        }
        names = names or list(seen)
        found[number, : len(seen)] = torch.tensor(list(seen.values()), dtype=torch.float64)
    assert all(torch.isfinite(p).all() for p in model.parameters()), "training diverged"
    return {name: found[:, i].tolist() for i, name in enumerate(names)}


def slope(values: list[float]) -> float:
    """Median change per look, over all pairs."""
    pairs = combinations(enumerate(values), 2)
    return statistics.median((b - a) / (j - i) for (i, a), (j, b) in pairs)


def summary(looks: dict[str, list[float]], steps: int) -> dict[str, dict[str, float]]:
    """Of each quantity: its medians in the first and last tenth that count, and its growth."""
    tenth, per_look = LOOKS // 10, max(COUNTED, steps // LOOKS)
    found = {}
    for name, values in looks.items():
        rest = values[tenth:]
        found[name] = {
            "begin": round(statistics.median(rest[:tenth]), 4),
            "end": round(statistics.median(rest[-tenth:]), 4),
            "per 1000 steps": round(slope(rest) * 1000 / per_look, 6),
        }
    return found


def _rank(rank: int, world: int, port: int, folder: str, passes: str, steps: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=15)
        )
    looks = train(passes, steps)
    Path(folder, f"{rank}.json").write_text(json.dumps(looks))
    if world > 1:
        dist.barrier()
    os._exit(0)


def run(name: str, steps: int) -> dict[str, Any]:
    """One case: a summary per rank."""
    passes, world = CASES[name]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(r, world, port, folder, passes, steps))
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            assert process.exitcode == 0, f"a rank ended with {process.exitcode}"
        looks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(world)]
    return {
        "passes": passes,
        "steps": steps,
        "seconds": round(time.monotonic() - begun),
        "ranks": [summary(found, steps) for found in looks],
    }


def table(results: dict[str, Any]) -> str:
    """The table of the page."""
    lines = [
        "| | rank | memory | per 1,000 steps | heap in use, per 1,000 steps | objects "
        "| descriptors | threads | calls of a step | processor time of a step |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, case in results.items():
        for rank, seen in enumerate(case["ranks"]):
            memory, spent = seen["kilobytes"], seen["milliseconds of the processor"]
            heap = seen.get("kilobytes of the heap")  # older results have no heap, and no counts
            columns = [
                f"`{name}`" if name == "kfac" else name,
                str(rank),
                f"{memory['begin'] / 1024:.1f} to {memory['end'] / 1024:.1f} MB",
                f"{memory['per 1000 steps']:+.1f} kB",
                f"{heap['per 1000 steps']:+.2f} kB" if heap else "not counted",
                *(
                    f"{seen[what]['begin']:,.0f} to {seen[what]['end']:,.0f}"
                    if what in seen
                    else "not counted"
                    for what in ("objects", "descriptors", "threads", "calls")
                ),
                f"{spent['begin']:.3f} to {spent['end']:.3f} ms",
            ]
            lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def write() -> None:
    """Renew the table of the page from what was kept."""
    results = json.loads((RESULTS / "soak.json").read_text())["results"]
    begin, end = "<!-- soak -->", "<!-- end of soak -->"
    before, _, rest = PAGE.read_text().partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{table(results)}\n\n{end}{after}")


def main() -> None:
    """Run all cases and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("steps", nargs="?", type=int, default=20_000)
    parser.add_argument("--only", choices=CASES)
    parser.add_argument("--write", action="store_true", help="only renew the table of the page")
    arguments = parser.parse_args()
    if arguments.write:
        write()
        return
    names = [arguments.only] if arguments.only else list(CASES)
    results = {}
    for name in names:
        results[name] = run(name, arguments.steps)
        print(name, json.dumps(results[name], indent=1), flush=True)
        kept = RESULTS / "soak.json"
        known = json.loads(kept.read_text())["results"] if kept.exists() else {}
        keep("soak", {n: r for n in CASES if (r := (known | results).get(n))})


if __name__ == "__main__":
    main()
