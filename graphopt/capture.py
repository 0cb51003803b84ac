"""Model and inputs to `Graph`: the only file that touches torch's capture APIs.

Dynamo captures the bound ``forward`` as one torch-level graph, with its guards and with generated
bytecode that flattens the call's inputs and rebuilds its outputs. AOTAutograd derives from it the
joint forward and backward graph, without decompositions. These APIs are semi-private; `SUPPORTED`
names the torch releases they were checked on.
"""

from __future__ import annotations

import contextlib
import logging
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import CaptureOutput, fullgraph_capture, get_compile_id
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import dynamo_timed, get_metrics_context
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import CompileContext, TracingContext, compile_context, tracing

from graphopt.capture_export import by_export
from graphopt.errors import CaptureError
from graphopt.flat import FlatForward, Guard, Runner, first_line, location, name_inputs, refused
from graphopt.graph import KEPT_META, Graph, Level
from graphopt.leaves import capturable_leaves, eager_resampling, replace_leaves
from graphopt.plan import OutputAlias, Phase, Role, Signature, Slot

SUPPORTED = ("2.11", "2.14")


@dataclass(frozen=True)
class Capture:
    """One model, captured for one kind of call.

    Attributes:
        graph: the joint graph, or the inference graph where nothing requires a gradient.
        aliases: outputs of the model that are inputs of it, or views of inputs; they are not
            outputs of the graph.
        route: ``"dynamo"`` or ``"export"``.
        seconds: how long the capture took.
        inputs: the live tensors of the captured call, one per primal input of the graph.
        bind: makes a callable ``(model, *args, **kwargs)`` out of a runner over flat tensors.
        holds: whether a call ``(model, *args, **kwargs)`` is one this capture was made for.
        failure: says which condition does not hold for a call.
        notes: what the user should know about how it was captured.
    """

    graph: Graph
    aliases: tuple[OutputAlias, ...]
    route: str
    seconds: float
    inputs: tuple[Tensor, ...]
    bind: Callable[[Runner], Callable[..., object]]
    holds: Callable[..., bool]
    failure: Callable[..., str]
    notes: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    forward: Callable[..., object] | None = None,
) -> Capture:
    """Capture one call of `model` as one graph.

    Args:
        model: any module whose ``forward`` Dynamo or `torch.export` can capture without a break.
        args: positional arguments of the call; live tensors, whose values are not changed.
        kwargs: keyword arguments of the call.
        forward: the unbound ``forward`` to capture; by default the one of the model's class.

    Returns:
        The captured graph, in the mode the call would run in now (``training``, grad mode,
        autocast).

    Raises:
        CaptureError: the call cannot be captured as one graph; names the user's source line.
    """
    _check_version()
    forward = forward or type(model).forward
    start = time.perf_counter()
    try:
        flat = _by_dynamo(model, forward, tuple(args), dict(kwargs or {}))
    except CaptureError as refusal:
        flat = by_export(model, forward, tuple(args), dict(kwargs or {}), refusal)
    graph, aliases = _derive(flat)
    return Capture(
        graph=graph,
        aliases=aliases,
        route=flat.route,
        seconds=time.perf_counter() - start,
        inputs=flat.inputs,
        bind=flat.bind,
        holds=flat.holds,
        failure=flat.failure,
        notes=flat.notes,
    )


# -- by Dynamo -------------------------------------------------------------------------------------


class _Inputs(Exception):
    """Carries the flat inputs of a call out of Dynamo's bytecode."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors


def _by_dynamo(
    model: nn.Module, forward: Callable[..., object], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FlatForward:
    bound = types.MethodType(forward, model)
    with _dynamo_settings():
        try:
            output = fullgraph_capture(bound, args, kwargs)
            guard = Guard(_build_guards(output, forward), forward)
        except (TorchDynamoException, AssertionError, RuntimeError) as error:
            raise refused(error, forward) from error
    if output.backend_input is None:
        raise CaptureError(
            "forward runs no tensor operator, so there is nothing to capture",
            where=location(forward),
            hint="optimize a module whose forward computes something from its inputs",
        )
    backend_input = output.backend_input
    f_globals = output.graph_capture_output.f_globals

    def bind(runner: Runner) -> Callable[..., object]:
        def compiled(*tensors: Tensor) -> Sequence[Tensor]:
            return runner(tensors)

        return output.forward_callable(compiled_fn=compiled, extra_globals=f_globals)

    def take(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        raise _Inputs(tuple(tensors))

    try:
        bind(take)(model, *args, **kwargs)
        raise CaptureError("the captured call did not reach its graph", where=location(forward))
    except _Inputs as taken:
        inputs = taken.tensors

    module = backend_input.graph_module
    leaves = replace_leaves(module)
    placeholders = module.graph.find_nodes(op="placeholder")
    context = TracingContext(backend_input.fake_mode)
    return FlatForward(
        module=module,
        slots=name_inputs(model, inputs, [_source_name(node) for node in placeholders]),
        inputs=inputs,
        context=context,
        route="dynamo",
        bind=bind,
        holds=guard,
        failure=guard.failure,
        notes=tuple(f"{name} runs as one opaque operator" for name in leaves),
    )


@contextlib.contextmanager
def _dynamo_settings() -> Iterator[None]:
    """One static graph per call, guarded on hooks too, with the known refusals cured."""
    with (
        get_metrics_context(),
        dynamo_timed("graphopt_capture"),
        torch._dynamo.config.patch(
            automatic_dynamic_shapes=False,
            assume_static_by_default=True,
            # A hook added to a submodule later must lead to a new capture, not be lost.
            skip_nnmodule_hook_guards=False,
            # What forward prints or logs is not part of the step.
            reorderable_logging_functions={print, warnings.warn},
            ignore_logging_functions={
                logging.Logger.debug,
                logging.Logger.info,
                logging.Logger.warning,
                *_once_loggers(),
            },
            side_effect_replay_policy="silent",
        ),
        fx.traceback.preserve_node_meta(),
        capturable_leaves(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _once_loggers() -> set[Callable[..., Any]]:
    """Logger methods that transformers adds: cached, hence opaque to Dynamo."""
    names = ("warning_once", "info_once", "warning_advice")
    return {getattr(logging.Logger, n) for n in names if hasattr(logging.Logger, n)}


def _build_guards(output: CaptureOutput, forward: Callable[..., object]) -> Any:
    with compile_context(CompileContext(get_compile_id({}))):
        return output.graph_capture_output.build_guards(forward.__code__).guard_manager


def _source_name(placeholder: fx.Node) -> str:
    """``L_batch_ids_`` -> ``batch_ids``."""
    return str(placeholder.target).removeprefix("L_").removeprefix("self_").strip("_")


# -- the joint graph -------------------------------------------------------------------------------


def _derive(flat: FlatForward) -> tuple[Graph, tuple[OutputAlias, ...]]:
    """The joint (or inference) graph of a flat forward graph."""
    module = fx.GraphModule(flat.module, flat.module.graph)
    joint, metadata = _export_joint(module, flat)
    sharing = [
        position
        for position, info in enumerate(metadata.output_info)
        if info.output_type.name.startswith("alias_of_intermediate")
    ]
    if sharing:
        # Outputs share one storage. Giving each its own keeps the graph a plain function.
        _clone_outputs(module, sharing)
        joint, metadata = _export_joint(module, flat)
    _refuse_unsupported(metadata, flat)
    aliases = _aliases(joint, metadata)
    signature = _sign(joint, flat, {alias.output for alias in aliases})
    level = Level.JOINT if signature.names(Role.TANGENT) else Level.INFERENCE
    graph = Graph(joint, signature, level)
    _settle(graph)
    return graph, aliases


def _export_joint(module: fx.GraphModule, flat: FlatForward) -> tuple[fx.GraphModule, Any]:
    with (
        contextlib.ExitStack() as stack,
        tracing(flat.context),
        fx.traceback.preserve_node_meta(),
        torch._functorch.config.patch(functionalize_rng_ops=False),
        eager_resampling(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            exported = aot_export_joint_with_descriptors(
                stack,
                module,
                flat.inputs,
                # Shapes are static. With a shape environment, tracing would go through Python
                # decompositions (bilinear upsampling, recurrent layers) that eager does not run.
                ignore_shape_env=True,
            )
        except Exception as error:
            raise CaptureError(
                f"the backward graph cannot be derived: {first_line(error)}",
                hint="run the model once without graphopt: if that works, please report this model",
            ) from error
    return exported.graph_module, exported._aot_state.fw_metadata


def _clone_outputs(module: fx.GraphModule, positions: Sequence[int]) -> None:
    output = module.graph.output_node()
    returned = list(_returned(output))
    with module.graph.inserting_before(output):
        for position in positions:
            returned[position] = module.graph.call_function(torch.clone, (returned[position],))
    output.args = (tuple(returned),)
    module.recompile()


def _refuse_unsupported(metadata: Any, flat: FlatForward) -> None:
    for info, slot in zip(metadata.input_info, flat.slots, strict=True):
        if info.mutates_metadata:
            raise CaptureError(
                f"forward changes the shape or strides of {slot} in place",
                hint="return the reshaped tensor instead of changing the input",
            )
        if (
            info.mutates_data
            and info.requires_grad
            and not (
                info.mutations_under_no_grad_or_inference_mode
                or info.mutations_hidden_from_autograd
            )
        ):
            raise CaptureError(
                f"forward changes {slot}, which requires a gradient, in place",
                hint="work on a clone: x = x.clone()",
            )
    if metadata.tokens:
        raise CaptureError(
            f"forward calls operators with ordered side effects: {list(metadata.tokens)}",
            hint="move them out of the model",
        )


def _aliases(joint: fx.GraphModule, metadata: Any) -> tuple[OutputAlias, ...]:
    nodes = _by_position(joint)
    aliases = []
    for position, info in enumerate(metadata.output_info):
        kind = info.output_type.name
        if kind == "is_input":
            aliases.append(OutputAlias(position, info.base_idx))
        elif kind == "alias_of_input":
            value = nodes[position].meta["val"]
            view = (tuple(value.shape), tuple(value.stride()), int(value.storage_offset()))
            aliases.append(OutputAlias(position, info.base_idx, *view))
    return tuple(aliases)


def _by_position(joint: fx.GraphModule) -> dict[int, fx.Node]:
    output = joint.graph.output_node()
    return {
        desc.idx: node
        for node, desc in zip(_returned(output), output.meta["desc"], strict=True)
        if isinstance(desc, PlainAOTOutput)
    }


def _returned(output: fx.Node) -> Sequence[fx.Node]:
    return cast("Sequence[fx.Node]", output.args[0])


def _sign(joint: fx.GraphModule, flat: FlatForward, aliased: set[int]) -> Signature:
    """Translate torch's descriptors into slots and drop outputs that are not computed."""
    inputs = []
    for node in joint.graph.find_nodes(op="placeholder"):
        desc = node.meta["desc"]
        if isinstance(desc, PlainAOTInput):
            inputs.append(flat.slots[desc.idx])
        elif isinstance(desc, TangentAOTInput) and isinstance(desc.output, PlainAOTOutput):
            inputs.append(Slot(Role.TANGENT, str(desc.output.idx), Phase.BACKWARD))
        else:
            raise CaptureError(f"an input of a kind that is not supported yet: {desc!r}")
    slots, nodes = [], []
    output = joint.graph.output_node()
    for node, desc in zip(_returned(output), output.meta["desc"], strict=True):
        if node is None or (isinstance(desc, PlainAOTOutput) and desc.idx in aliased):
            continue
        slots.append(_output_slot(desc, flat.slots))
        nodes.append(node)
    output.args = (nodes,)
    output.meta.clear()
    return Signature(tuple(inputs), tuple(slots))


def _output_slot(desc: object, slots: Sequence[Slot]) -> Slot:
    if isinstance(desc, PlainAOTOutput):
        return Slot(Role.OUTPUT, str(desc.idx))
    if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput):
        return Slot(Role.GRAD, slots[desc.grad_of.idx].name, Phase.BACKWARD)
    if isinstance(desc, InputMutationAOTOutput) and isinstance(desc.mutated_input, PlainAOTInput):
        return Slot(Role.MUTATION, slots[desc.mutated_input.idx].name)
    raise CaptureError(f"an output of a kind that is not supported yet: {desc!r}")


def _settle(graph: Graph) -> None:
    """Readable placeholder names, and only the metadata that graphopt keeps."""
    graph.fx.set_codegen(fx.graph.CodeGen())
    inputs = graph.inputs
    for index, node in enumerate(inputs):  # first free the names that another input may want
        node._rename(f"graphopt_input_{index}")
    for node, slot in zip(inputs, graph.signature.inputs, strict=True):
        prefix = "tangent_" if slot.role is Role.TANGENT else ""
        node._rename(prefix + slot.name.replace(".", "_"))
        node.target = node.name
    tangents = graph.signature.names(Role.TANGENT)
    after = set(inputs[len(inputs) - len(tangents) :]) if tangents else set()
    for node in graph.nodes:
        # The inlined backward of a custom autograd.Function is traced as forward code.
        if node in after or after.intersection(node.all_input_nodes):
            after.add(node)
            if node.op != "output":
                node.meta["partitioner_tag"] = "is_backward"
        for key in [k for k in node.meta if k not in KEPT_META]:
            del node.meta[key]
    graph.changed()


# -- what is refused -------------------------------------------------------------------------------


def _check_version() -> None:
    release = tuple(int(p) for p in torch.__version__.split("+")[0].split(".")[:2])
    low, high = (tuple(int(p) for p in v.split(".")) for v in SUPPORTED)
    if not low <= release < high:
        raise CaptureError(
            f"torch {torch.__version__} is outside the supported range "
            f">={SUPPORTED[0]},<{SUPPORTED[1]}",
            hint="install torch 2.13",
        )
