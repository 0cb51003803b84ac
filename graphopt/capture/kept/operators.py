"""What a graph calls without a look inside: no condition leads to the code behind it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from types import FunctionType

import torch.library
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

import graphopt
from graphopt.capture.kept.fingerprints import Unkept

# Whose code is part of the key of a capture.
_OURS = frozenset({"aten", "prims", "_c10d_functional", "graphopt"})
_FOLDERS = tuple(f"{package.__path__[0]}{os.sep}" for package in (torch, graphopt))
# Kernels that decide what a graph is made of; those of a processor run when the graph does.
_TRACED = ("Autograd", "Composite", "Autocast")


def own_operators_only(*modules: fx.GraphModule) -> None:
    """A graph is made from what the code of an operator was: its parts, its backward.

    Args:
        modules: graphs of the call, before and behind its derivation.

    Raises:
        Unkept: one calls an operator of another package, or a function that Dynamo does not go
            through (`allow_in_graph`).
    """
    for target in (target for module in modules for target in _targets(module)):
        if isinstance(target, FunctionType):
            if not target.__code__.co_filename.startswith(_FOLDERS):
                name = target.__qualname__
                raise Unkept(f"it calls {name}, of which Dynamo does not see the code")
            continue
        if not isinstance(target, OpOverload | OpOverloadPacket):
            continue
        packet = target if isinstance(target, OpOverloadPacket) else target.overloadpacket
        name = packet._qualified_op_name
        if name.partition("::")[0] not in _OURS:
            raise Unkept(f"it calls {name}, an operator whose code is not known")


def kernels_of_torch_only() -> None:
    """Whether ATen's operators are what torch has made of them.

    Raises:
        Unkept: somebody has registered another derivative or decomposition of one.
    """
    for key in torch.library._impls:
        namespace, _, name = key.partition("/")
        name, _, kind = name.rpartition("/")
        if namespace == "aten" and kind.startswith(_TRACED):
            raise Unkept(f"aten::{name} has another kernel for {kind}")


def _targets(module: fx.GraphModule) -> Iterator[object]:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                yield from _targets(inner)
        elif node.op == "call_function":
            yield node.target
