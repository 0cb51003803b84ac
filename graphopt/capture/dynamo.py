"""The first way in: Dynamo reads ``forward`` as bytecode and captures it with its guards."""

from __future__ import annotations

import contextlib
import dis
import types
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx, nn, overrides
from torch._dynamo.convert_frame import CaptureOutput, fullgraph_capture, get_compile_id
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._dynamo.variables.torch_function import torch_function_mode_stack_state_mgr
from torch._guards import CompileContext, TracingContext, compile_context
from torch._subclasses import FakeTensor
from torch.utils._device import DeviceContext

from graphopt.analysis.fakes import symbolic_kernels
from graphopt.capture import checkpoints, number_symbols, scalars, sizes
from graphopt.capture.averages import cumulative_averages
from graphopt.capture.causal import causal_masks
from graphopt.capture.checks import checked_branches
from graphopt.capture.cudnn import without_cudnn
from graphopt.capture.deques import limited_deques
from graphopt.capture.derivatives import derivatives_inside
from graphopt.capture.encoders import refusing_nested_encoders
from graphopt.capture.flat import (
    FlatForward,
    Runner,
    first_line,
    location,
    name_inputs,
    nothing_symbolic,
    refused,
)
from graphopt.capture.frozen import refusing_frozen_values
from graphopt.capture.guards import Constants, Guard
from graphopt.capture.kept import Unkept, Varying, described
from graphopt.capture.leaves import leaves_of_forward
from graphopt.capture.messages import messages_at_the_end
from graphopt.capture.modes import refuse_modes_of_outputs
from graphopt.capture.opaque import capturable_leaves, refuse_fast_paths, replace_leaves
from graphopt.capture.values import forget_lazy_properties, values_as_in_eager
from graphopt.errors import CaptureError


class _Inputs(Exception):
    """Carries the flat inputs of a call out of Dynamo's bytecode."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors


def by_dynamo(
    model: nn.Module,
    forward: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    numbers: number_symbols.Numbers = number_symbols.NONE,
    dimensions: sizes.Dimensions = sizes.NONE,
    *,
    describe: bool = False,
) -> FlatForward:
    """Capture by Dynamo, with the numbers of these sources as inputs.

    Args:
        model: the model.
        forward: its forward, unbound.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        numbers: those that shall be inputs of the graph.
        dimensions: sizes that shall be symbols of the graph.
        describe: say what a later process can know the call by.

    Raises:
        CaptureError: it refuses, naming the user's source line.
    """
    bound = types.MethodType(forward, model)
    scope = getattr(forward, "__globals__", {})
    before = set(scope)
    given, wanted = dimensions.stand_ins(args, kwargs)
    guard = Guard(forward)
    symbolic = bool(wanted or numbers.sources)
    with (
        dynamo_settings(),
        symbolic_kernels() if symbolic else contextlib.nullcontext(),
        sizes.as_symbols(wanted) as found,
        number_symbols.as_inputs(numbers.sources),
        checkpoints.noting_changes() as changes,
    ):
        try:
            with _default_device():
                output = fullgraph_capture(bound, *given)
        except (TorchDynamoException, AssertionError, RuntimeError) as error:
            raise refused(error, forward, model, (args, kwargs)) from error
        if not symbolic:
            _build_guards(output, guard, forward)
    if output.backend_input is None:
        raise CaptureError(
            "forward runs no tensor operator, so there is nothing to capture",
            where=location(forward),
            hint="optimize a module whose forward computes something from its inputs",
        )
    backend_input = output.backend_input
    refuse_fast_paths(backend_input.graph_module, location(forward))
    f_globals = output.graph_capture_output.f_globals
    _forget_globals(scope, before, backend_input.backend_id, guard)
    shape_env = backend_input.fake_mode.shape_env
    fakes = [node.meta.get("example_value") for node in backend_input.graph_module.graph.nodes]
    modes = {fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)}
    watches: list[sizes.Watch] = []
    settled: list[Varying] = []

    def settle() -> tuple[sizes.Size, ...]:
        with dynamo_settings():
            _build_guards(output, guard, forward)
        _forget_globals(scope, before, backend_input.backend_id, guard)
        watches.append(sizes.Watch(shape_env))
        guard.reading = reading = sizes.Reading(shape_env, found)
        told = sizes.sizes_of(shape_env, found)
        settled.append(Varying(shape_env, sources, told, reading.places))
        return tuple(size for size, _ in told)

    def finish() -> None:
        guard.late = watches.pop().found() if watches else guard.late
        _let_go_of_tensors({backend_input.fake_mode, *modes}, context)

    def bind_all(runner: Runner) -> Callable[..., object]:
        def compiled(*tensors: Tensor) -> Sequence[Tensor]:
            return runner(tensors)

        made = output.forward_callable(compiled_fn=compiled, extra_globals=f_globals)
        return _in_globals_of(scope, made)

    def take(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        raise _Inputs(tuple(tensors))

    try:
        bind_all(take)(model, *args, **kwargs)
        raise CaptureError("the captured call did not reach its graph", where=location(forward))
    except _Inputs as taken:
        inputs = taken.tensors

    module, bind = backend_input.graph_module, bind_all
    if outside := scalars.take_out(module, numbers):
        inputs, _ = outside.split(inputs)
        around = outside.around
        bind = lambda runner: bind_all(around(runner))  # noqa: E731
    refuse_modes_of_outputs(module)
    checkpoints.refuse_other_draws(module)
    checkpoints.without_gradient(module, inputs, backend_input.fake_mode)
    placeholders = module.graph.find_nodes(op="placeholder")
    sources = [sizes.source_of(node) for node in placeholders]
    returned = _returned(module)

    def described_now() -> Mapping[str, Any] | str:
        variables = guard.variables((model, *args), kwargs) or {}
        call = (lambda bound: bound(model, *args, **kwargs), variables)
        return _described(output, inputs, bind, returned, *call, *settled[-1:])

    description: Callable[[], Mapping[str, Any] | str]
    if changes.objects or outside or not describe:
        objects, numbers_ = "forward changes Python objects", "numbers are inputs of its graph"
        why = objects if changes.objects else numbers_
        description = lambda: why  # noqa: E731
    elif symbolic:
        description = described_now  # once it is known what is asked of the symbols
    else:
        told = described_now()
        description = lambda: told  # noqa: E731
    leaves = replace_leaves(module)
    context = TracingContext(backend_input.fake_mode)
    return FlatForward(
        module=module,
        slots=name_inputs(
            model, inputs, [sizes.name_of(n, found) or _source_name(n) for n in placeholders]
        ),
        inputs=inputs,
        context=context,
        route="dynamo",
        bind=bind,
        holds=guard,
        failure=guard.failure,
        sizes_of=guard.sizes,
        changed=guard.changed,
        changes_objects=bool(changes.objects),
        keeps=tuple(dict.fromkeys(changes.kept)),
        settle=settle if symbolic else nothing_symbolic,
        finish=finish,
        constants=lambda: number_symbols.constants(shape_env, numbers.sources),
        counters=number_symbols.counters(output, changes.kept),
        notes=tuple(f"{name} runs as one opaque operator" for name in leaves),
        description=description,
    )


def _let_go_of_tensors(modes: Collection[Any], context: TracingContext) -> None:
    """Drop weak references to real tensors, with which `torch.utils.swap_tensors` refuses them."""
    context.tensor_to_context.clear()
    for mode in modes:
        described = mode.fake_tensor_converter.meta_converter.describer
        described.lookup_tensor.clear()
        described.lookup_storage.clear()


def _described(
    output: CaptureOutput,
    inputs: Sequence[Any],
    bind: Callable[[Runner], Callable[..., object]],
    returned: Sequence[Any],
    call: Callable[[Callable[..., object]], object],
    variables: Mapping[str, object],
    varying: Varying | None = None,
) -> Mapping[str, Any] | str:
    """What a later process can know the call by, or why it cannot."""
    if any(isinstance(v, torch.SymInt | torch.SymFloat | torch.SymBool) for v in returned):
        return "forward returns sizes"
    try:
        return described(output, inputs, bind, len(returned), call, variables, varying)
    except Unkept as error:
        return str(error)
    except Exception as error:  # whatever a property of the user's raises, the call is captured
        return f"{type(error).__name__}: {first_line(error)}"


def _returned(module: fx.GraphModule) -> list[Any]:
    """Fake values of what a torch-level graph returns."""
    (returned,) = module.graph.output_node().args
    nodes = returned if isinstance(returned, tuple | list) else [returned]
    return [node.meta.get("example_value") if isinstance(node, fx.Node) else node for node in nodes]


def _in_globals_of(scope: dict[str, Any], made: Any) -> Callable[..., object]:
    """A function whose global variables are those of forward, where that can be seen.

    Dynamo gives it a copy of them. What it assigns must not stay there, numbers may be other ones
    at each call, and a trial has other iterators, so that those of the user do not go on.
    """
    code = dis.get_instructions(made.__code__)
    written = {i.argval for i in code if i.opname == "STORE_GLOBAL"} & scope.keys()
    kinds = (Iterator, int, float)
    names = [n for n in made.__code__.co_names if isinstance(scope.get(n), kinds)]
    if not names and not written:
        return made  # type: ignore[no-any-return]

    def call(*args: Any, **kwargs: Any) -> object:
        own = made.__globals__
        own.update((name, scope[name]) for name in (*names, *written) if name in scope)
        result = made(*args, **kwargs)
        scope.update((name, own[name]) for name in written)
        return result

    return call


def _forget_globals(scope: dict[str, Any], before: set[str], backend_id: str, guard: Guard) -> None:
    """Take out what Dynamo has put into the globals of forward: they would be kept for ever."""
    scope.pop(backend_id, None)
    for name in scope.keys() - before:
        if name.startswith("__builtins_dict__"):  # the guards need it, and nothing else does
            weakref.finalize(guard, scope.pop, name, None)


@contextlib.contextmanager
def dynamo_settings() -> Iterator[None]:
    """Within: one static graph per call, guarded on hooks too, with the known refusals cured."""
    with (
        get_metrics_context(),
        dynamo_timed("graphopt_capture"),
        torch._dynamo.config.patch(
            automatic_dynamic_shapes=False,
            assume_static_by_default=True,
            # Numbers and sizes that depend on data become values of the graph.
            capture_scalar_outputs=True,
            capture_dynamic_output_shape_ops=True,
            # Otherwise draws of NumPy would come from torch's random stream. Refused instead.
            use_numpy_random_stream=True,
            # A hook added to a submodule later must lead to a new capture, not be lost.
            skip_nnmodule_hook_guards=False,
            side_effect_replay_policy="silent",
        ),
        fx.traceback.preserve_node_meta(),
        capturable_leaves(),
        checked_branches(),
        values_as_in_eager(),
        refusing_frozen_values(),
        refusing_nested_encoders(),
        causal_masks(),
        messages_at_the_end(),
        cumulative_averages(),
        limited_deques(),
        derivatives_inside(),
        leaves_of_forward(),
        without_cudnn(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _default_device() -> Iterator[None]:
    """Show Dynamo a default device, which is a mode, where it looks for the modes of a call.

    The guards that are built afterwards look for it where it is in a call.
    """
    modes = overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    if modes and all(isinstance(mode, DeviceContext) for mode in modes):
        with torch_function_mode_stack_state_mgr:
            yield
    else:
        yield


def _build_guards(output: CaptureOutput, guard: Guard, forward: Callable[..., object]) -> None:
    try:
        forget_lazy_properties(output.graph_capture_output.output_graph)
        with compile_context(CompileContext(get_compile_id({}))):
            made = output.graph_capture_output.build_guards(forward.__code__)
    except Exception as error:
        # Dynamo evaluates the sources of guards, and whatever that raises means: it cannot.
        raise refused(error, forward) from error
    guard.manager = made.guard_manager
    graph = output.graph_capture_output.output_graph
    guard.constants = Constants(graph.guards, {"L": graph.local_scope, "G": graph.global_scope})


def _source_name(placeholder: fx.Node) -> str:
    """``L_batch_ids_`` -> ``batch_ids``."""
    return str(placeholder.target).removeprefix("L_").removeprefix("self_").strip("_")
