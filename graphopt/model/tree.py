"""An optimized model in a notebook: its modules, folded, with what passes did in each."""

from __future__ import annotations

from collections import Counter
from html import escape

from torch import nn

from graphopt.model.report import Report

_INDENT = 'style="margin-left:1.1em"'


def model_html(model: nn.Module, report: Report) -> str:
    """The modules of a model and its report, as one HTML fragment with sections that fold.

    Beside each module stand its class, the elements of its parameters, and how many sites that
    passes rewrote or left alone bear its name or that of a parameter of it.
    """
    outcomes = [step.outcome for one in report.specialisations for step in one.steps]
    sites = {
        "applied": Counter(site.site for outcome in outcomes for site in outcome.applied),
        "declined": Counter(site.site for outcome in outcomes for site in outcome.declined),
    }
    modules = _row(model, "", report.model, sites)
    return f'<div class="graphopt-model">{modules}{report._repr_html_()}</div>'


def _row(module: nn.Module, path: str, label: str, sites: dict[str, Counter[str]]) -> str:
    size = sum(p.numel() for p in module.parameters() if not nn.parameter.is_lazy(p))
    told = "".join(
        f", {count} {verdict}"
        for verdict, names in sites.items()
        if (count := sum(n for name, n in names.items() if path and _is_within(name, path)))
    )
    kind = escape(type(module).__name__)
    line = f"<b>{escape(label)}</b> <i>{kind}</i> {size:,} parameters{told}"
    children = "".join(
        _row(child, f"{path}.{name}".lstrip("."), name, sites)
        for name, child in module.named_children()
    )
    if not children:
        return f"<div {_INDENT}>{line}</div>"
    opened = "" if path else " open"
    inside = f"<div {_INDENT}>{children}</div>"
    return f"<details{opened}><summary>{line}</summary>{inside}</details>"


def _is_within(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")
