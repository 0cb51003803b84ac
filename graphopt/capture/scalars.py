"""Numbers that forward reads as inputs of the graph: counters, schedules, timesteps.

Dynamo makes symbols of the numbers that it is told to. What a captured forward computes with these
symbols alone stays outside of the graph, in Python, as in eager (a counter that goes up). Where a
number meets a tensor it enters the graph as a tensor without dimensions, which is what eager makes
of it too, so results keep their bits.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo import pgo
from torch._dynamo.variables import builder

from graphopt.capture.sizes import is_size
from graphopt.errors import CaptureError

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


@contextmanager
def as_inputs(sources: Iterable[str]) -> Iterator[None]:
    """Let Dynamo make inputs of the numbers with these sources, and constants of all others."""
    wanted = frozenset(sources)
    if not wanted:
        yield
        return

    def process(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
        return replace(entry, scalar=pgo.auto_dynamic) if name in wanted else entry

    patterns = ",".join(f"{re.escape(s)}$" for s in sorted(wanted) if "," not in s and ":" not in s)
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.config.patch(dynamic_sources=patterns))  # type: ignore[attr-defined]
        stack.enter_context(torch._dynamo.config.patch(specialize_float=False))
        stack.enter_context(mock.patch.object(builder, "process_automatic_dynamic", process))
        yield


@dataclass(frozen=True)
class Outside:
    """What of a captured call is computed with numbers, outside of the graph.

    Attributes:
        numbers: positions of the inputs that are numbers.
        program: from these numbers to those that the graph takes and those that are returned.
        taken: the dtypes of the tensors that the graph takes them as, after its other inputs.
        returned: positions of the outputs that are numbers.
    """

    numbers: tuple[int, ...]
    program: fx.GraphModule
    taken: tuple[torch.dtype, ...]
    returned: tuple[int, ...]

    def split(self, inputs: Sequence[Any]) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
        """The inputs of the graph, and the numbers that are outputs."""
        computed = self.program(*(inputs[i] for i in self.numbers))
        numbers = set(self.numbers)
        tensors = [value for i, value in enumerate(inputs) if i not in numbers]
        count = len(self.taken)
        made = [
            torch.scalar_tensor(number, dtype=dtype)
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


def take_out(module: fx.GraphModule) -> Outside | None:
    """Move what is computed with numbers alone out of a torch-level graph, in place.

    Returns:
        What was moved; ``None`` where the graph has no numbers as inputs.

    Raises:
        CaptureError: a number meets an operator for which it is no tensor.
    """
    graph = module.graph
    inputs = graph.find_nodes(op="placeholder")
    numbers = [n for n in inputs if (_is_number(n) and not is_size(n)) or _is_boxed(n)]
    if not numbers:
        return None
    outside = _computed_with(numbers, graph)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    returned = [i for i, node in enumerate(results) if node in outside]
    output.args = (tuple(node for node in results if node not in outside),)
    taken = _enter(graph, outside)
    program = _program(numbers, outside, [*taken, *(results[i] for i in returned)])
    for node in reversed([n for n in graph.nodes if n in outside]):
        graph.erase_node(node)
    module.recompile()
    dtypes = tuple(taken.values())
    return Outside(tuple(map(inputs.index, numbers)), program, dtypes, tuple(returned))


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def _is_number(node: fx.Node) -> bool:
    return isinstance(_value(node), torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_boxed(node: fx.Node) -> bool:
    """Whether this input is a float, which Dynamo passes as a tensor and reads by ``item``."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    return type(source).__name__ == "FloatTensorSource"


def _computed_with(numbers: Sequence[fx.Node], graph: fx.Graph) -> dict[fx.Node, None]:
    """The inputs that are numbers, and everything that depends on nothing else."""
    found = dict.fromkeys(numbers)
    for node in graph.nodes:
        needed = node.all_input_nodes
        if node.op.startswith("call") and needed and all(n in found for n in needed):
            if _is_number(node):
                found[node] = None
            elif _value(node) is None and not node.users:
                found[node] = None  # a check of a number
    return found


def _enter(graph: fx.Graph, outside: dict[fx.Node, None]) -> dict[fx.Node, torch.dtype]:
    """Make inputs of the numbers that meet tensors; their dtypes, in order."""
    taken: dict[fx.Node, torch.dtype] = {}
    last = graph.find_nodes(op="placeholder")[-1]
    for number in outside:
        users = [n for n in number.users if n not in outside and n.op != "output"]
        if not users:
            continue
        for user in users:
            _check_arithmetic(user, number)
        value = _value(number)
        whole = isinstance(value, torch.SymInt)
        dtype = torch.int64 if whole else torch.float64
        hint = 1 if whole else 1.0
        with graph.inserting_after(last):
            last = graph.placeholder(f"number_{number.name}")
        mode = next(_value(n).fake_mode for n in user.all_input_nodes if _is_fake(n))
        last.meta["example_value"] = mode.from_tensor(torch.scalar_tensor(hint, dtype=dtype))
        for user in users:
            user.replace_input_with(number, last)
        taken[number] = dtype
    return taken


def _is_fake(node: fx.Node) -> bool:
    return hasattr(_value(node), "fake_mode")


def _check_arithmetic(user: fx.Node, number: fx.Node) -> None:
    """A tensor with dimensions decides what comes out, whatever the number is a tensor of."""
    targets = _METHODS if user.op == "call_method" else _ARITHMETIC
    tensors = [v for n in user.all_input_nodes if isinstance(v := _value(n), Tensor)]
    whole = isinstance(_value(number), torch.SymInt)
    fits = bool(tensors) and all(v.dim() > 0 and (v.is_floating_point() or whole) for v in tensors)
    plain = user.args and all(n not in user.kwargs.values() for n in [number])
    if user.target not in targets or not fits or not plain or number not in user.args:
        raise CaptureError(
            f"a number that changes meets {user.target}, which takes no tensor for it",
            hint="keep it in a tensor: register_buffer",
        )


def _program(
    numbers: Sequence[fx.Node], outside: dict[fx.Node, None], results: Sequence[fx.Node]
) -> fx.GraphModule:
    """What is computed outside, as a module of its own over the numbers."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in (*numbers, *(n for n in outside if n not in set(numbers))):
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta.clear()
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(torch.nn.Module(), graph)
