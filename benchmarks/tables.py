"""The tables of ``docs/measured.md``, each made from one kept result.

To add one: write a function from ``results`` of a file to lines of Markdown, name it in `TABLES`,
and put ``<!-- table NAME -->`` and ``<!-- end of table -->`` into the page.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

FIRST = "peak of the first call over eager's step"
Results = Mapping[str, Any]
Lines = Iterator[str]


def training(results: Results) -> Lines:
    """Training steps of ``benchmarks.step_time``."""
    cases = {n: found for n, found in results.items() if n.startswith("training ")}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for case, found in cases.items():
        for key, value in found.items():
            if key != "milliseconds":
                rows.setdefault(_compared(key), {})[case] = value
    yield from _head("training", "target", *(n.removeprefix("training ") for n in cases))
    for (what, target), by_case in rows.items():
        yield _row(what, target, *(ratio(by_case.get(case)) for case in cases))


def folded(results: Results) -> Lines:
    """Inference of ``benchmarks.step_time``."""
    yield from _head("inference", "over", "target", "ratio")
    for name, found in results.items():
        if name.startswith("inference "):
            for key, value in found.items():
                if key != "milliseconds":
                    what, target = _compared(key)
                    variant, _, peer = what.partition(" over ")
                    case = name.removeprefix("inference ")
                    yield _row(f"{case}, {variant}", peer, target, ratio(value))


def zoo_steps(results: Results) -> Lines:
    """Steps of ``benchmarks.zoo_steps``."""
    yield from _head("model", "eager, ms", "graphopt over eager")
    for name, found in results["models"].items():
        eager = found["CPU milliseconds"]["eager"]
        yield _row(name, f"{eager:.1f}", ratio(found["graphopt over eager"], 3))
    yield ""
    for kind, found in results.items():
        if kind != "models" and found:
            yield (
                f"- {found['models']} models, {kind}: median **{found['median']:.3f}**, worst "
                f"**{found['worst']:.3f}** ({found['worst model']})."
            )


def memory(results: Results) -> Lines:
    """Bytes of ``benchmarks.memory``."""
    kinds = list(dict.fromkeys(k for found in results.values() for k in found["bytes"]))
    others = [kind for kind in kinds if kind != "eager"]
    names = [f"`{kind}`" if kind != "graphopt" else kind for kind in others]
    columns = ("saved by eager, MB", *names, "most of eager, MB", *names, "first call")
    yield from _head("model", *columns)
    over: dict[str, list[float]] = {"saved": [], "peak": []}
    for name, found in results.items():
        cells = [name]
        for what in over:
            eager = found["bytes"]["eager"][what]
            cells.append(f"{eager / 1e6:.2f}")
            for kind in others:
                ours = found["bytes"].get(kind)
                cells.append(f"{ours[what] / eager:.3f}" if ours else "")
            over[what].append(found["bytes"]["graphopt"][what] / eager)
        yield _row(*cells, f"{found[FIRST]:.2f}" if FIRST in found else "")
    above = [n for n, found in results.items() if found["peak over eager"] > 1]
    yield ""
    yield (
        f"- {len(results)} models: graphopt saves {_range(over['saved'])} of eager's bytes and has "
        f"{_range(over['peak'])} of its most."
    )
    yield f"- More than eager at once on {len(above)}: {', '.join(above) or 'none'}."


def inference(results: Results) -> Lines:
    """Models of ``benchmarks.inference``."""
    models = results["models"]
    peers = [
        key.removeprefix("over ")
        for key in dict.fromkeys(k for found in models.values() for k in found)
        if key.startswith("over ")
    ]
    yield from _head("model", "ms", "form", *(f"over {peer}" for peer in peers))
    for name, found in models.items():
        ms = found["milliseconds"]["graphopt"]
        ratios = (ratio(found.get(f"over {peer}")) for peer in peers)
        yield _row(name, f"{ms:.1f}", found.get("runs", ""), *ratios)
    yield ""
    for key, value in results.get("summary", {}).items():
        yield f"- {key}: {value}"


def first_call(results: Results) -> Lines:
    """First calls of ``benchmarks.first_call``, in seconds of the wall where that was measured."""
    yield from _head("model", "", "seconds of the", "later step", "cold", "warm", "warm over cold")
    for backend in results.values():
        for name, found in backend.items():
            for variant, runs in found["runs"].items():
                clock = "wall" if "wall" in runs["cold"]["first"] else "processor"
                later = statistics.median(run["second"][clock] for run in runs["warm"])
                warm = statistics.median(run["first"][clock] for run in runs["warm"])
                share, cold = found["warm over cold"][variant][clock], runs["cold"]["first"][clock]
                seconds = (f"{s:.2f}" for s in (later, cold, warm, share))
                yield _row(name, variant, clock, *seconds)


def commands(results: Results) -> Lines:
    """Processor seconds of each command of ``benchmarks.cli``."""
    yield from _head("on", "command", "before", "after", "after over before")
    for model, rows in results["commands"].items():
        for name, found in rows.items():
            spent = found["processor"]
            sides = ("" if spent[s] is None else f"{spent[s]:.2f}" for s in ("before", "after"))
            share = "" if spent["ratio"] is None else f"{spent['ratio']:.2f}"
            yield _row(model, f"`{name}`", *sides, share)


def first_call_cold(results: Results) -> Lines:
    """Cold first calls of ``benchmarks.first_call cold``: seconds of the processor."""
    yield from _head(
        "model", "before", "after", "`aot_eager`", "after over before", "over `aot_eager`"
    )
    for name, found in results.items():
        spent = found["processor seconds"]
        seconds = (f"{statistics.median(spent[v]):.2f}" for v in ("before", "after", "aot_eager"))
        over = f"{found['before over aot_eager']:.2f}, then {found['after over aot_eager']:.2f}"
        yield _row(name, *seconds, f"{found['after over before']:.2f}", over)


def overlap(results: Results) -> Lines:
    """Cells of ``benchmarks.overlap``, a table for each."""
    for cell, found in results.items():
        yield f"**{cell}**, {found['blocks']} blocks:"
        yield ""
        yield from _head("", "ms", "exposed, ms", "over DDP's default")
        for variant, ms in found["milliseconds"].items():
            exposed = found["exposed ms"].get(variant)
            over = found["over ddp default"].get(variant)
            cell_exposed = "" if exposed is None else f"{exposed:.0f}"
            yield _row(variant, f"{ms:.0f}", cell_exposed, ratio(over))
        yield ""
        for key, value in found.items():
            for peer, over in value.items() if key.endswith(", over") else ():
                if isinstance(over, Mapping) and "median" in over:
                    yield f"- {key.removesuffix(', over')} over {peer}: {ratio(over)}"
        yield ""


def job_faults(results: Results) -> Lines:
    """Attacks of ``benchmarks.job_faults``, by fault."""
    yield from _head("fault", "attacks", "survivors", "that ended", "the last error after, s")
    by_fault: dict[str, list[Any]] = {}
    for row in results["attacks"]:
        by_fault.setdefault(row["fault"], []).append(row)
    for fault, rows in by_fault.items():
        survivors = [one for row in rows for one in row["survivors"]]
        ended = [one["seconds"] for one in survivors if one["ended"]]
        last = max((s for s in ended if s is not None), default=0.0)
        yield _row(fault, str(len(rows)), str(len(survivors)), str(len(ended)), f"{last:.1f}")
    yield ""
    yield (
        f"- {results['count']} attacks; in {results['in_time']} all survivors ended in time, in "
        f"{results['named']} they named the victim."
    )


def families(results: Results) -> Lines:
    """Model families of ``benchmarks.families``."""
    rows: Mapping[str, Any] = results["families"]
    statuses = [key for key in results["summary"] if key != "families"]
    yield from _head("package", "families", *statuses)
    for package, version in results["packages"].items():
        ended = [found["status"] for name, found in rows.items() if name.split()[0] == package]
        counts = [ended.count(status) for status in statuses]
        yield _row(f"{package} {version}", *map(str, (sum(counts), *counts)))
    counts = [results["summary"][status] for status in statuses]
    yield _row("both", *map(str, (results["summary"]["families"], *counts)))
    yield ""
    yield f"- {len(rows)} of {results['listed']} families that are listed were run."
    taken = {name: found["CPU seconds"] for name, found in rows.items() if "CPU seconds" in found}
    if taken:
        both = {name: s["two steps with capture"] for name, s in taken.items()}
        worst = max(both, key=both.__getitem__)
        yield (
            f"- Processor seconds of the first two steps, capture and comparison included: median "
            f"{statistics.median(both.values()):.1f}, most {both[worst]:.1f} ({worst})."
        )
        again = [name for name, found in rows.items() if found.get("captures", 1) > 1]
        yield f"- Captured anew in the second step: {', '.join(again) or 'none'}."
        yield ""
    off = {n: found for n, found in rows.items() if found.get("error")}
    if off:
        yield from _head("not bit-equal", "error", "worst", "eager against eager")
        for name, found in off.items():
            itself = found["eager against eager"]["error"]
            yield _row(name, f"{found['error']:.1e}", found["worst"], f"{itself:.1e}")
        yield ""
    refused = {n: found for n, found in rows.items() if found["status"] == "refused"}
    if refused:
        yield from _head("refused", "because", "at")
        for name, found in refused.items():
            path, _, line = found["where"].partition(": ")
            at = f"`{line}` in {path.rpartition('/')[2]}" if line else ""
            yield _row(name, found["reason"], at.replace("|", "\\|"))


TABLES: dict[str, tuple[str, Callable[[Results], Iterable[str]]]] = {
    "training": ("step_time_cpu", training),
    "folded": ("step_time_cpu", folded),
    "zoo_steps": ("zoo_steps_cpu", zoo_steps),
    "families": ("families", families),
    "memory": ("memory_cpu", memory),
    "inference": ("inference", inference),
    "first_call": ("first_call", first_call),
    "commands": ("cli", commands),
    "first_call_cold": ("first_call_cold", first_call_cold),
    "overlap": ("overlap", overlap),
    "job_faults": ("job_faults", job_faults),
}
"""By the name in the page: the file of results, and what makes lines of it."""


def ratio(found: Mapping[str, float] | None, digits: int = 2) -> str:
    """A median with its interval; nothing where it was not measured."""
    if not found:
        return ""
    median, low, high = (f"{found[key]:.{digits}f}" for key in ("median", "low", "high"))
    return f"{median} ({low} to {high})"


def _compared(key: str) -> tuple[str, str]:
    """What a key compares, and its target: ``auto over the better, compile (target 1.03)``."""
    target = re.search(r" \(target ([\d.]+)\)", key)
    what = key.replace(target[0], "") if target else key
    return re.sub(r"the better, \w+", "the better of the two", what), target[1] if target else ""


def _range(values: list[float]) -> str:
    return f"{min(values):.3f} to {max(values):.3f} (median {statistics.median(values):.3f})"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _head(*names: str) -> Lines:
    yield _row(*names)
    yield "|" + "---|" * len(names)
