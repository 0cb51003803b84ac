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
_QUALIFIED = re.compile(r"[._]")


class Decisions:
    """The steps of a pipeline, to be asked for what they say about a name."""

    def __init__(self, steps: Sequence[PassStep]) -> None:
        self._steps = tuple(steps)
        self._said = [
            (
                [_Said(site.site, site.what) for site in step.outcome.applied],
                [_Said(site.site, site.detail) for site in step.outcome.declined],
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
        # In a sentence "view" is a word and "8" a number, unless a node of that name was asked for.
        spoken = about if told.what == "operator" else set(filter(_QUALIFIED.search, about))
        result = []
        for step, (applied, declined) in zip(self._steps, self._said, strict=True):
            outcome = replace(
                step.outcome,
                applied=_of(step.outcome.applied, applied, about, spoken),
                declined=_of(step.outcome.declined, declined, about, spoken),
            )
            result.append(replace(step, outcome=outcome))
        return result


class _Said:
    """The names in a site, and those in the sentence about it."""

    def __init__(self, site: str, sentence: str) -> None:
        self.site = frozenset(_NAME.findall(site))
        self.sentence = frozenset(_NAME.findall(sentence))


def _of(
    sites: Iterable[Site], said: Iterable[_Said], about: set[str], spoken: set[str]
) -> tuple[Site, ...]:
    return tuple(
        site
        for site, names in zip(sites, said, strict=True)
        if not names.site.isdisjoint(about) or not names.sentence.isdisjoint(spoken)
    )
