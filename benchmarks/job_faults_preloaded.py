"""What the server has imported that ranks of ``job_faults`` are forked from; starts no thread."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import graphopt

for found in pkgutil.walk_packages(graphopt.__path__, "graphopt."):
    if not found.name.startswith(("graphopt.__main__", "graphopt.cli", "graphopt.render")):
        import_module(found.name)
import_module("torch._dynamo.backends.common")
