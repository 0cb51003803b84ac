"""graphopt: a compiler for PyTorch training steps.

The public names are loaded when they are first used, so that the command line can show its help
without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "optimize": "graphopt.api",
    "calibrate": "graphopt.calibration.run",
    "Calibration": "graphopt.calibration.record",
    "serve": "graphopt.model.serving",
    "state_dict": "graphopt.model.checkpoint",
    "load_state_dict": "graphopt.model.checkpoint",
    "use_scaler": "graphopt.model.checkpoint",
    "Graph": "graphopt.graph",
    "Level": "graphopt.graph",
    "Plan": "graphopt.plan",
    "Role": "graphopt.plan",
    "Signature": "graphopt.plan",
    "Slot": "graphopt.plan",
    "Pass": "graphopt.passbase",
    "PassContext": "graphopt.passbase",
    "Outcome": "graphopt.passbase",
    "Applied": "graphopt.passbase",
    "Declined": "graphopt.passbase",
    "Pipeline": "graphopt.pipeline",
    "Report": "graphopt.model.report",
    "print_graph": "graphopt.text",
    "parse_graph": "graphopt.text",
    "GraphoptError": "graphopt.errors",
    "CaptureError": "graphopt.errors",
}

# Folders of functions that are called by their names there.
_PACKAGES = ("optim", "study")

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from graphopt.api import optimize
    from graphopt.calibration.record import Calibration
    from graphopt.calibration.run import calibrate
    from graphopt.errors import CaptureError, GraphoptError
    from graphopt.graph import Graph, Level
    from graphopt.model.checkpoint import load_state_dict, state_dict, use_scaler
    from graphopt.model.report import Report
    from graphopt.model.serving import serve
    from graphopt.passbase import Applied, Declined, Outcome, Pass, PassContext
    from graphopt.pipeline import Pipeline
    from graphopt.plan import Plan, Role, Signature, Slot
    from graphopt.text import parse_graph, print_graph


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return importlib.import_module(f"graphopt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
