"""Attributes that forward changes for a while, and that are at the end what they were.

A library sets a flag of a configuration or of a collector, calls its layers, and puts the flag
back. Dynamo writes such an attribute again after each call; nothing is different then. That it
still has this value becomes a condition of the capture, so that the write can be left out.
"""

from __future__ import annotations

import functools
from typing import Any

from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.source import AttrSource
from torch._dynamo.variables import ConstantVariable, UserDefinedObjectVariable
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.misc import DeletedVariable

# Numbers are left to those who look for counters.
_FLAGS = (type(None), bool, str)


def puts_back(effects: SideEffects, variable: VariableTracker) -> bool:
    """Whether all that calls assign to an object that was there is what it has already.

    Args:
        effects: of the forward that Dynamo has read to its end.
        variable: of the object.
    """
    if not isinstance(variable, UserDefinedObjectVariable) or variable.source is None:
        return False
    assigned = effects.store_attr_mutations.get(variable)
    if not assigned or variable.is_base_vt_modified(effects):
        return False
    guards = []
    for name, value in assigned.items():
        source = AttrSource(variable.source, name)
        if isinstance(value, DeletedVariable):
            if hasattr(variable.value, name):
                return False
            absent = functools.partial(GuardBuilder.HASATTR, attr=name)
            guards.append(variable.source.make_guard(absent))
        elif value.source != source:
            if not _has(variable.value, name, value.realize()):
                return False
            guards.append(source.make_guard(GuardBuilder.CONSTANT_MATCH))
    install_guard(*guards)
    return True


def _has(owner: Any, name: str, value: VariableTracker) -> bool:
    """Whether an attribute of an object, with no code behind it, is this flag."""
    own = getattr(owner, "__dict__", {})
    if not isinstance(value, ConstantVariable) or name not in own or _is_computed(owner, name):
        return False
    flag = value.value
    return type(flag) in _FLAGS and type(own[name]) is type(flag) and own[name] == flag


def _is_computed(owner: Any, name: str) -> bool:
    found = next((vars(c)[name] for c in type(owner).__mro__ if name in vars(c)), None)
    return hasattr(type(found), "__set__")
