"""One call of a model as one graph, with what it takes to run that graph as the call."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graphopt.capture import checkpoints, hidden_writes, sharing
from graphopt.capture.dynamo import by_dynamo, dynamo_settings
from graphopt.capture.flat import Bind, FlatForward, first_line, location
from graphopt.capture.forward import Rewriter, forward_graph, with_graph
from graphopt.capture.functions import functions_of
from graphopt.capture.garbage import keeping_garbage
from graphopt.capture.joint import SharedInputs, derive
from graphopt.capture.kept import (
    Behind,
    Found,
    Misfit,
    Store,
    Unkept,
    Unreadable,
    all_sizes,
    entry_of,
    found,
    key_of,
    note_symbols,
    own_operators_only,
    symbols_of_earlier,
)
from graphopt.capture.lock import tracing_alone
from graphopt.capture.number_symbols import NONE as NO_NUMBERS
from graphopt.capture.number_symbols import Numbers
from graphopt.capture.plainly import has_checks, or_plain
from graphopt.capture.possible import is_uninitialised
from graphopt.capture.sizes import NONE, Dimensions, Named, Size
from graphopt.errors import CaptureError
from graphopt.graph import Graph
from graphopt.plan import OutputAlias, Role
from graphopt.supported import WANTED, supports

log = logging.getLogger("graphopt")

# Captures that are kept of a model with the same sizes as symbols, if it branches on them.
_BRANCHES = 4


@dataclass(frozen=True)
class Capture:
    """One model, captured for one kind of call.

    Attributes:
        made: the joint graph, or the inference graph where nothing requires a gradient; ``None``
            where an earlier process has done what follows, see `behind`.
        aliases: outputs of the model that are inputs of it, or views of inputs; they are not
            outputs of the graph.
        route: where it comes from: ``"dynamo"``, or ``"kept"`` by an earlier process.
        seconds: how long the capture took.
        inputs: the live tensors of the captured call, one per primal input of the graph.
        bind: makes a callable ``(model, *args, **kwargs)`` out of a runner over flat tensors.
        holds: whether a call ``(model, *args, **kwargs)`` is one this capture was made for.
        failure: says which condition does not hold for a call.
        changed: says which numbers are other ones in a call, as conditions that do not hold.
        notes: what the user should know about how it was captured.
        keeps: Python objects that a call has not made itself, and gives tensors or numbers.
        sizes: those that were to be symbols, and what became of them.
        sizes_of: reads the sizes that are symbols off a call; of equal ones, the first.
        numbers: those that are inputs of the graph, by where Dynamo finds them.
        finish: to be called when passes and backend are done; `holds` then has what they ask, too.
        earlier: the graphs that there would be without the last rewrites of the forward graph,
            without the last but one, …; oldest first.
        unkept: why later processes do not find it; empty if they do, or if nothing is kept.
        digest: of what is kept; empty where nothing is.
        functions: what forward calls, a line each; equal on ranks that compute the same.
        behind: what an earlier process has made of the graph, where that was looked for.
    """

    made: Graph | None
    aliases: tuple[OutputAlias, ...]
    route: str
    seconds: float
    inputs: tuple[Tensor, ...]
    bind: Bind
    holds: Callable[..., bool]
    failure: Callable[..., str]
    changed: Callable[..., tuple[str, ...]] = lambda *args, **kwargs: ()
    notes: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    sizes_of: Callable[..., tuple[int, ...]] = lambda *_, **__: ()
    numbers: frozenset[str] = frozenset()
    finish: Callable[[], None] = lambda: None
    earlier: tuple[Graph, ...] = ()
    unkept: str = ""
    digest: str = ""
    functions: str = ""
    behind: Behind | None = None

    @property
    def graph(self) -> Graph:
        """The graph, where it was made."""
        assert self.made is not None
        return self.made

    @property
    def symbolic(self) -> bool:
        """Whether some sizes are symbols of the graph."""
        return any(slot.role is Role.SIZE for slot in self.graph.signature.inputs)


def capture(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    forward: Callable[..., object] | None = None,
    numbers: Iterable[str] = (),
    dimensions: Dimensions = NONE,
    rewrite: Rewriter | None = None,
    symbols: bool = True,
    store: Store | None = None,
    varied: Named = lambda _: NONE,
    behind: Callable[[str], Behind | None] = lambda _: None,
) -> Capture:
    """Capture one call of `model` as one graph.

    Args:
        model: any module whose ``forward`` Dynamo can capture without a break.
        args: positional arguments of the call; live tensors, whose values are not changed.
        kwargs: keyword arguments of the call.
        forward: the unbound ``forward`` to capture; by default the one of the model's class.
        numbers: those that shall be inputs of the graph, by where Dynamo finds them
            (``L['self'].steps``). So are those that forward reads and assigns, where that can be.
            All others are constants, and so is one whose value torch asks for.
        dimensions: sizes that shall be symbols of the graph; all others are constants.
        rewrite: changes the forward graph in place before a backward is derived. Where it adds
            inputs, the capture is for looking at: no call of the model has them.
        symbols: whether numbers may be symbols of the graph.
        store: where captures of earlier processes are, and where this one is kept.
        varied: finds sizes that were symbols in an earlier process, whose capture is taken then.
        behind: looks for what an earlier process has made of a kept graph, by its digest. Where it
            finds something, the graph is not made.

    Returns:
        The captured graph, in the mode the call would run in now (``training``, grad mode,
        autocast).

    Raises:
        CaptureError: the call cannot be captured as one graph; names the user's source line.
    """
    _check_version()
    forward = forward or type(model).forward
    start = time.perf_counter()
    checkpointed = checkpoints.within_checkpoint()
    if checkpointed and is_uninitialised(model):
        raise CaptureError(
            "a lazy module gets its parameters within torch.utils.checkpoint, by a call that is "
            "not captured, and the one in the backward would be",
            where=location(forward),
            hint="call the model once outside of the checkpoint before",
        )
    call = _Call(model, forward, tuple(args), dict(kwargs or {}), dimensions, rewrite)
    wanted = Numbers(frozenset(numbers), symbols)
    keeping = _Keeping.of(call, wanted, store)
    with tracing_alone(), checkpoints.without_hooks(), keeping_garbage():
        kept = keeping.found(behind) or keeping.of_other_sizes(varied, behind)
        if kept is not None:
            return replace(kept, seconds=time.perf_counter() - start)
        made = _with_numbers(replace(call, describe=bool(keeping)), wanted)
    if checkpointed and made.state:
        raise checkpoints.refusal(location(forward))
    flat = made.flat
    unkept, digest = keeping.keep(made)
    return Capture(
        made=made.graph,
        aliases=made.aliases,
        route=flat.route,
        seconds=time.perf_counter() - start,
        inputs=made.inputs,
        bind=made.bind,
        holds=flat.holds,
        failure=flat.failure,
        changed=flat.changed,
        notes=flat.notes,
        unkept=unkept,
        digest=digest,
        keeps=flat.keeps,
        sizes=made.sizes,
        sizes_of=flat.sizes_of,
        numbers=made.numbers,
        finish=flat.finish,
        earlier=made.earlier,
        functions=functions_of(flat.module),
    )


@dataclass(frozen=True)
class _Call:
    """What is captured, whatever shall become of its numbers."""

    model: nn.Module
    forward: Callable[..., object]
    args: tuple[object, ...]
    kwargs: dict[str, object]
    dimensions: Dimensions
    rewrite: Rewriter | None
    describe: bool = False

    def key(self, varying: Mapping[int, Mapping[int, str]]) -> str:
        """Of a kept capture of it, with names for these sizes."""
        return key_of(self.model, self.forward, self.args, self.kwargs, varying)

    @property
    def form(self) -> str:
        """A key that it shares with calls of other sizes."""
        return self.key(all_sizes(self.args, self.kwargs))


@dataclass(frozen=True)
class _Made:
    """A call that was captured; `state` says whether it changes Python objects, or draws."""

    flat: FlatForward
    graph: Graph
    aliases: tuple[OutputAlias, ...]
    inputs: tuple[Tensor, ...]
    bind: Bind
    sizes: tuple[Size, ...]
    numbers: frozenset[str]
    state: bool
    earlier: tuple[Graph, ...]


def _with_numbers(call: _Call, wanted: Numbers) -> _Made:
    """A capture with those of the numbers as inputs of which torch makes no constants."""
    try:
        return _once(call, wanted, counting=True)
    except CaptureError:
        constants = _constants(call, wanted)
        if not constants:
            raise
        return _once(call, replace(wanted, sources=wanted.sources - constants))


def _constants(call: _Call, wanted: Numbers) -> frozenset[str]:
    """Of which numbers torch makes constants, where it may."""
    if not wanted.sources:
        return frozenset()
    try:
        tried = _once(call, replace(wanted, backed=True))
    except CaptureError:
        return frozenset()
    return wanted.sources - tried.numbers


def _once(call: _Call, numbers: Numbers, *, counting: bool = False) -> _Made:
    """A capture with these numbers as inputs, and with counters if `counting`."""
    forward, rewrite = call.forward, call.rewrite
    with _drawing_nothing() as drawn:
        given = (call.model, forward, call.args, call.kwargs)
        flat = by_dynamo(*given, numbers, call.dimensions, describe=call.describe)
        flat = hidden_writes.without_gradients(flat)
        if counting and flat.counters:
            with contextlib.suppress(CaptureError):  # one may decide what is computed
                return _once(call, replace(numbers, sources=numbers.sources | flat.counters))
        state = drawn() or flat.changes_objects
        if state:
            flat = replace(flat, holds=checkpoints.outside_checkpoints(flat.holds))
        earlier: list[Graph] = []
        if rewrite is not None:
            level = forward_graph(flat)
            rewritten = rewrite(level)
            if rewritten.earlier:
                for graph in rewritten.earlier:
                    earlier.append(_derived(with_graph(flat, graph, rewritten.initial), forward)[0])
                flat = with_graph(flat, level, rewritten.initial)
        graph, aliases, inputs, bind = _derived(flat, forward)
        sizes = flat.settle()
        if rewrite is not None:
            graph.facts |= level.facts
    inputs_of_graph = numbers.sources - flat.constants()
    return _Made(flat, graph, aliases, inputs, bind, sizes, inputs_of_graph, state, tuple(earlier))


@dataclass(frozen=True)
class _Keeping:
    """Looks a call up among the kept captures, and keeps a new one.

    Attributes:
        call: which one.
        store: where; ``None`` where nothing is kept.
        keys: of the call; several where sizes are symbols, as a model may branch on them.
        refused: why it is not kept.
    """

    call: _Call
    store: Store | None = None
    keys: tuple[str, ...] = ()
    refused: str = ""

    @classmethod
    def of(cls, call: _Call, numbers: Numbers, store: Store | None) -> _Keeping:
        """For one call; nothing is kept where numbers are inputs, or passes come first."""
        if store is None:
            return cls(call)
        if numbers.sources:
            return cls(call, refused="numbers are inputs of its graph")
        if call.rewrite is not None:
            return cls(call, refused="a pass rewrites its forward graph")
        try:
            key = call.key(call.dimensions.names)
            others = range(1, _BRANCHES) if call.dimensions else ()
            return cls(call, store, (key, *(f"{key}-{number}" for number in others)))
        except Unkept as error:
            return cls(call, refused=str(error))
        except Exception as error:  # whatever an object of the user's raises
            return cls(call, refused=f"{type(error).__name__}: {first_line(error)}")

    def __bool__(self) -> bool:
        return self.store is not None

    def found(self, behind: Callable[[str], Behind | None]) -> Capture | None:
        """The capture that an earlier process has kept for this call."""
        for key in self.keys:
            kept = self.store.read(key) if self.store else None
            made = self._bound(key, kept, behind) if kept is not None else None
            if made is not None:
                return made
        return None

    def of_other_sizes(
        self, varied: Named, behind: Callable[[str], Behind | None]
    ) -> Capture | None:
        """A kept capture of a call like this one with sizes as symbols, where none varied yet."""
        if self.store is None or self.call.dimensions:
            return None
        for names in symbols_of_earlier(self.call.form):
            if dimensions := varied(names):
                call = replace(self.call, dimensions=dimensions)
                found = _Keeping.of(call, NO_NUMBERS, self.store).found(behind)
                if found is not None:
                    return found
        return None

    def _bound(
        self, key: str, kept: Found, behind: Callable[[str], Behind | None]
    ) -> Capture | None:
        call = self.call
        given = (call.model, call.forward, call.args, call.kwargs)
        made = behind(kept.digest)  # what it warns of is heard here
        try:
            with dynamo_settings(), _drawing_nothing():
                entry = found(kept.entry, *given, made)
        except Misfit as misfit:
            if isinstance(misfit, Unreadable) and self.store is not None:
                self.store.damaged(key, str(misfit))
            log.info("the kept capture is not for this call: %s", misfit)
            return None
        bind, graph = entry.bind, entry.graph
        positions = sharing.watched(entry.slots, entry.signature.names(Role.MUTATION))
        checked = graph.fx if graph is not None and has_checks(graph.fx) else None
        if positions or checked is not None:
            prepare = sharing.prepared(entry.slots, entry.inputs, positions)
            bind = or_plain(bind, call.forward, prepare, checked)
        guard, watch = entry.guard, entry.watch

        def finish() -> None:
            guard.late = watch.found() if watch else None

        return Capture(
            made=graph,
            aliases=entry.aliases,
            route="kept",
            seconds=0.0,
            inputs=entry.inputs,
            bind=bind,
            holds=guard,
            failure=guard.failure,
            changed=guard.changed,
            notes=entry.notes,
            sizes=entry.sizes,
            sizes_of=guard.sizes,
            finish=finish,
            digest=kept.digest,
            functions=entry.functions,
            behind=entry.behind,
        )

    def keep(self, made: _Made) -> tuple[str, str]:
        """Why a capture is not kept, if it is not; else its digest."""
        if self.store is None:
            return self.refused, ""
        flat = made.flat
        try:
            description = flat.description()
            if isinstance(description, str):
                raise Unkept(description)
            if made.state or flat.keeps or flat.counters or made.numbers:
                raise Unkept("forward changes Python objects, or draws random numbers of Python")
            if made.inputs is not flat.inputs:
                raise Unkept("inputs that forward writes to share memory")
            own_operators_only(flat.module, made.graph.module)
            functions = functions_of(flat.module)
            entry = entry_of(description, made.graph, made.aliases, flat.notes, functions)
            digest = self.store.write(self.store.free(self.keys), entry)
            names = [name for dims in self.call.dimensions.names.values() for name in dims.values()]
            if names and not any(size.fixed for size in made.sizes):
                note_symbols(self.call.form, names)
            return "", digest
        except Unkept as error:
            return str(error), ""
        except (TypeError, ValueError) as error:  # no JSON
            return first_line(error), ""


def capture_forward(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    forward: Callable[..., object] | None = None,
) -> Graph:
    """The forward graph of one call: torch functions, differentiable, without a backward.

    Arguments and errors are those of `capture`.
    """
    _check_version()
    forward = forward or type(model).forward
    with tracing_alone(), _drawing_nothing(), checkpoints.without_hooks():
        return forward_graph(by_dynamo(model, forward, tuple(args), dict(kwargs or {})))


def _derived(
    flat: FlatForward, forward: Callable[..., object]
) -> tuple[Graph, tuple[OutputAlias, ...], tuple[Tensor, ...], Bind]:
    """Graph, aliases, inputs of the graph, and what binds a runner to calls."""
    joined, change = flat, None
    try:
        graph, aliases = derive(flat)
        positions = sharing.watched(flat.slots, graph.signature.names(Role.MUTATION))
    except SharedInputs:
        joined, change = sharing.on_memories(flat)
        positions = tuple(range(len(flat.inputs)))
        graph, aliases = _derived_from_memories(joined, flat)
    if not positions and not flat.alone and not has_checks(graph.fx):
        return graph, aliases, flat.inputs, flat.bind
    prepare = sharing.prepared(flat.slots, flat.inputs, positions, change, flat.alone)
    return graph, aliases, joined.inputs, or_plain(flat.bind, forward, prepare, graph.fx)


def _derived_from_memories(
    joined: FlatForward, flat: FlatForward
) -> tuple[Graph, tuple[OutputAlias, ...]]:
    try:
        return derive(joined)
    except SharedInputs:
        raise sharing.refusal(flat.slots) from None


@contextmanager
def _drawing_nothing() -> Iterator[Callable[[], bool]]:
    """Give Python's random numbers back: Dynamo draws those that become inputs of the graph.

    Yields whether any were drawn so far.
    """
    before = random.getstate()
    try:
        yield lambda: random.getstate() != before
    finally:
        random.setstate(before)


def _check_version() -> None:
    if not supports(torch.__version__):
        raise CaptureError(
            f"torch {torch.__version__} is outside the supported range {WANTED}",
            hint="install torch 2.13",
        )
