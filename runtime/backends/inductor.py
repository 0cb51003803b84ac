"""PyTorch's own code generator: Triton on GPUs, C++ on CPUs.

The joint graph reaches Inductor after the passes, so it is decomposed here, then partitioned by the
min-cut partitioner after Inductor's joint-graph passes, as `torch.compile` does. Random operators
fall back to PyTorch's, so that the random stream is the one eager would have drawn.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, cast
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.fakes import keeping_symbols
from graphopt.errors import BackendError, GraphoptError
from graphopt.plan import Plan, Role
from graphopt.runtime.backends import Backend
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.backends.inductor_frozen import frozen_inference
from graphopt.runtime.engine.build import inference, training
from graphopt.runtime.engine.halves import Halves, split
from graphopt.runtime.engine.step import Executable
from graphopt.runtime.frozen.prologue import is_marked
from graphopt.runtime.session import Session


class Inductor(Backend):
    """Compiles both halves."""

    name: ClassVar[str] = "inductor"
    symbolic: ClassVar[bool] = True

    def build(self, module: fx.GraphModule, plan: Plan, session: Session) -> Callable[..., Any]:
        """See `Backend.build`."""
        with _compiling(module) as values:
            return _engine(module, plan, session, values)

    def function(self, module: fx.GraphModule) -> Executable:
        """See `Backend.function`."""
        returned = cast("Sequence[Any]", module.graph.output_node().args[0])
        if not any(node.op == "call_function" for node in module.graph.nodes):
            return boxed(module)  # it only passes on what it is given
        with _compiling(module):
            return _compile_inference(module, (), len(returned))


@contextlib.contextmanager
def _compiling(module: fx.GraphModule) -> Iterator[list[Any]]:
    """Within, a graph is compiled; the values of its inputs.

    Raises:
        BackendError: it cannot be.
    """
    require_toolchain(module)
    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    try:
        with _settings(values):
            yield values
    except GraphoptError:
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise BackendError(
            f"Inductor failed on this graph: {type(error).__name__}: {reason}",
            hint="use backend='eager', or report the graph to PyTorch",
        ) from error


def _engine(
    module: fx.GraphModule, plan: Plan, session: Session, values: Sequence[Any]
) -> Callable[..., Any]:
    if not plan.signature.names(Role.TANGENT):
        return inference(plan, session, module, lambda graph: _inference(graph, plan))
    from torch._inductor.compile_fx import partition_fn

    halves = split(_decompose(module, values), plan.signature, partition_fn)
    saved = sum(kind == "saved" for kind, _ in halves.sources)
    strides: list[Any] = []

    def forward(half: fx.GraphModule) -> Executable:
        compiled, layouts = _compile_forward(half, saved, _weights(plan))
        if strides and str(strides) != str(layouts):  # to compare symbols would fix them
            raise BackendError(
                "Inductor saves values of two forms of this forward in different layouts",
                hint="use backend='eager'",
            )
        strides[:] = layouts
        return compiled

    def backward(form: fx.GraphModule) -> Executable:
        # Forms that accumulate gradients are made in the middle of a step.
        with _settings(values):
            return _compile_backward(form, halves, strides)

    return training(plan, session, halves, forward, backward)


def require_toolchain(module: fx.GraphModule) -> None:
    """Raise `BackendError` where Inductor cannot generate code for the module's device."""
    device = _device(module)
    if device == "cpu":
        from torch._inductor import config

        compilers = [c for c in config.cpp.cxx if c] or ["g++"]
        if not any(shutil.which(c) for c in compilers):
            raise BackendError(
                f"Inductor needs a C++ compiler for CPU code, and none of {compilers} is on PATH",
                hint="install g++, or use backend='eager'",
            )
    elif device == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise BackendError(
                "Inductor needs Triton for GPU code",
                hint="pip install 'graphopt[gpu]', or use backend='eager'",
            )


def _device(module: fx.GraphModule) -> str:
    devices = {
        value.device.type
        for node in module.graph.find_nodes(op="placeholder")
        if isinstance(value := node.meta["val"], Tensor)
    }
    return (devices - {"cpu"} or devices).pop() if devices else "cpu"


@contextlib.contextmanager
def _settings(values: Sequence[Any]) -> Iterator[None]:
    from torch._inductor import config
    from torch._inductor.virtualized import V

    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None
    with (
        config.patch(fallback_random=True),
        _code_of_this_processor(),
        _allowing_constants(fake_mode),
        V.set_fake_mode(fake_mode),
        tracing(TracingContext(fake_mode)),
        torch._C._DisableAutocast(),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _code_of_this_processor() -> contextlib.AbstractContextManager[None]:
    """Keep code that was generated for other vector instructions out.

    Inductor keeps generated C++ on disk under a key without the instruction set (torch 2.13). Code
    for another one, from `ATEN_CPU_CAPABILITY` or a shared cache folder, fails to compile, computes
    wrong numbers, or writes past its buffers.
    """
    from torch.compiler import config

    tag = f"{config.cache_key_tag} {torch.backends.cpu.get_cpu_capability()}"
    return cast("Any", config).patch(cache_key_tag=tag)  # type: ignore[no-any-return]


@contextlib.contextmanager
def _allowing_constants(fake_mode: FakeTensorMode) -> Iterator[None]:
    """Folded constants are real tensors on the module, beside the fake inputs."""
    before = fake_mode.allow_non_fake_inputs
    fake_mode.allow_non_fake_inputs = True
    try:
        yield
    finally:
        fake_mode.allow_non_fake_inputs = before


def _decompose(module: fx.GraphModule, values: Sequence[Any]) -> fx.GraphModule:
    """Retrace the graph through Inductor's decompositions, keeping the phase of every node."""
    from torch._inductor.decomposition import select_decomp_table

    def run(*arguments: Any) -> Any:
        return fx.Interpreter(module).run(*arguments)

    fake_mode = detect_fake_mode(values)
    assert fake_mode is not None
    with (
        torch.no_grad(),
        fx.traceback.preserve_node_meta(),
        fake_mode,
        enable_python_dispatcher(),
    ):
        decomposed = make_fx(run, decomposition_table=select_decomp_table())(*values)
    for node in decomposed.graph.nodes:
        node.meta.setdefault("partitioner_tag", "is_forward")
    return decomposed


def _compile(module: fx.GraphModule, values: Sequence[Any], visible: int, **options: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner

    output = module.graph.output_node()
    returned = cast("Sequence[Any]", output.args[0])
    output.meta["user_visible_output_idxs"] = [
        i for i, node in enumerate(returned) if i < visible and isinstance(node, fx.Node)
    ]
    return compile_fx_inner(module, list(values), **options)


def _inference(module: fx.GraphModule, plan: Plan) -> Executable:
    outputs = len(plan.signature.outputs)
    if not is_marked(module):
        return _compile_inference(module, _weights(plan), outputs)

    def finish(prepared: fx.GraphModule, kept: Sequence[int]) -> Executable:
        return _finish_inference(prepared, [*_weights(plan), *kept], outputs)

    return frozen_inference(module, _prepare_inference, finish)


def _compile_inference(module: fx.GraphModule, static: Sequence[int], outputs: int) -> Executable:
    return _finish_inference(_prepare_inference(module), static, outputs)


def _prepare_inference(module: fx.GraphModule) -> fx.GraphModule:
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    module = _decompose(module, values)
    return _recursive_joint_graph_passes(module, input_device=torch.device(_device(module)))


def _finish_inference(module: fx.GraphModule, static: Sequence[int], outputs: int) -> Executable:
    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    compiled = _compile(module, values, outputs, static_input_idxs=list(static), is_inference=True)
    return cast("Executable", compiled)


def _compile_forward(
    module: fx.GraphModule, saved: int, weights: Sequence[int]
) -> tuple[Executable, list[Any]]:
    """The forward executable, and the strides that it gives the values it saves."""
    values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    count = len(cast("Sequence[Any]", module.graph.output_node().args[0]))
    with TracingContext.report_output_strides() as strides, _symbolic_strides():
        compiled = _compile(module, values, count - saved, static_input_idxs=list(weights))
    return cast("Executable", compiled), list(strides or [])[count - saved :]


@contextlib.contextmanager
def _symbolic_strides() -> Iterator[None]:
    """Have strides reported with their symbols, not as they are in the captured call."""
    context = TracingContext.try_get()
    if context is None:
        yield
        return
    with mock.patch.object(context, "fakify_first_call", True):
        yield


def _are_equal(strides: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(statically_known_true(a == b) for a, b in zip(strides, others, strict=True))


def _compile_backward(form: fx.GraphModule, halves: Halves, strides: Sequence[Any]) -> Executable:
    """The backward executable, for saved values in the layout the forward really gives them."""
    values = []
    nodes = form.graph.find_nodes(op="placeholder")
    # What a part adds as inputs comes behind what the halves exchange.
    for (kind, index), node in zip(halves.sources, nodes, strict=False):
        value = node.meta["val"]
        if kind == "saved" and index < len(strides):
            stride = strides[index]
            if stride is not None and not _are_equal(stride, value.stride()):
                with keeping_symbols([value]):
                    value = value.new_empty_strided(value.size(), tuple(stride))
        values.append(value)
    values += [node.meta["val"] for node in nodes[len(values) :]]
    static = [i for i, (kind, _) in enumerate(halves.sources) if kind != "tangent"]
    count = len(cast("Sequence[Any]", form.graph.output_node().args[0]))
    compiled = _compile(form, values, count, static_input_idxs=static, is_backward=True)
    return cast("Executable", compiled)


def _weights(plan: Plan) -> list[int]:
    weights = (Role.PARAM, Role.BUFFER)
    return [i for i, s in enumerate(plan.signature.inputs) if s.role in weights]
