"""What an operator does besides computing its result, from its schema and tags.

The answer decides what a pass may delete, merge, move or compute once. It errs on the safe side: an
operator that graphopt does not know is opaque, and nothing is done to it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from typing import Any

import torch
from torch import fx

from graphopt.ops.numbers import number_function

_KNOWN_NAMESPACES = frozenset({"aten", "prims"})
_FROZEN = "graphopt::frozen"
# Functional operators whose only purpose is a check.
_CHECKS = ("assert", "sym_constrain", "dep_token")


class Effect(StrEnum):
    """What running a node does.

    ``PURE``: computes its result from its operands and does nothing else. ``RANDOM``: also advances
    a random number generator, so that deleting or repeating it changes later draws. ``VISIBLE``:
    writes into an operand, or checks something. ``OPAQUE``: a higher-order operator, a collective
    or an operator of another library, of which graphopt knows nothing.
    """

    PURE = "pure"
    RANDOM = "random"
    VISIBLE = "visible"
    OPAQUE = "opaque"


def effect_of(node: fx.Node) -> Effect:
    """What running `node` does; node.op is neither ``placeholder`` nor ``output``."""
    if node.op == "get_attr":
        return Effect.PURE
    return _effect(node.target) if node.op == "call_function" else Effect.OPAQUE


def is_repeatable(node: fx.Node) -> bool:
    """Whether equal operands always give an equal result, of a shape known in advance."""
    if node.op != "call_function" or effect_of(node) is not Effect.PURE:
        return False
    return _has_known_result(node.target)


def writes(node: fx.Node) -> bool:
    """Whether `node` changes one of its operands in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


@cache
def _effect(target: Callable[..., Any]) -> Effect:
    if not isinstance(target, torch._ops.OpOverload):
        pure = target is operator.getitem or number_function(target)
        return Effect.PURE if pure else Effect.OPAQUE
    schema = target._schema
    if schema.is_mutable:
        return Effect.VISIBLE
    draws = any("Generator" in str(a.type) for a in schema.arguments)
    if draws or torch.Tag.nondeterministic_seeded in target.tags:
        return Effect.RANDOM
    if target.namespace not in _KNOWN_NAMESPACES and schema.name != _FROZEN:
        return Effect.OPAQUE
    if not schema.returns or any(word in schema.name for word in _CHECKS):
        return Effect.VISIBLE
    return Effect.PURE


@cache
def _has_known_result(target: Callable[..., Any]) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return True
    uninitialised = "empty" in target._schema.name
    unknown = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(target.tags)
    return not uninitialised and not unknown
