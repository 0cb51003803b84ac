"""A report in words, for a terminal and for a notebook."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from graphopt.model.entries import (
    BackendChoice,
    PlainKind,
    Samples,
    Specialisation,
    Verification,
)
from graphopt.passbase import Applied, Declined
from graphopt.pipeline.step import PassStep

if TYPE_CHECKING:
    from graphopt.runtime.validation import Form

Site = TypeVar("Site", Applied, Declined)

# Sites that are named per group; the others are counted.
SITES_SHOWN = 3


def explain(
    model: str,
    spec: str,
    specialisations: Sequence[Specialisation],
    notes: Sequence[str],
    plain: Sequence[PlainKind] = (),
    forms: Sequence[Form] = (),
) -> str:
    """The report as indented lines without line end at the end."""
    lines = [f"graphopt on {model}", f"passes: {spec or 'none'}"]
    if not specialisations and not plain:
        lines.append("nothing is captured yet: the first call does it")
    total = len(specialisations)
    for number, specialisation in enumerate(specialisations, start=1):
        counter = f" {number} of {total}" if total > 1 else ""
        lines += ["", f"specialisation{counter}: {specialisation.signature}"]
        lines += [f"  {line}" for line in _specialisation(specialisation)]
    for kind in plain:
        lines += ["", f"plain PyTorch: {kind.signature}", *(f"  {s}" for s in _reasons(kind))]
    if forms:
        lines += ["", "forms of steps", *(f"  {_form(form)}" for form in forms)]
    if notes:
        lines += ["", *(f"note: {note}" for note in notes)]
    return "\n".join(lines)


def to_html(
    model: str,
    spec: str,
    specialisations: Sequence[Specialisation],
    notes: Sequence[str],
    plain: Sequence[PlainKind] = (),
    forms: Sequence[Form] = (),
) -> str:
    """The same text as one self-contained HTML fragment with sections that fold."""
    parts = [f"<b>graphopt on {_escape(model)}</b>"]
    parts.append(f"<div>passes: <code>{_escape(spec or 'none')}</code></div>")
    if not specialisations and not plain:
        parts.append("<div>nothing is captured yet: the first call does it</div>")
    for item in specialisations:
        body = _pre([*_head(item), *_tail(item)])
        steps = "".join(
            _details(_escape(_title(step)), _pre(_groups(step)) if _groups(step) else "")
            for step in item.steps
        )
        parts.append(_details(f"<b>{_escape(item.signature)}</b>", body + steps, is_open=True))
    for kind in plain:
        title = f"<b>plain PyTorch: {_escape(kind.signature)}</b>"
        parts.append(_details(title, _pre(_reasons(kind)), is_open=True))
    if forms:
        parts.append(_details("<b>forms of steps</b>", _pre(map(_form, forms)), is_open=True))
    parts += [f"<div>note: {_escape(note)}</div>" for note in notes]
    return f'<div class="graphopt-report">{"".join(parts)}</div>'


def _specialisation(item: Specialisation) -> Iterator[str]:
    yield from _head(item)
    for step in item.steps:
        yield _title(step)
        yield from (f"  {line}" for line in _groups(step))
    yield from _tail(item)


def _head(item: Specialisation) -> Iterator[str]:
    yield f"captured   {item.level} graph by {item.route} in {_time(item.capture_seconds)}"
    if item.because:
        yield f"because    {item.because}"
    if item.sizes:
        yield f"sizes      {', '.join(map(str, item.sizes))}"
    if item.numbers:
        yield f"numbers    {', '.join(item.numbers)}"
    ran = [step for step in item.steps if not step.skipped]
    if ran:
        yield f"nodes      {ran[0].nodes_before} -> {ran[-1].nodes_after}"


def _tail(item: Specialisation) -> Iterator[str]:
    yield f"backend    {_backend(item.backend)}"
    yield f"verified   {_verification(item.verification)}"
    yield from (f"fell back  {text}" for text in item.fallen_back)
    if item.samples is not None:
        yield f"samples    {_samples(item.samples)}"
    yield f"plan       {item.plan.digest}"
    if item.unkept:
        yield f"cache      each process captures it anew: {item.unkept}"
    yield from (f"note       {note}" for note in item.notes)


def _reasons(kind: PlainKind) -> Iterator[str]:
    yield f"because    {kind.reason}"
    if kind.where:
        yield f"at         {kind.where}"
    if kind.hint:
        yield f"try        {kind.hint}"
    if kind.every_later:
        yield "also       all later calls in this mode that no specialisation is made for"


def _title(step: PassStep) -> str:
    if step.skipped:
        return f"pass       {step.spec}: skipped, {step.skipped}"
    time = "by an earlier process" if step.earlier else _time(step.seconds)
    check = f", checked in {_time(step.verify_seconds)}" if step.verify_seconds else ""
    return (
        f"pass       {step.spec}: {step.nodes_before} -> {step.nodes_after} nodes, "
        f"{step.numerics}, {time}{check}"
    )


def _groups(step: PassStep) -> list[str]:
    """Applied sites grouped by what was done, declined ones by reason; largest groups first."""
    if step.skipped:
        return []
    lines = []
    for what, applied in _grouped(step.outcome.applied, lambda site: site.what):
        lines.append(f"applied    {len(applied)} x {what}: {_sites(applied)}")
    for reason, declined in _grouped(step.outcome.declined, lambda site: site.reason):
        lines.append(f"declined   {len(declined)} x {reason}: {_sites(declined)}")
        lines.append(f"           {declined[0].detail}")
    return lines or ["no candidate site in this graph"]


def _backend(choice: BackendChoice) -> str:
    asked = "" if choice.requested == choice.backend else f" (asked: {choice.requested})"
    times = ", ".join(f"{name} {_time(t)}" for name, t in sorted(choice.seconds.items()))
    return f"{choice.backend}{asked}: {choice.reason}" + (f" [{times}]" if times else "")


def _verification(check: Verification) -> str:
    if check.result == "not run":
        return f"{check.level}: not compared with eager"
    took = "by an earlier process" if check.earlier else f"in {_time(check.seconds)}"
    if check.declined:
        names = ", ".join(check.declined)
        return (
            f"{check.level}: not compared with eager beyond {names}, which changes the training "
            f"method by design; all other passes and the backend keep their promises, {took}"
        )
    worst = f", worst {check.worst_name} by {check.worst_error:.2g}" if check.worst_error else ""
    return f"{check.level}: {check.result}{worst} {took}"


def _samples(found: Samples) -> str:
    every = f"every {found.every} steps"
    failed = f"; {found.failed} could not be made" if found.failed else ""
    if not found.count:
        return f"none yet, {every}{failed}"
    drift = "bit-equal to eager in all"
    if found.worst_error:
        drift = (
            f"worst {found.worst_name} by {found.worst_error:.2g} in step {found.worst_step}, "
            f"first {found.first_error:.2g}, last {found.last_error:.2g}"
        )
    took = _time(found.seconds / found.count)
    return f"{found.count}, {every}, the last in step {found.step}: {drift}; {took} each{failed}"


def _form(form: Form) -> str:
    what = f"{form.part}, {form.name}"
    if form.result == "not run yet":
        return f"not yet    {what}: such a step has not run"
    if form.result == "not compared":
        return f"not        {what}: {form.reason}"
    if form.result == "mismatch":
        return f"MISMATCH   {what}: {form.reason}"
    worst = f", worst {form.worst_name} by {form.worst_error:.2g}" if form.worst_error else ""
    times = f" and {form.times - 1} before" if form.times > 1 else ""
    return f"compared   {what}: {form.result}{worst}, in step {form.step}{times}"


def _grouped(sites: Iterable[Site], key: Callable[[Site], str]) -> list[tuple[str, list[Site]]]:
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(key(site), []).append(site)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _sites(sites: Sequence[Applied | Declined]) -> str:
    shown = ", ".join(_site(site) for site in sites[:SITES_SHOWN])
    rest = len(sites) - SITES_SHOWN
    return f"{shown}, {rest} more" if rest > 0 else shown


def _site(site: Applied | Declined) -> str:
    numbers = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in site.numbers.items()
    )
    return f"{site.site} ({numbers})" if numbers else site.site


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _escape(text: str) -> str:
    return html.escape(text)


def _pre(lines: Iterable[str]) -> str:
    text = "\n".join(lines)
    return f'<pre style="margin:0 0 0 1.5em">{_escape(text)}</pre>'


def _details(summary: str, body: str, *, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary>{summary}</summary>{body}</details>"
