"""Functions of Python's own library that Dynamo goes through, and has no conditions on.

Dynamo takes modules of that library for constant. Another process has to find the same code under
the same names, whoever may have assigned other functions to them.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import types
from collections.abc import Iterable
from typing import Any

from graphopt.capture.kept.fingerprints import Fingerprints
from graphopt.capture.kept.sources import Misfit, Unreadable

_HERE, _OTHERS = (f"{sysconfig.get_path(name)}{os.sep}" for name in ("stdlib", "purelib"))


def library_of(traced: Iterable[types.CodeType], of: Fingerprints) -> list[list[str]]:
    """Module, name and fingerprint of the functions with this code that are in Python's library.

    Args:
        traced: code of any function.
        of: fingerprints, which know the code then.
    """
    found = {}
    for code in traced:
        file, name = code.co_filename, code.co_qualname.partition(".<locals>")[0]
        if file.startswith(_HERE) and not file.startswith(_OTHERS):
            for module in _modules_of(file):
                inside = _function(module, name)
                if inside is not None:
                    found[module, name] = of.code(inside)
                    break
    return [[module, name, told] for (module, name), told in found.items()]


def same_library(rows: object, of: Fingerprints) -> None:
    """Look whether the functions are the same in this process.

    Raises:
        Misfit: one is not.
        Unreadable: these are no such functions.
    """
    if not isinstance(rows, list):
        raise Unreadable("it does not say which functions of Python it goes through")
    for row in rows:
        if not isinstance(row, list) or [type(part) for part in row] != [str, str, str]:
            raise Unreadable("a function of Python that cannot be read")
        module, name, told = row
        code = _function(module, name)
        if code is None or of.code(code) != told:
            raise Misfit(f"{module}.{name} is another one")


def _modules_of(file: str) -> list[str]:
    return [
        name
        for name, module in list(sys.modules.items())
        if isinstance(module, types.ModuleType) and vars(module).get("__file__") == file
    ]


def _function(module: str, name: str) -> types.CodeType | None:
    """The code of what a module that was imported has under a name."""
    at: Any = sys.modules.get(module)
    for part in name.split("."):
        at = vars(at).get(part) if isinstance(at, types.ModuleType | type) else None
    if isinstance(at, staticmethod | classmethod):
        at = at.__func__
    if isinstance(at, property):
        at = at.fget
    return at.__code__ if isinstance(at, types.FunctionType) else None
