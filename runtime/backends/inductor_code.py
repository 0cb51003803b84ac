"""From graphs to code of Inductor: decomposition, settings, and compilation of a half.

A graph is decomposed here, as it comes from the passes. Random operators fall back to PyTorch's,
so that the random stream is the one eager would have drawn.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast
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
from graphopt.runtime.backends.kept_words import Misfit, Unreadable
from graphopt.runtime.engine.step import Executable, Source


@contextlib.contextmanager
def compiling(mode: FakeTensorMode, device: str) -> Iterator[None]:
    """Within, graphs are compiled.

    Args:
        mode: of the values of their inputs.
        device: they run there.

    Raises:
        BackendError: they cannot be compiled.
    """
    require_toolchain(device)
    try:
        with settings(mode):
            yield
    except (GraphoptError, Unreadable, Misfit):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise BackendError(
            f"Inductor failed on this graph: {type(error).__name__}: {reason}",
            hint="use backend='eager', or report the graph to PyTorch",
        ) from error


def values_of(module: fx.GraphModule) -> list[Any]:
    """The values of its inputs."""
    return [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]


def mode_of(module: fx.GraphModule) -> FakeTensorMode:
    """That of the values of its inputs.

    Raises:
        BackendError: it has none.
    """
    mode = detect_fake_mode(values_of(module))
    if mode is None:
        raise BackendError(
            "Inductor is not given graphs without inputs", hint="use backend='eager'"
        )
    return mode


def require_toolchain(device: str) -> None:
    """Raise `BackendError` where Inductor cannot generate code for a device."""
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


def device_of(module: fx.GraphModule) -> str:
    """The kind of device on which it runs."""
    devices = {value.device.type for value in values_of(module) if isinstance(value, Tensor)}
    return (devices - {"cpu"} or devices).pop() if devices else "cpu"


@contextlib.contextmanager
def settings(fake_mode: FakeTensorMode) -> Iterator[None]:
    """What code is generated with."""
    from torch._inductor import config
    from torch._inductor.virtualized import V

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

    before, mine = config.cache_key_tag, f" {torch.backends.cpu.get_cpu_capability()}"
    tag = before.removesuffix(mine) + mine  # within, it may be asked for again
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


def decompose(module: fx.GraphModule) -> fx.GraphModule:
    """Retrace the graph through Inductor's decompositions, keeping the phase of every node."""
    from torch._inductor.decomposition import select_decomp_table

    def run(*arguments: Any) -> Any:
        return _Retracing(module).run(*arguments)

    fake_mode, values = mode_of(module), values_of(module)
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


class _Retracing(fx.Interpreter):
    """Copies where a view is none any more.

    A decomposition may lay its result out otherwise than the kernel that a view was traced behind:
    a concatenation with nothing keeps the order of dimensions, where the kernel makes rows.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `fx.Interpreter`."""
        try:
            return super().call_function(target, args, kwargs)
        except (ValueError, RuntimeError):
            if target not in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
                raise
            return torch.reshape(*args, **kwargs)


def prepare_inference(module: fx.GraphModule) -> fx.GraphModule:
    """Decomposed, and rewritten by Inductor's own passes; its inputs stay what they are."""
    from torch._inductor.compile_fx import _recursive_joint_graph_passes

    module = decompose(module)
    return _recursive_joint_graph_passes(module, input_device=torch.device(device_of(module)))


def finish_inference(module: fx.GraphModule, static: Sequence[int], outputs: int) -> Executable:
    """The executable of what `prepare_inference` has made.

    Args:
        module: it.
        static: which inputs are the same tensors in each call.
        outputs: how many results the user sees.
    """
    values = values_of(module)
    compiled = _compile(module, values, outputs, static_input_idxs=list(static), is_inference=True)
    return cast("Executable", compiled)


def compile_forward(
    module: fx.GraphModule, saved: int, weights: Sequence[int]
) -> tuple[Executable, list[Any]]:
    """The forward executable, and the strides that it gives the values it saves."""
    values = values_of(module)
    count = len(cast("Sequence[Any]", module.graph.output_node().args[0]))
    with TracingContext.report_output_strides() as strides, _symbolic_strides():
        compiled = _compile(module, values, count - saved, static_input_idxs=list(weights))
    return cast("Executable", compiled), list(strides or [])[count - saved :]


def compile_backward(
    form: fx.GraphModule, sources: Sequence[Source], strides: Sequence[Any]
) -> Executable:
    """The backward executable, for saved values in the layout the forward really gives them."""
    values = []
    nodes = form.graph.find_nodes(op="placeholder")
    # What a part adds as inputs comes behind what the halves exchange.
    for (kind, index), node in zip(sources, nodes, strict=False):
        value = node.meta["val"]
        if kind == "saved" and index < len(strides):
            stride = strides[index]
            if stride is not None and not _are_equal(stride, value.stride()):
                with keeping_symbols([value]):
                    value = value.new_empty_strided(value.size(), tuple(stride))
        values.append(value)
    values += [node.meta["val"] for node in nodes[len(values) :]]
    static = [i for i, (kind, _) in enumerate(sources) if kind != "tangent"]
    count = len(cast("Sequence[Any]", form.graph.output_node().args[0]))
    compiled = _compile(form, values, count, static_input_idxs=static, is_backward=True)
    return cast("Executable", compiled)


def weights_of(plan: Plan) -> list[int]:
    """Which inputs are parameters and buffers."""
    weights = (Role.PARAM, Role.BUFFER)
    return [i for i, s in enumerate(plan.signature.inputs) if s.role in weights]


def _compile(module: fx.GraphModule, values: Sequence[Any], visible: int, **options: Any) -> Any:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner

    output = module.graph.output_node()
    returned = cast("Sequence[Any]", output.args[0])
    output.meta["user_visible_output_idxs"] = [
        i for i, node in enumerate(returned) if i < visible and isinstance(node, fx.Node)
    ]
    # To have less memory at once, Inductor puts messages after all that can be computed before.
    waits = config.reorder_for_peak_memory and not _sends(module)
    with config.patch(reorder_for_peak_memory=waits):
        return compile_fx_inner(module, list(values), **options)


def _sends(module: fx.GraphModule) -> bool:
    """Whether there is something to hide: messages between ranks."""
    targets = (node.target for node in module.graph.nodes)
    return any(getattr(target, "namespace", "") == "_c10d_functional" for target in targets)


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
