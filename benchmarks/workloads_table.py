"""The tables of ``docs/workloads.md``, from the results of ``benchmarks.workloads``."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs" / "workloads.md"
_MARKED = re.compile(r"(<!-- criteria -->\n).*?(<!-- end of criteria -->)", re.DOTALL)


def with_tables(text: str, results: Mapping[str, Any]) -> str:
    """The document with the criteria of ``results`` between its marks.

    Raises:
        ValueError: the marks are missing, or seeds of one workload have different criteria.
    """
    if not _MARKED.search(text):
        raise ValueError("the document has no marks for the criteria")
    table = "\n".join(_lines(results))
    return _MARKED.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def _lines(results: Mapping[str, Any]) -> Iterator[str]:
    yield "| workload | criterion | bound | seeds 0, 1, 2 | |"
    yield "|---|---|---|---|---|"
    for name, workload in results.items():
        seeds = list(workload["seeds"].values())
        title = f"[`{name}`](../examples/{name}/README.md)"
        claims = [[(c["name"], c["relation"], c["bound"]) for c in s["criteria"]] for s in seeds]
        if any(claim != claims[0] for claim in claims):
            raise ValueError(f"the seeds of {name} were run with different criteria: run it again")
        for number, criterion in enumerate(seeds[0]["criteria"]):
            same = [seed["criteria"][number] for seed in seeds]
            values = ", ".join(_number(c["value"]) for c in same)
            bound = f"{'≤' if criterion['relation'] == '<=' else '≥'} {_number(criterion['bound'])}"
            yield f"| {title} | {criterion['name']} | {bound} | {values} | {verdict(same)} |"
            title = ""
        minutes = statistics.mean(sum(seed["seconds"].values()) for seed in seeds) / 60
        yield f"| {title} | minutes of one seed | | {minutes:.1f} | |"


def verdict(criteria: list[dict[str, Any]]) -> str:
    """Of one criterion over the seeds: it holds where it holds with each."""
    held = sum(c["holds"] for c in criteria)
    text = "holds" if held == len(criteria) else f"**fails** with {len(criteria) - held}"
    return text if criteria[0]["gate"] else f"{text} (for information)"


def _number(value: float | None) -> str:
    return "NaN" if value is None else f"{value:.3g}"
