"""Numbers that forward reads as inputs of the graph: counters, schedules, timesteps.

Dynamo makes symbols of the numbers that it is told to. What a captured forward computes with these
symbols alone stays outside of the graph, in Python, as in eager (a counter that goes up). Where a
number meets a tensor it enters the graph as a tensor without dimensions, which is what eager makes
of it too in arithmetic, and is read off that tensor for all else, so results keep their bits. Whole
numbers that are no factors, such as indices, are symbols of the graph like sizes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.capture.number_symbols import NONE, Numbers
from graphopt.capture.sizes import is_size
from graphopt.capture.varied_calls import can_replace, replace_call

# Where a number and a tensor without dimensions are the same to eager.
_ARITHMETIC = frozenset(
    getattr(module, name)
    for module, names in (
        (operator, "add sub mul truediv iadd isub imul itruediv"),
        (torch, "add sub mul div true_divide multiply subtract divide"),
    )
    for name in names.split()
)
_METHODS = frozenset(["add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "true_divide"])


@dataclass(frozen=True)
class Outside:
    """What of a captured call is computed with numbers, outside of the graph.

    Attributes:
        numbers: positions of the inputs that are numbers.
        sizes: positions of those that are sizes, which the graph has, too.
        program: from these to the numbers that the graph takes and those that are returned.
        taken: the dtypes of the tensors that the graph takes them as, after its other inputs;
            ``None`` where it takes the number itself.
        returned: positions of the outputs that are numbers.
    """

    numbers: tuple[int, ...]
    sizes: tuple[int, ...]
    program: fx.GraphModule
    taken: tuple[torch.dtype | None, ...]
    returned: tuple[int, ...]

    def split(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The inputs of the graph, and the numbers that are outputs."""
        computed = self.program(*(inputs[i] for i in (*self.numbers, *self.sizes)))
        numbers = set(self.numbers)
        tensors = [value for i, value in enumerate(inputs) if i not in numbers]
        count = len(self.taken)
        made = [
            number if dtype is None else torch.scalar_tensor(number, dtype=dtype, device="cpu")
            for number, dtype in zip(computed[:count], self.taken, strict=True)
        ]
        return (*tensors, *made), tuple(computed[count:])

    def join(self, outputs: Sequence[Any], numbers: Sequence[Any]) -> tuple[Any, ...]:
        """All outputs, with the numbers in their places."""
        found = list(outputs)
        for position, number in zip(self.returned, numbers, strict=True):
            found.insert(position, number)
        return tuple(found)

    def around(self, run: Callable[[Sequence[Tensor]], Sequence[Any]]) -> Callable[..., Any]:
        """From a runner over the inputs of the graph to one over all inputs."""

        def call(inputs: Sequence[Any]) -> Sequence[Any]:
            tensors, numbers = self.split(inputs)
            return self.join(run(tensors), numbers)

        return call


def take_out(module: fx.GraphModule, wanted: Numbers = NONE) -> Outside | None:
    """Move what is computed with numbers alone out of a torch-level graph, in place.

    Args:
        module: as Dynamo made it.
        wanted: how numbers may enter.

    Returns:
        What was moved; ``None`` where the graph has no numbers as inputs.
    """
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    sizes = [n for n in inputs if is_size(n)]
    numbers = [n for n in inputs if (_is_number(n) and n not in sizes) or _is_boxed(n)]
    if not numbers:
        return None
    outside, known = _computed_with(numbers, sizes, graph)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    returned = [i for i, node in enumerate(results) if node in outside]
    output.args = (tuple(node for node in results if node not in outside),)
    taken = _enter(graph, outside, wanted)
    entering = [number for number, _ in taken]
    results = [*entering, *(results[i] for i in returned)]
    program = _program([*numbers, *sizes], known, results)
    for node in reversed([n for n in graph.nodes if n in outside]):
        graph.erase_node(node)
    module.recompile()
    dtypes = tuple(dtype for _, dtype in taken)
    places, known_sizes = (tuple(map(inputs.index, nodes)) for nodes in (numbers, sizes))
    return Outside(places, known_sizes, program, dtypes, tuple(returned))


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_number(node: fx.Node) -> bool:
    return isinstance(_value(node), torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_boxed(node: fx.Node) -> bool:
    """Whether this input is a float, which Dynamo passes as a tensor and reads by ``item``."""
    # What is read off a tensor of the user depends on data, and has no hint.
    read = [_value(n) for n in node.users if n.target == "item"]
    return any(isinstance(v, torch.SymFloat) and v.node.has_hint() for v in read)


Known = dict[fx.Node, fx.Node | None]


def _computed_with(
    numbers: Sequence[fx.Node], sizes: Sequence[fx.Node], graph: fx.Graph
) -> tuple[dict[fx.Node, None], Known]:
    """What depends on numbers, and on nothing but numbers and sizes of inputs.

    Returns:
        These nodes; and all that is known without the tensors, each with the input that it equals
        where it is the size of a tensor.
    """
    symbols = {_value(n).node.expr: n for n in sizes}
    found = dict.fromkeys(numbers)
    known: Known = dict.fromkeys([*numbers, *sizes])
    for node in graph.nodes:
        needed = node.all_input_nodes
        if not node.op.startswith("call") or not needed:
            continue
        value = _value(node)
        if all(n in known for n in needed):
            varies = any(n in found for n in needed)
            # A check of a number returns nothing.
            if _is_number(node) or (value is None and not node.users and varies):
                known[node] = None
                if varies:
                    found[node] = None
        elif isinstance(value, torch.SymInt) and value.node.expr in symbols:
            known[node] = symbols[value.node.expr]
    return found, known


Taken = list[tuple[fx.Node, torch.dtype | None]]


def _enter(graph: fx.Graph, outside: dict[fx.Node, None], wanted: Numbers) -> Taken:
    """Make inputs of the numbers that meet tensors; these, in order."""
    taken: Taken = []
    modes = (_value(n).fake_mode for n in graph.nodes if isinstance(_value(n), FakeTensor))
    mode = next(modes, None)

    def enter(number: fx.Node, dtype: torch.dtype | None, value: Any) -> fx.Node:
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            made = graph.placeholder(_called(number, graph))
        made.meta["example_value"] = value
        taken.append((number, dtype))
        return made

    for number in outside:
        users = [n for n in number.users if n not in outside and n.op != "output"]
        if not users or mode is None:
            continue
        value = _value(number)
        if isinstance(value, torch.SymBool):
            _fix(users, number, bool(value))
            continue
        whole = isinstance(value, torch.SymInt)
        dtype = torch.int64 if whole else torch.float64
        one = mode.from_tensor(torch.scalar_tensor(1, dtype=dtype, device="cpu"))
        tensor: fx.Node | None = None
        others = []
        for user in users:
            arithmetic = _is_arithmetic(user, number)
            if not arithmetic and not can_replace(user, number):
                others.append(user)
                continue
            tensor = tensor or enter(number, dtype, one)
            if arithmetic:
                user.replace_input_with(number, tensor)
            else:
                replace_call(user, number, tensor)
        if not others:
            continue
        if whole and not wanted.symbols:
            _fix(others, number, int(value))
            continue
        if whole or wanted.backed:
            read = enter(number, None, value)
        else:
            tensor = tensor or enter(number, dtype, one)
            with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
                read = graph.call_method("item", (tensor,))
            read.meta["example_value"] = value
        for user in others:
            user.replace_input_with(number, read)
    return taken


def _fix(users: Sequence[fx.Node], number: fx.Node, value: int) -> None:
    """Let calls have the value of this call, which has become a condition of the graph."""
    for user in users:
        user.args, user.kwargs = fx.map_arg(
            (user.args, user.kwargs), lambda node: value if node is number else node
        )


def _called(number: fx.Node, graph: fx.Graph) -> str:
    """What an input is called that is computed with these numbers."""
    bases: dict[fx.Node, None] = {}
    seen = [number]
    while seen:
        node = seen.pop()
        seen += node.all_input_nodes
        if node.op == "placeholder":
            bases[node] = None
    names = [str(n.target).removeprefix("L_").removeprefix("self_").strip("_") for n in bases]
    name = "_".join(dict.fromkeys(sorted(names)))
    there = {str(node.target) for node in graph.find_nodes(op="placeholder")}
    while name in there:
        name += "_"
    return name


def _is_arithmetic(user: fx.Node, number: fx.Node) -> bool:
    """Whether a tensor without dimensions does to a user of a number what the number does."""
    targets = _METHODS if user.op == "call_method" else _ARITHMETIC
    tensors = [v for n in user.all_input_nodes if isinstance(v := _value(n), Tensor)]
    whole = isinstance(_value(number), torch.SymInt)
    # A tensor with dimensions decides what comes out, whatever the number is a tensor of.
    fits = bool(tensors) and all(v.dim() > 0 and (v.is_floating_point() or whole) for v in tensors)
    name = user.target if isinstance(user.target, str) else user.target.__name__
    # A number that is divided by a tensor is multiplied by the reciprocal.
    first = user.args and user.args[0] is number and name in ("truediv", "itruediv")
    return (
        user.target in targets
        and fits
        and not first
        and number in user.args
        and number not in user.kwargs.values()
    )


def _program(inputs: Sequence[fx.Node], known: Known, results: Sequence[fx.Node]) -> fx.GraphModule:
    """What is computed outside, as a module of its own over numbers and sizes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*inputs, *(n for n in known if n not in set(inputs))):
        same = known[node]
        copies[node] = copies[same] if same else graph.node_copy(node, copies.__getitem__)
        copies[node].meta.clear()
    graph.output(tuple(copies[node] for node in results))
    graph.eliminate_dead_code()
    return fx.GraphModule(torch.nn.Module(), graph)
