"""The kit that lets any pass author prove a pass: generated graphs, oracles, a check, a corpus.

`check_scenario` proves more than passes: that daily training code around models runs as in eager.

`strategies` and `check` need the ``testing`` extra (hypothesis), some corpus models the ``corpus``
extra; so the names below are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.testing.check import check_pass
    from graphopt.testing.comparison import assert_same, relative_error
    from graphopt.testing.corpus import CORPUS
    from graphopt.testing.fuzz.check import Verdict, check_scenario
    from graphopt.testing.fuzz.scenario import Layer, Scenario, Step
    from graphopt.testing.fuzz.strategies import scenarios
    from graphopt.testing.inputs import inputs_for
    from graphopt.testing.oracles import run_graph, run_graph_fp64
    from graphopt.testing.program import Instruction, Program, build
    from graphopt.testing.runtime_check import check_runtime
    from graphopt.testing.sizes import at_sizes
    from graphopt.testing.strategies import (
        forward_graphs,
        inference_graphs,
        joint_graphs,
        programs,
    )

_HOMES = {
    "CORPUS": "corpus",
    "Program": "program",
    "Instruction": "program",
    "assert_same": "comparison",
    "at_sizes": "sizes",
    "build": "program",
    "check_pass": "check",
    "Layer": "fuzz.scenario",
    "Scenario": "fuzz.scenario",
    "Step": "fuzz.scenario",
    "Verdict": "fuzz.check",
    "check_runtime": "runtime_check",
    "check_scenario": "fuzz.check",
    "scenarios": "fuzz.strategies",
    "forward_graphs": "strategies",
    "inference_graphs": "strategies",
    "inputs_for": "inputs",
    "joint_graphs": "strategies",
    "programs": "strategies",
    "relative_error": "comparison",
    "run_graph": "oracles",
    "run_graph_fp64": "oracles",
}

__all__ = [
    "CORPUS",
    "Instruction",
    "Layer",
    "Program",
    "Scenario",
    "Step",
    "Verdict",
    "assert_same",
    "at_sizes",
    "build",
    "check_pass",
    "check_runtime",
    "check_scenario",
    "forward_graphs",
    "inference_graphs",
    "inputs_for",
    "joint_graphs",
    "programs",
    "relative_error",
    "run_graph",
    "run_graph_fp64",
    "scenarios",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"graphopt.testing.{_HOMES[name]}"), name)
