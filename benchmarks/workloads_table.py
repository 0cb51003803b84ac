"""The tables of ``docs/workloads.md``: criteria, and steps against PyTorch's."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[1] / "docs" / "workloads.md"


def with_criteria(text: str, results: Mapping[str, Any]) -> str:
    """The document with the criteria that ``benchmarks.workloads`` has found.

    Raises:
        ValueError: the marks are missing, or seeds of one workload have different criteria.
    """
    return _between_marks(text, "criteria", _criteria(results))


def with_steps(text: str, results: Mapping[str, Any]) -> str:
    """The document with what ``benchmarks.workload_steps`` has found.

    Raises:
        ValueError: the marks are missing.
    """
    return _between_marks(text, "steps", _steps(results))


def _between_marks(text: str, name: str, lines: Iterator[str]) -> str:
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
    if not marked.search(text):
        raise ValueError(f"the document has no marks for the {name}")
    table = "\n".join(lines)
    return marked.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text)


def _steps(results: Mapping[str, Any]) -> Iterator[str]:
    kinds = ("pytorch", "compile", "graphopt eager", "graphopt inductor", "graphopt auto")
    yield (
        "| ms of a step | PyTorch | `torch.compile` | graphopt, eager | inductor | auto "
        "| auto / the better of PyTorch's | first call, s: `torch.compile` | auto |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, found in results.items():
        steps = " | ".join(_number(found["milliseconds"][kind]) for kind in kinds)
        over, first = found["auto over the better"], found["first call, s"]
        interval = f"{over['median']:.2f} [{over['low']:.2f}, {over['high']:.2f}]"
        yield (
            f"| `{name}` | {steps} | {interval} | {first['compile']:.1f} "
            f"| {first['graphopt auto']:.1f} |"
        )


def _criteria(results: Mapping[str, Any]) -> Iterator[str]:
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
