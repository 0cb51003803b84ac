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
    "Dim": "graphopt.model.declared",
    "serve": "graphopt.model.serving",
    "state_dict": "graphopt.model.checkpoint",
    "load_state_dict": "graphopt.model.checkpoint",
    "use_scaler": "graphopt.model.checkpoint",
    "save": "graphopt.model.saving",
    "load": "graphopt.model.saving",
    "dense_state_dict": "graphopt.model.dense",
    "load_dense_state_dict": "graphopt.model.dense",
    "restructure": "graphopt.model.dense",
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
_PACKAGES = ("data", "optim", "study")

__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:  # the `as` says that they are public
    from graphopt.api import optimize as optimize
    from graphopt.calibration.record import Calibration as Calibration
    from graphopt.calibration.run import calibrate as calibrate
    from graphopt.errors import CaptureError as CaptureError
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.graph import Graph as Graph
    from graphopt.graph import Level as Level
    from graphopt.model.checkpoint import (
        load_state_dict as load_state_dict,
    )
    from graphopt.model.checkpoint import (
        state_dict as state_dict,
    )
    from graphopt.model.checkpoint import (
        use_scaler as use_scaler,
    )
    from graphopt.model.declared import Dim as Dim
    from graphopt.model.dense import (
        dense_state_dict as dense_state_dict,
    )
    from graphopt.model.dense import (
        load_dense_state_dict as load_dense_state_dict,
    )
    from graphopt.model.dense import (
        restructure as restructure,
    )
    from graphopt.model.report import Report as Report
    from graphopt.model.saving import (
        load as load,
    )
    from graphopt.model.saving import (
        save as save,
    )
    from graphopt.model.serving import serve as serve
    from graphopt.passbase import (
        Applied as Applied,
    )
    from graphopt.passbase import (
        Declined as Declined,
    )
    from graphopt.passbase import (
        Outcome as Outcome,
    )
    from graphopt.passbase import (
        Pass as Pass,
    )
    from graphopt.passbase import (
        PassContext as PassContext,
    )
    from graphopt.pipeline import Pipeline as Pipeline
    from graphopt.plan import Plan as Plan
    from graphopt.plan import Role as Role
    from graphopt.plan import Signature as Signature
    from graphopt.plan import Slot as Slot
    from graphopt.text import parse_graph as parse_graph
    from graphopt.text import print_graph as print_graph


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
