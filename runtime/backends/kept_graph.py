"""A graph that Inductor compiles as data, and the same graph in another process.

The code generator has a cache of its own, under the text of the graph and the forms of its inputs.
It is found again only where all of these are the same, names of nodes included, so a graph is
compiled as it is read from its data, also in the process that has written them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode

from graphopt.runtime.backends.kept_code import code_data
from graphopt.runtime.backends.kept_words import (
    Unreadable,
    Untold,
    callable_of,
    check_call,
    line_of,
    looked_up,
    plain,
    tensor_of,
)

_MOST = 1 << 16  # inputs
_ORDER = ("placeholder", "get_attr", "call_function", "output")


def graph_data(module: fx.GraphModule) -> dict[str, Any]:
    """A graph with the forms of its inputs as data.

    Raises:
        Untold: there is something in it that is no operator on tensors of fixed sizes.
    """
    inputs = module.graph.find_nodes(op="placeholder")
    forms = [_form(node.meta.get("val")) for node in inputs]
    return {**code_data(module.graph, module), "forms": forms}


def _form(value: object) -> list[Any]:
    if not isinstance(value, FakeTensor) or value.layout is not torch.strided:
        raise Untold("an input is no plain tensor")
    if value.is_conj() or value.is_neg():
        raise Untold("an input is conjugated")
    # Where it begins in its memory says how it is aligned.
    sizes, strides, offset = tuple(value.shape), tuple(value.stride()), value.storage_offset()
    if any(type(n) is not int for n in (*sizes, *strides, offset)):
        raise Untold("an input has a size that is a symbol")
    dtype = str(value.dtype).removeprefix("torch.")
    return [list(sizes), list(strides), offset, dtype, str(value.device)]


def module_of(data: Any, mode: FakeTensorMode) -> fx.GraphModule:
    """The graph that data is about; only its inputs have values.

    Args:
        data: of `graph_data`.
        mode: of the fake tensors that its inputs are.

    Raises:
        Unreadable: it is not what was written.
    """
    try:
        return _module(data, mode)
    except Unreadable:
        raise
    except Exception as error:  # what was edited by hand fails anywhere
        raise Unreadable(f"{type(error).__name__}: {error}") from error


def retold(module: fx.GraphModule, data: Any, mode: FakeTensorMode) -> fx.GraphModule:
    """The graph that data of this one is about, with what is known of each node.

    Args:
        module: whose data it is.
        data: of `graph_data`.
        mode: of the values in `module`.

    Raises:
        Unreadable: its data cannot be read back.
    """
    made = module_of(data, mode)
    nodes = sorted(module.graph.nodes, key=lambda node: _ORDER.index(node.op))
    for node, same in zip(nodes, made.graph.nodes, strict=True):
        same.meta = {**node.meta, **same.meta}
    return made


def _module(data: Any, mode: FakeTensorMode) -> fx.GraphModule:
    root, graph = torch.nn.Module(), fx.Graph()
    forms = data["forms"]
    if type(data["inputs"]) is not int or data["inputs"] != len(forms) or len(forms) > _MOST:
        raise Unreadable("it has no such inputs")
    values: list[fx.Node] = []
    for number, form in enumerate(forms):
        values.append(graph.placeholder(f"v{number}"))
        values[-1].meta["val"] = _fake(form, mode)
    constants = []
    for number, constant in enumerate(data["constants"]):
        name = f"_constant_{number}"
        root.register_buffer(name, tensor_of(constant), persistent=False)
        constants.append(graph.create_node("get_attr", name))

    def argument(value: Any) -> Any:
        if type(value) is list:
            return [argument(item) for item in value]
        if type(value) is not dict:
            return plain(value)
        ((what, which),) = value.items()
        places = {"v": values, "c": constants}.get(what)
        if places is None:
            return looked_up(what, which)
        if type(which) is not int or not 0 <= which < len(places):
            raise Unreadable("a value that there is not")
        return places[which]

    calls = [callable_of(name) for name in data["operators"]]
    for row in data["lines"]:
        index, arguments, named = line_of(row, len(calls))
        target = calls[index]
        check_call(target, arguments, named)
        given = {key: argument(value) for key, value in named.items()}
        values.append(graph.call_function(target, tuple(map(argument, arguments)), given))
    graph.output(tuple(map(argument, data["returns"])))
    return fx.GraphModule(root, graph)


def _fake(form: Any, mode: FakeTensorMode) -> Tensor:
    sizes, strides, offset, dtype, device = form
    kind, numbers = looked_up("torch", dtype), (*sizes, *strides, offset)
    if not isinstance(kind, torch.dtype) or not all(type(n) is int and n >= 0 for n in numbers):
        raise Unreadable("an input of no form")
    reach = 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if 0 in sizes:
        reach = 0
    if (offset + max(reach, math.prod(sizes))) * kind.itemsize >= 1 << 62:
        raise Unreadable("an input of no form")
    with mode:
        memory = torch.empty(offset + reach, dtype=kind, device=torch.device(device))
        return memory.as_strided(sizes, strides, offset)
