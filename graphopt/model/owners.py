"""Whose objects are followed: those of the user, not the insides of Python and of libraries."""

from __future__ import annotations

import sys
import threading
import weakref
from enum import Enum, EnumMeta
from types import SimpleNamespace

from torch import nn

# Packages whose objects keep no state of a step, or keep the world (a trainer, a data loader).
_CLOSED = frozenset(
    {
        *("torch", "numpy", "builtins", "types", "typing", "abc", "enum", "functools", "inspect"),
        *("importlib", "logging", "threading", "_thread", "multiprocessing", "concurrent"),
        *("asyncio", "queue", "weakref", "io", "os", "pathlib", "re", "datetime", "decimal"),
        *("fractions", "sympy", "triton", "tokenizers", "lightning", "pytorch_lightning"),
        *("wandb", "tensorboard", "pandas"),
    }
)
# Functions of these keep no state of a step in globals.
_LIBRARIES = frozenset({"torch", "torchvision", "timm", "transformers", "functools", "contextlib"})
_OPEN = ("torch.distributions.",)
_OWN = ("graphopt.model.", "graphopt.runtime.", "graphopt.api", "graphopt.compiler")
# Of Python's own: what only holds what the user put into it.
_HOLDERS = (
    nn.Module,
    SimpleNamespace,
    threading.local,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
)
# Classes that are made while a program runs have the name of what has made them.
_MAKERS = frozenset({"abc", "types"})
_INSTALLED = ("/site-packages/", "/dist-packages/", "\\site-packages\\")


def is_open(value: object) -> bool:
    """Whether attributes of an object may be state of a step."""
    if isinstance(value, _HOLDERS):
        return True
    package = home_of(type(value))
    if isinstance(value, (type, Enum)) or package.startswith(_OWN):
        return False
    return package.partition(".")[0] not in _CLOSED or package.startswith(_OPEN)


def home_of(kind: type) -> str:
    """The module that a class is from, or else the nearest of its bases that is from one."""
    names = (str(base.__module__) for base in kind.__mro__)
    return next(name for name in names if name not in _MAKERS)


def is_library(module: str | None) -> bool:
    """Whether functions of a module keep no state of a step."""
    return (module or "").partition(".")[0] in _LIBRARIES


def is_users(module: str | None) -> bool:
    """Whether a module is of the user: not of Python, not installed as a package.

    Classes and functions of such a module are followed wherever a name leads to them. Following
    them in all packages would lead through the whole process.
    """
    name = module or ""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top in _CLOSED or top in _LIBRARIES:
        return False
    if name.startswith(_OWN):
        return False
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    return not any(folder in file for folder in _INSTALLED)


def is_users_class(value: object) -> bool:
    """Whether a value is a class of the user."""
    return isinstance(value, type) and not isinstance(value, EnumMeta) and is_users(home_of(value))
