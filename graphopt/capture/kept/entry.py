"""One kept capture: written when a call was captured, read for an equal call of another process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

import torch
from torch import Tensor, nn
from torch._dynamo import utils
from torch._guards import Source

from graphopt.capture.flat import Bind, Runner, name_inputs
from graphopt.capture.guards import Constants, Guard
from graphopt.capture.kept.building import branches, logs_around
from graphopt.capture.kept.classes import read_classes
from graphopt.capture.kept.conditions import Kept, conditions_of
from graphopt.capture.kept.fingerprints import Fingerprints, Unkept
from graphopt.capture.kept.graphs import graph_data, read_graph
from graphopt.capture.kept.logs import read_logs, silent
from graphopt.capture.kept.results import Make, maker
from graphopt.capture.kept.returned import Returned, objects, same
from graphopt.capture.kept.sizes import (
    Symbolic,
    Varying,
    fits,
    relations,
    sizes_data,
    symbols_of,
)
from graphopt.capture.kept.sources import Misfit, Unreadable, Writer, reader
from graphopt.capture.sizes import Size, Watch
from graphopt.graph import Graph
from graphopt.plan import OutputAlias, Plan, Role, Signature, Slot

_PRIMAL = (Role.PARAM, Role.BUFFER, Role.INPUT, Role.SIZE)
_AROUND = "forward does more around its graph than take inputs and return results"
_READS = ("call_size", "call_stride", "call_storage_offset")


class Behind(Protocol):
    """What an earlier process has made of a graph."""

    @property
    def plan(self) -> Plan:
        """That of the graph."""


@dataclass(frozen=True)
class Entry:
    """A kept capture, bound to a model of this process.

    Attributes:
        graph: its graph, a new one; ``None`` where what stands behind it is there.
        behind: that.
        signature: of the graph.
        aliases: outputs that are inputs, or views of them.
        inputs: the tensors of the call.
        slots: their names.
        bind: makes a call of the model out of a runner.
        guard: whether a call is one that it is for.
        notes: what the user should know about how it was captured.
        functions: what forward calls; see `Capture`.
        sizes: those that were to be symbols, and what became of them.
        watch: of what is asked of symbols from now on; ``None`` where there are none.
    """

    graph: Graph | None
    behind: Behind | None
    signature: Signature
    aliases: tuple[OutputAlias, ...]
    inputs: tuple[Any, ...]
    slots: tuple[Slot, ...]
    bind: Bind
    guard: Guard
    notes: tuple[str, ...]
    functions: str
    sizes: tuple[Size, ...]
    watch: Watch | None


def described(
    output: Any,
    inputs: Sequence[Any],
    bind: Bind,
    results: int,
    call: Callable[[Callable[..., object]], object],
    variables: Mapping[str, object],
    varying: Varying | None = None,
) -> dict[str, Any]:
    """A call that Dynamo has captured, as data without its graph.

    Args:
        output: Dynamo's.
        inputs: the tensors of the call, and the sizes that are symbols.
        bind: makes a call of the model out of a runner.
        results: how many results the runner has.
        call: makes the captured call with another function.
        variables: of the code of forward in that call.
        varying: the symbols; ``None`` where there are none.

    Raises:
        Unkept: it depends on something that cannot be told.
    """
    captured = output.graph_capture_output
    graph = output.backend_input.backend_id
    logs = logs_around(captured.bytecode, graph, captured.f_globals)
    reads = sum(not isinstance(value, Tensor) for value in inputs)
    # What is read off tensors in a run is all there is where each step runs once.
    if logs is None or (reads and branches(captured.bytecode)):
        raise Unkept(_AROUND)
    outputs = [torch.empty(()) for _ in range(results)]
    run = _Run(outputs)
    with silent(logs):
        with run.counting():
            first = call(bind(run))
        second = call(bind(lambda _: tuple(outputs)))
    if (run.reads, run.reads_later) != (reads, 0):  # so each of the calls that were counted is one
        raise Unkept(_AROUND)
    state, of = captured.output_graph, Fingerprints()
    writer = Writer(state.name_of_builtins_dict_key_in_fglobals)
    scope = {"L": variables, "G": state.global_scope}
    tensors = [
        g.originating_source for g in state.guards if g.create_fn_name() == "TENSOR_MATCH"
    ]  # fmt: skip
    values = reader(tensors)(scope["L"], scope["G"])
    at = {id(v): writer.add(s) for s, v in zip(tensors, values, strict=True)}
    returned = Returned(first, outputs, {id(t): at[id(t)] for t in inputs if id(t) in at}, of)
    if {*map(id, objects(first))} & {*map(id, objects(second))}:
        raise Unkept("forward returns a list, a dictionary or an object that was there before")
    told = (state, scope, captured.import_sources, captured.traced_code, writer, of)
    conditions = conditions_of(*told, symbolic=varying is not None)
    if varying is not None:
        conditions["sizes"] = sizes_data(varying, writer)
    description = {
        **conditions,
        "inputs": [_place(i, value, at, varying, writer) for i, value in enumerate(inputs)],
        "logs": logs,
        "classes": returned.classes,
        "returns": returned.data,
        "results": results,
        "places": writer.rows,
    }
    again = _maker(description)(outputs, inputs)
    if not same(first, again) or not same(second, again):
        name = type(first).__qualname__
        raise Unkept(f"forward returns an object of class {name} that no data holds")
    return description


def _maker(data: Mapping[str, Any]) -> Make:
    """What makes the result of a call of those of the graph and of its inputs.

    Raises:
        Misfit: a class in it has changed.
        Unreadable: the data says nothing of the kind.
    """
    places, results = data["inputs"], data["results"]
    known = read_classes(data.get("classes"), Fingerprints())
    return maker(data.get("returns"), results, {place: i for i, place in enumerate(places)}, known)


def _place(
    position: int, value: Any, at: Mapping[int, int], varying: Varying | None, writer: Writer
) -> int:
    """Where an input of the graph is in a call."""
    if isinstance(value, Tensor):
        if id(value) not in at:
            raise Unkept(f"a tensor of shape {tuple(value.shape)} has no place of its own")
        return at[id(value)]
    source = varying.inputs[position] if varying is not None else None
    if source is None:
        raise Unkept("a number that is an input of its graph has no place of its own")
    return writer.add(source)


class _Run:
    """Stands for a graph in a call, and counts what the call reads off tensors.

    Attributes:
        reads: how often it has read a size, a stride or an offset.
        reads_later: how often behind the graph.
    """

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self.reads = self.reads_later = 0
        self._outputs = outputs
        self._ran = False

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Tensor]:
        """The results."""
        self._ran = True
        return tuple(self._outputs)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, count what Dynamo's code reads."""

        def counted(function: Callable[..., int]) -> Callable[..., int]:
            def read(*args: Any) -> int:
                self.reads += 1
                self.reads_later += self._ran
                return function(*args)

            return read

        with ExitStack() as stack:
            for name in _READS:
                own = counted(getattr(utils, name))
                stack.enter_context(mock.patch.object(utils, name, own))
            yield


def entry_of(
    description: Mapping[str, Any],
    graph: Graph,
    aliases: tuple[OutputAlias, ...],
    notes: tuple[str, ...],
    functions: str,
) -> dict[str, Any]:
    """What is written of a capture.

    Raises:
        Unkept: its graph holds something that is no text.
    """
    sizes, known = description.get("sizes"), []
    if sizes is not None:
        known = relations(sizes, description["inputs"], graph)
    return {
        **description,
        "graph": json.dumps(graph_data(graph, aliases, known)),  # read only where it is needed
        "notes": list(notes),
        "functions": functions,
    }


def found(
    data: Any,
    model: nn.Module,
    forward: Callable[..., object],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    behind: Behind | None = None,
) -> Entry:
    """The capture that was written, if it is one for this call.

    Args:
        data: what was written.
        model: of the call.
        forward: its function.
        args: of the call.
        kwargs: of the call.
        behind: what an earlier process has made of the graph, which is not made then.

    Raises:
        Misfit: it is not.
        Unreadable: it is not what was written.
    """
    guard = Guard(forward)
    variables = guard.variables((model, *args), dict(kwargs))
    scope = getattr(forward, "__globals__", None)
    if variables is None or scope is None:
        raise Misfit("the arguments do not fit")
    before = set(scope)
    try:
        return _bound(data, Kept(data, variables, scope), model, forward, guard, behind)
    except BaseException as error:
        for name in scope.keys() - before:
            del scope[name]
        if isinstance(error, Exception) and not isinstance(error, Misfit):
            raise Unreadable(f"{type(error).__name__}: {error}") from error
        raise


def _bound(
    data: Any,
    kept: Kept,
    model: nn.Module,
    forward: Callable[..., object],
    guard: Guard,
    behind: Behind | None,
) -> Entry:
    places, results, notes = (data.get(name) for name in ("inputs", "results", "notes"))
    functions = data.get("functions")
    if not isinstance(places, list) or type(results) is not int or not isinstance(notes, list):
        raise Unreadable("it has no inputs")
    if not isinstance(functions, str):
        raise Unreadable("it does not say what forward calls")
    read = reader([kept.source(place) for place in places])
    inputs = read(kept.variables, kept.scope)
    make = _maker(data)
    graph, watch = None, None
    if behind is None:
        graph, aliases, known = read_graph(data.get("graph"))
        signature = graph.signature
        watch = _watch(graph, [kept.source(place) for place in places], known)
    else:
        signature, aliases = behind.plan.signature, behind.plan.aliases
    slots = tuple(slot for slot in signature.inputs if slot.role in _PRIMAL)
    names = name_inputs(model, inputs, [slot.name for slot in slots][: len(inputs)]) if len(
        slots
    ) == len(inputs) else ()  # fmt: skip
    if names != slots:
        raise Unreadable("the inputs of its graph are others")
    if graph is not None:
        values = {symbol: inputs[i] for symbol, i in symbols_of(graph).items()}
        pairs = zip(graph.inputs, inputs, strict=False)
        if not all(fits(node.meta["val"], value, values) for node, value in pairs):
            raise Unreadable("the inputs of its graph have other forms")
    sizes: tuple[Size, ...] = ()
    if kept.sizes is not None:
        sizes = kept.sizes.named(kept.values)
        guard.reading = kept.sizes.reading(kept.scope)
    guard.manager = kept.manager(forward.__code__, guard)
    guard.constants = Constants(kept.guards, {"L": kept.variables, "G": kept.scope})
    scope, logs = kept.scope, read_logs(data.get("logs"))

    def bind(runner: Runner) -> Callable[..., object]:
        def call(*args: Any, **kwargs: Any) -> object:
            given = read(guard.variables(args, kwargs), scope)
            outputs = runner(given)
            for log in logs:
                log()
            return make(outputs, given)

        return call

    told = tuple(map(str, notes))
    found = (graph, behind, signature, aliases, inputs, slots, bind, guard, told, functions)
    return Entry(*found, sizes, watch)


def _watch(graph: Graph, places: Sequence[Source], known: Symbolic) -> Watch | None:
    """Of what reading the graph has asked beyond what is known, and what others ask from now on."""
    if known.shape_env is None:
        return None
    names = {symbol: places[i].name for symbol, i in symbols_of(graph).items()}
    return Watch(known.shape_env, known.stated, names)
