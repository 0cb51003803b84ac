"""Every fault in a job at every place: seconds to the error of each survivor, and whom it names.

Run: ``python -m benchmarks.job_faults``; ``--only dp/kill/mid-step`` runs some; ``--write`` renews
the table of ``docs/reliability_jobs.md`` from what was kept. Ranks are processes of this machine
over Gloo, with a TCP store that rank 0 holds; one of them has the fault.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import RESULTS, keep
from benchmarks.job_faults_training import SCHEDULES, TIMEOUT, Attack, train

NAME = "job_faults"
PAGE = Path(__file__).parents[1] / "docs" / "reliability_jobs.md"
ALLOWED = 5.0  # seconds that an error may take beyond it
LIMIT = 150.0  # after which a rank counts as hanging
PLACES = ("before optimize", "link measurement", "agreement", "first step", "mid-step")


def attacks() -> Iterator[Attack]:
    """All of them; rank 0 holds the store, so it is a victim of its own kind."""
    for fault in ("kill", "stop"):
        for place in PLACES:
            for world, victim in ((2, 0), (2, 1), (4, 0), (4, 2)):
                yield Attack(fault, place, world, victim)
    for world in (2, 4):
        for place in ("first step", "mid-step"):
            yield Attack("slip", place, world, 1)
            yield Attack("nan", place, world, 1)
        for fault in ("parameters differ", "passes that send nothing"):
            yield Attack(fault, "before optimize", world, 1)
        for fault in ("ReLU against Tanh", "an option differs"):
            yield Attack(fault, "agreement", world, 1)
        yield Attack("loss scale differs", "mid-step", world, 1)
        for fault in ("exponents differ", "kill", "stop", "slip"):
            yield Attack(fault, "mid-step", world, 1, "flexpoint")
    for job in SCHEDULES:
        for victim in range(3):  # the stages; rank 0 holds the store
            for fault in ("kill", "stop", "slip"):
                yield Attack(fault, "mid-step", 3, victim, job)
        yield Attack("micro-batches differ", "agreement", 3, 1, job)
        yield Attack("an error in the loss", "mid-step", 3, 2, job)
    for victim in (1, 2, 3):
        for fault in ("kill", "stop"):
            yield Attack(fault, "mid-step", 4, victim, "dp x pp")
    yield Attack("stop", "agreement", 4, 3, "dp x pp")
    yield Attack("slip", "mid-step", 4, 3, "dp x pp")


# -- one rank --------------------------------------------------------------------------------------


def _rank(attack: Attack, rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"  # no link of an earlier job
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["RANK"] = str(rank)
    sys.stderr = open(f"{folder}/{rank}.err", "w")  # noqa: SIM115  (until the process ends)
    store = dist.TCPStore(
        "127.0.0.1", port, attack.world, rank == 0, timeout=timedelta(seconds=LIMIT)
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=attack.world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    dist.barrier()
    said: dict[str, Any]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            train(attack, rank == attack.victim, folder)
            found = [str(w.message) for w in warned if "not finite" in str(w.message)]
            said = {"kind": "warning", "text": found[0]} if found else {"kind": "finished"}
        except BaseException as error:
            restart = getattr(error, "restart", None)
            said = {"kind": type(error).__name__, "text": str(error), "restart": restart}
    said["time"] = time.time()
    Path(folder, f"{rank}.part").write_text(json.dumps(said))
    Path(folder, f"{rank}.part").rename(Path(folder, f"{rank}.json"))
    if said["kind"] != "finished":
        sys.exit(1)
    os._exit(0)


# -- one attack ------------------------------------------------------------------------------------


def run(attack: Attack) -> dict[str, Any]:
    """What every survivor of an attack said, and after how many seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        ranks = [
            context.Process(target=_rank, args=(attack, rank, port, folder), daemon=True)
            for rank in range(attack.world)
        ]
        for process in ranks:
            process.start()
        end = time.monotonic() + LIMIT
        lost = {attack.victim} if attack.fault in ("kill", "stop") else set()
        others = [r for r in range(attack.world) if r not in lost]
        while time.monotonic() < end and any(ranks[r].is_alive() for r in others):
            time.sleep(0.1)
        ended = [r for r in others if not ranks[r].is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        path = Path(folder, "fault")
        begun = float(path.read_text()) if path.exists() else float("nan")
        answers = {r: Path(folder, f"{r}.json") for r in others}
        said = {r: json.loads(p.read_text()) if p.exists() else {} for r, p in answers.items()}
    survivors = [
        {
            "rank": r,
            "ended": r in ended,
            "seconds": round(said[r]["time"] - begun, 2) if said[r] else None,
            "kind": said[r].get("kind", "nothing"),
            "text": said[r].get("text", "").removeprefix("[GO-D01] "),
            "restart": said[r].get("restart"),
        }
        for r in others
    ]
    return {**asdict(attack), "survivors": survivors}


def names(row: dict[str, Any]) -> bool:
    """Whether each survivor names the victim, and no other rank as lost."""
    for one in row["survivors"]:
        first = one["text"].splitlines()[0] if one["text"] else ""
        if row["fault"] == "an error in the loss" and one["rank"] == row["victim"]:
            continue  # has its own error
        if row["fault"] == "nan":
            if "not finite in step" not in first:
                return False
            continue
        said = re.findall(r"ranks? (\d+(?:, \d+)*)", first)
        if str(row["victim"]) not in {number for group in said for number in group.split(", ")}:
            return False
        lost = re.search(r"rank[s]? ([\d, and]+) did not", first)
        if lost and lost.group(1).strip() != str(row["victim"]):
            return False
    return True


def in_time(row: dict[str, Any]) -> bool:
    """Whether each survivor ended with a word within the time that is allowed."""
    return all(
        one["ended"] and one["seconds"] is not None and one["seconds"] <= TIMEOUT + ALLOWED
        for one in row["survivors"]
    )


def _together(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All attacks in order: those that ran, and the others as they were kept."""
    kept = json.loads((RESULTS / f"{NAME}.json").read_text())["results"]["attacks"]
    known = {_key(row): row for row in ({"job": "dp"} | row for row in (*kept, *rows))}
    return [known[str(attack)] for attack in attacks() if str(attack) in known]


def _key(row: dict[str, Any]) -> str:
    names = ("fault", "place", "world", "victim", "job")
    return str(Attack(**{name: row[name] for name in names}))


# -- the page --------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of the page."""
    lines = [
        "| job | fault | at | ranks | victim | seconds to the error of each survivor | "
        "what it says |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        seconds = ", ".join(
            "never" if one["seconds"] is None else f"{one['seconds']:.1f}"
            for one in row["survivors"]
        )
        late = "" if in_time(row) else " **late**"
        unnamed = "" if names(row) else " **(not named)**"
        texts = [one["text"].splitlines()[0] for one in row["survivors"] if one["text"]]
        said = (texts[0] if texts else "nothing").replace("|", "/")
        head = [row["job"], row["fault"], row["place"], str(row["world"]), f"rank {row['victim']}"]
        lines.append(f"| {' | '.join([*head, seconds + late, said + unnamed])} |")
    return "\n".join(lines)


def write() -> None:
    """Renew the table of the page from the kept results."""
    rows = json.loads((RESULTS / f"{NAME}.json").read_text())["results"]["attacks"]
    begin, end = "<!-- table -->", "<!-- end of table -->"
    text = PAGE.read_text()
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    PAGE.write_text(f"{before}{begin}\n\n{table(rows)}\n\n{end}{after}")


def main() -> None:
    """Run attacks, and keep what was found when all of them ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="those whose names begin so: dp/kill/mid-step/4"
    )
    parser.add_argument("--at-once", type=int, default=1, help="attacks that run side by side")
    parser.add_argument("--write", action="store_true", help="only renew the table of the page")
    parser.add_argument("--keep", action="store_true", help="put what --only ran in its place")
    arguments = parser.parse_args()
    if arguments.write:
        write()
        return
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # else a lost store writes pages of frames
    multiprocessing.set_forkserver_preload(["benchmarks.job_faults_preloaded"])
    chosen = [attack for attack in attacks() if str(attack).startswith(tuple(arguments.only))]
    rows = []
    with ThreadPoolExecutor(arguments.at_once) as pool:
        for row in pool.map(run, chosen):
            rows.append(row)
            print(table([row]).splitlines()[-1], flush=True)
    summary = {
        "attacks": len(rows),
        "in_time": sum(map(in_time, rows)),
        "named": sum(map(names, rows)),
        "timeout": TIMEOUT,
        "at_once": arguments.at_once,
    }
    print(json.dumps(summary))
    if arguments.only == [""] or arguments.keep:
        rows = _together(rows)
        counts = {"in_time": sum(map(in_time, rows)), "named": sum(map(names, rows))}
        keep(NAME, {**summary, **counts, "attacks": rows, "count": len(rows)})
        write()


if __name__ == "__main__":
    main()
