"""Which decisions of passes are about one parameter or node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from graphopt.analysis.provenance import Provenance
from graphopt.passbase import Applied, Declined
from graphopt.pipeline.step import PassStep

Site = TypeVar("Site", Applied, Declined)

_NAME = re.compile(r"[\w.]+")


class Decisions:
    """The steps of a pipeline, to be asked for what they say about a name."""

    def __init__(self, steps: Sequence[PassStep]) -> None:
        self._steps = tuple(steps)
        self._mentions = [
            (
                [_names(f"{site.site} {site.what}") for site in step.outcome.applied],
                [_names(f"{site.site} {site.detail}") for site in step.outcome.declined],
            )
            for step in self._steps
        ]

    def about(self, told: Provenance, *, removed: bool = False) -> list[PassStep]:
        """The steps with only those sites that are this parameter or node, or mention it.

        What a pass says about the module of a parameter, or about all nodes of the operator of a
        node that is gone, is about it too.

        Args:
            told: what the graph says of it.
            removed: whether a pass has removed it.
        """
        about = {told.name, told.node, *([told.gradient.node] if told.gradient else [])}
        if told.what != "operator" and told.module:
            about.add(told.module)
        if removed:
            about.add(told.operator)
        result = []
        for step, (applied, declined) in zip(self._steps, self._mentions, strict=True):
            outcome = replace(
                step.outcome,
                applied=_of(step.outcome.applied, applied, about),
                declined=_of(step.outcome.declined, declined, about),
            )
            result.append(replace(step, outcome=outcome))
        return result


def _names(text: str) -> frozenset[str]:
    return frozenset(_NAME.findall(text))


def _of(
    sites: Iterable[Site], mentions: Iterable[frozenset[str]], about: set[str]
) -> tuple[Site, ...]:
    found = zip(sites, mentions, strict=True)
    return tuple(site for site, names in found if not names.isdisjoint(about))
