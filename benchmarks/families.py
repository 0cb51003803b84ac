"""Which model families of timm and transformers train the same through graphopt, and which do not.

    python -m benchmarks.families run ROWS.jsonl [NAME ...]
    python -m benchmarks.families keep ROWS.jsonl

`run` adds a line per family to a file and passes over those that it has, so that it may be ended
and run again; families that are named are run anew. Each is a process of its own with a limit of
time. Weights are random, from configurations alone: nothing is downloaded. It needs ``timm`` and
``transformers``. `keep` writes ``results/families.json``. Seconds are of the processor.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt
from benchmarks import families_timm, families_transformers
from benchmarks.families_step import row
from benchmarks.harness import keep
from benchmarks.zoo import Step

LIMIT = 240
"""Seconds of the processor that one family may take; five times as many of the wall."""

_PACKAGES = ("timm", "transformers")
_COUNTED = ("bit-equal", "within 1e-6", "within 1e-5", "different", "refused", "crashed")


def families() -> dict[str, Callable[[], Step]]:
    """What builds a model, by ``timm NAME`` or ``transformers CLASS``; the two take turns."""
    both = families_timm.families(), families_transformers.families()
    found: dict[str, Callable[[], Step]] = {}
    for at in range(max(map(len, both))):
        for package, names in zip(_PACKAGES, map(list, both), strict=True):
            if at < len(names):
                build = both[_PACKAGES.index(package)][names[at]]
                found[f"{package} {names[at]}"] = build
    return found


def run(rows: Path, only: Sequence[str]) -> None:
    """Run the families that `rows` does not have, or those named; a line each."""
    done = _read(rows)
    # Imports that the first capture makes are of no family.
    graphopt.optimize(nn.Linear(2, 2), (torch.ones(1, 2),), backend="eager", dry_run=True)
    wanted = only or [name for name in families() if name not in done]
    for name in wanted:
        found = _apart(families()[name]) | {"name": name, "commit": _commit()}
        with rows.open("a") as file:
            file.write(json.dumps(found) + "\n")
        reason = (found.get("reason") or found.get("worst") or "").replace("\n", " ")
        print(f"{name}: {found['status']} {reason}"[:400], flush=True)


def _apart(build: Callable[[], Step]) -> dict[str, Any]:
    """A row from a fork of this process, which has imported everything and trained nothing."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "row.json"
        child = os.fork()
        if child == 0:
            os.environ["XDG_CACHE_HOME"] = folder
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            try:
                path.write_text(json.dumps(row(build)))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if time.monotonic() - start > 5 * LIMIT:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return {"status": "crashed", "reason": f"not done after {5 * LIMIT} s"}
            time.sleep(0.05)
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
        told = f"not done after {LIMIT} s of the processor" if late else f"status {status}"
        return {"status": "crashed", "reason": told}


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many families ended how."""
    counts = Counter(found["status"] for found in rows.values())
    return {"families": sum(counts[status] for status in _COUNTED)} | {
        status: counts[status] for status in _COUNTED
    }


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each family."""
    if not path.exists():
        return {}
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {found.pop("name"): found for found in rows}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()


def _keep(path: Path) -> None:
    found = _read(path)
    rows = {name: found[name] for name in sorted(families(), key=str.lower) if name in found}
    packages = {name: metadata.version(name) for name in _PACKAGES}
    listed = len(families())
    results = {"packages": packages, "listed": listed, "summary": summary(rows), "families": rows}
    keep("families", results)


def main(arguments: Sequence[str]) -> None:
    """See the top of this file."""
    torch.set_num_threads(1)
    match list(arguments):
        case ["run", rows, *only]:
            run(Path(rows), only)
        case ["keep", rows]:
            _keep(Path(rows))
        case _:
            print(__doc__)
            sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
