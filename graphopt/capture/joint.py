"""From a flat forward graph to the joint graph, by AOTAutograd and without decompositions."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch._functorch.config
from torch import fx
from torch._functorch._aot_autograd.descriptors import (
    GradAOTOutput,
    InputMutationAOTOutput,
    PlainAOTInput,
    PlainAOTOutput,
    TangentAOTInput,
)
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors
from torch._guards import tracing

from graphopt.analysis.fakes import symbolic_kernels
from graphopt.capture import writes
from graphopt.capture.averages import cumulative_averages
from graphopt.capture.checkpoints import refuse_repeated_writes
from graphopt.capture.computed_sizes import compute_from_inputs
from graphopt.capture.derivatives import zeros_with_memory
from graphopt.capture.dropout import eager_dropout, round_as_in_eager
from graphopt.capture.flat import FlatForward, first_line
from graphopt.capture.gradients import share_as_in_eager
from graphopt.capture.hidden_writes import drop_tangents
from graphopt.capture.indexing import without_whole_slices
from graphopt.capture.opaque import checks_without_order, eager_resampling
from graphopt.capture.sizes import in_terms_of, sizes_named_apart, tangents_like_outputs
from graphopt.errors import CaptureError
from graphopt.graph import KEPT_META, Graph, Level
from graphopt.plan import OutputAlias, Phase, Role, Signature, Slot


class SharedInputs(Exception):
    """Forward changes an input in place that shares memory with another."""


def derive(flat: FlatForward) -> tuple[Graph, tuple[OutputAlias, ...]]:
    """The joint (or inference) graph of a flat forward graph.

    Raises:
        CaptureError: there is none that graphopt can run.
        SharedInputs: its inputs have to be put `graphopt.capture.sharing.on_memories` before.
    """
    module = fx.GraphModule(flat.module, flat.module.graph)
    if flat.symbolic:
        without_whole_slices(module)
    if any(node.target is torch.Tensor.set_ for node in module.graph.nodes):
        raise writes.to_data(module, flat.slots)
    joint, metadata = _export_joint(module, flat)
    if len(metadata.input_info) != len(flat.slots):
        raise SharedInputs
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
    drop_tangents(joint)
    signature = _sign(joint, flat, {alias.output for alias in aliases})
    level = Level.JOINT if signature.names(Role.TANGENT) else Level.INFERENCE
    graph = Graph(joint, signature, level)
    _settle(graph)
    compute_from_inputs(graph)
    zeros_with_memory(graph)
    refuse_repeated_writes(graph)
    share_as_in_eager(graph, flat)
    round_as_in_eager(graph)
    return graph, aliases


def _export_joint(module: fx.GraphModule, flat: FlatForward) -> tuple[fx.GraphModule, Any]:
    with (
        # Around the stack, on which AOTAutograd leaves modes that are restored in order.
        symbolic_kernels() if flat.symbolic else contextlib.nullcontext(),
        contextlib.ExitStack() as stack,
        tracing(flat.context),
        fx.traceback.preserve_node_meta(),
        # As in eager, a backward runs outside of autocast; forward has its casts in the graph.
        torch._functorch.config.patch(functionalize_rng_ops=False, backward_pass_autocast="off"),
        # Otherwise torch takes out draws that nobody reads, and those after them would be others.
        torch._inductor.config.patch(fallback_random=True),
        eager_resampling(symbolic=flat.symbolic),
        eager_dropout(),
        checks_without_order(),
        cumulative_averages(),
        tangents_like_outputs(),
        sizes_named_apart(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            exported = aot_export_joint_with_descriptors(
                stack,
                module,
                # What Dynamo saw has the symbols; otherwise shapes are static.
                flat.fakes if flat.symbolic else flat.inputs,
                ignore_shape_env=not flat.symbolic,
            )
        except Exception as error:
            if "share storage but are not differentiable views" in str(error):
                raise SharedInputs from error
            raise _underivable(error, module, flat) from error
    return exported.graph_module, exported._aot_state.fw_metadata


def _underivable(error: Exception, module: fx.GraphModule, flat: FlatForward) -> CaptureError:
    message = str(error)
    if "set_ on a graph input" in message or "storage_resize" in message:
        return writes.to_data(module, flat.slots)
    if "modified by an inplace operation" in message:
        return CaptureError(
            "forward changes in place what its own backward needs, which PyTorch eager refuses in "
            f"the backward: {first_line(error).split(';')[0]}",
            where=writes.only_line(module),
            hint="use the operator that is not in place",
        )
    return CaptureError(
        f"the backward graph cannot be derived: {first_line(error)}",
        hint="run the model once without graphopt: if that works, please report this model",
    )


def _clone_outputs(module: fx.GraphModule, positions: Sequence[int]) -> None:
    output = module.graph.output_node()
    returned = list(_returned(output))
    with module.graph.inserting_before(output):
        for position in positions:
            returned[position] = module.graph.call_function(torch.clone, (returned[position],))
    output.args = (tuple(returned),)
    module.recompile()


def _refuse_unsupported(metadata: Any, flat: FlatForward) -> None:
    for index, (info, slot) in enumerate(zip(metadata.input_info, flat.slots, strict=True)):
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
            raise writes.to_input(flat.module, flat.slots, index)
    if metadata.tokens:
        raise CaptureError(
            f"forward calls operators with ordered side effects: {list(metadata.tokens)}",
            hint="move them out of the model",
        )


def _aliases(joint: fx.GraphModule, metadata: Any) -> tuple[OutputAlias, ...]:
    nodes = _by_position(joint)
    inputs = [n.meta["val"] for n in joint.graph.find_nodes(op="placeholder")]
    written = in_terms_of(inputs)
    aliases = []
    for position, info in enumerate(metadata.output_info):
        kind = info.output_type.name
        if kind == "is_input":
            aliases.append(OutputAlias(position, info.base_idx))
        elif kind == "alias_of_input":
            value = nodes[position].meta["val"]
            # The input of another call may begin elsewhere in its own memory.
            begin = value.storage_offset() - inputs[info.base_idx].storage_offset()
            numbers = (value.shape, value.stride(), (begin,))
            size, stride, (offset,) = (tuple(written(n) for n in part) for part in numbers)
            detached = metadata.input_info[info.base_idx].requires_grad and not info.requires_grad
            aliases.append(OutputAlias(position, info.base_idx, size, stride, offset, detached))
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
        elif isinstance(desc, TangentAOTInput) and isinstance(desc.output, InputMutationAOTOutput):
            changed = cast("PlainAOTInput", desc.output.mutated_input)
            raise writes.to_input(flat.module, flat.slots, changed.idx)
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
