"""`graphopt plan` of a pass that replaces weights: form, time, error, memory, reason."""

from __future__ import annotations

from dataclasses import asdict

from graphopt.cli.console import phase, show, show_json


def plan_weights(model: str, passes: str, *, json: bool) -> None:
    """Answer for a spec that ends with such a pass; see `graphopt.cli.plan.plan`."""
    with phase("importing torch"):
        from graphopt.cli.subject import load_subject, rewrite
    from graphopt.render.weights import weights_view

    subject = load_subject(model, forward=True)
    step = rewrite(subject, passes)[1][-1]
    outcome = step.outcome
    if json:
        answer = {
            "model": subject.name,
            "pass": step.spec,
            "weights": outcome.tables.get("weights", ()),
            "applied": [asdict(site) for site in outcome.applied],
            "declined": [asdict(site) for site in outcome.declined],
        }
        show_json("plan", answer)
        return
    show(weights_view(outcome, subject.name))
