"""Calls that a captured forward must not take apart: recurrent networks and the CTC loss.

PyTorch decomposes both while a graph is traced. An LSTM or GRU is unrolled over time, which is
slow, and its dropout between layers is lost; the CTC loss is refused, because the shape of an
intermediate depends on data. Here they become operators of `graphopt.ops` instead: enter
`capturable_leaves` while Dynamo captures, and call `replace_leaves` on the graph before its
backward is derived. Recurrent networks on packed sequences stay refused: how they unroll depends on
data.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import fx
from torch.fx.node import has_side_effect
from torch.nn import _reduction, functional

from graphopt.errors import CaptureError
from graphopt.graph import module_of
from graphopt.ops.rnn import MODES

Call = tuple[torch._ops.OpOverload, tuple[Any, ...]]


# -- what each leaf becomes; parameters are those of the aten operator -----------------------------


def _rnn(
    mode: str,
    input: Any,
    hx: Any,
    params: Any,
    has_biases: Any,
    num_layers: Any,
    dropout: Any,
    train: Any,
    bidirectional: Any,
    batch_first: Any,
) -> Call:
    state = list(hx) if mode == "lstm" else [hx]
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    return torch.ops.graphopt.rnn.default, (mode, input, state, list(params), *options, None, [])


def _ctc_loss(
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: Any = 0,
    reduction: Any = 1,
    zero_infinity: Any = False,
) -> Call:
    packet = torch.ops.graphopt.ctc_loss
    target, lengths = packet.default, (input_lengths, target_lengths)
    if isinstance(input_lengths, list | tuple):
        target, lengths = packet.IntList, (list(input_lengths), list(target_lengths))
    return target, (log_probs, targets, *lengths, blank, reduction, zero_infinity, None, [])


# -- while Dynamo captures -------------------------------------------------------------------------


def _kernels() -> Mapping[torch._ops.OpOverload, Callable[..., Any]]:
    """Stand-ins under which tracing sees a leaf's outputs without entering it."""

    def rnn(mode: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            target, call = _rnn(mode, *args)
            outputs = target(*call)
            return outputs[:3] if mode == "lstm" else outputs[:2]

        return kernel

    def ctc_loss(*args: Any) -> Any:
        target, call = _ctc_loss(*args)
        return target(*call)[0]

    aten = torch.ops.aten
    kernels = {getattr(aten, mode).input: rnn(mode) for mode in MODES}
    return kernels | {aten.ctc_loss.Tensor: ctc_loss, aten.ctc_loss.IntList: ctc_loss}


@contextmanager
def capturable_leaves() -> Iterator[None]:
    """Let Dynamo trace through leaves without taking them apart.

    Nothing that a guard can see is changed and everything is put back on leaving, so the guards of
    a graph that was captured inside hold outside. Untraced calls are not affected at all.
    """
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))
        for op, kernel in _kernels().items():
            stack.enter_context(python_kernel(op, kernel))
        yield


@contextmanager
def python_kernel(op: torch._ops.OpOverload, kernel: Callable[..., Any]) -> Iterator[None]:
    """Replace what the Python dispatcher, which only tracing turns on, runs for `op`."""
    keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
    before = dict(op.py_kernels)
    op.py_kernels.update(dict.fromkeys(keys, kernel))
    op._dispatch_cache.clear()
    try:
        yield
    finally:
        op.py_kernels.clear()
        op.py_kernels.update(before)
        op._dispatch_cache.clear()


# -- after the capture -----------------------------------------------------------------------------


def replace_leaves(module: fx.GraphModule) -> tuple[str, ...]:
    """Rewrite the leaf calls of a torch-level graph, in place, into `graphopt::` operators.

    Args:
        module: as Dynamo made it inside `capturable_leaves`, with
            ``meta["example_value"]`` or ``meta["val"]`` on its nodes. The names and the metadata of
            the values that other nodes use stay.

    Returns:
        One description per rewritten call, in order (``"lstm in encoder.rnn"``).
    """
    aten = torch.ops.aten
    modes: dict[Any, str] = {function: mode for mode, function in MODES.items()}
    modes |= {getattr(aten, mode).input: mode for mode in MODES}
    losses = (functional.ctc_loss, torch.ctc_loss, aten.ctc_loss.Tensor, aten.ctc_loss.IntList)
    replaced = []
    for node in module.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in modes:
            name = modes[node.target]
            _replace_rnn(node, name)
        elif node.target in losses:
            name = "ctc_loss"
            _replace_ctc_loss(node)
        else:
            continue
        owner = module_of(node)
        replaced.append(f"{name} in {owner}" if owner else name)
    if replaced:
        module.recompile()
    return tuple(replaced)


def _replace_rnn(node: fx.Node, mode: str) -> None:
    target, call = _rnn(mode, *node.args, **node.kwargs)
    node.meta |= _example(node, target, call)
    node.target, node.args, node.kwargs = target, call, {}


def _replace_ctc_loss(node: fx.Node) -> None:
    if node.target is functional.ctc_loss:
        bound = inspect.signature(functional.ctc_loss).bind(*node.args, **node.kwargs).arguments
        bound["reduction"] = _reduction.get_enum(str(bound.get("reduction", "mean")))
    else:
        bound = inspect.signature(_ctc_loss).bind(*node.args, **node.kwargs).arguments
    if node.target is torch.ctc_loss:
        # Unlike the operator that it calls, the function in `torch` reduces only when told to.
        bound.setdefault("reduction", 0)
    target, call = _ctc_loss(**bound)
    with node.graph.inserting_before(node):
        both = node.graph.call_function(target, call)
    both.meta = node.meta | _example(node, target, call)
    node.target, node.args, node.kwargs = operator.getitem, (both, 0), {}


def _example(node: fx.Node, target: torch._ops.OpOverload, call: tuple[Any, ...]) -> dict[str, Any]:
    """The metadata that holds a node's value, as it is when the node makes this call instead."""
    key = "example_value" if "example_value" in node.meta else "val"
    return {key: target(*fx.node.map_arg(call, lambda argument: argument.meta[key]))}


# -- what no operator can stand for ---------------------------------------------------------------

_FAST_PATHS = (torch._transformer_encoder_layer_fwd, torch._native_multi_head_attention)


def refuse_fast_paths(module: fx.GraphModule, where: str) -> None:
    """Refuse inference kernels of whole layers that cast inside of themselves.

    A graph records the casts of autocast as operators, and runs without it.

    Raises:
        CaptureError: a torch-level graph has one under autocast of CPUs.
    """
    under = torch.is_autocast_enabled("cpu")
    for node in module.graph.nodes:
        under |= node.target is torch.amp.autocast_mode._enter_autocast and node.args[0] == "cpu"
        if under and node.target in _FAST_PATHS:
            raise CaptureError(
                "the fast path of nn.TransformerEncoder and nn.MultiheadAttention follows autocast "
                "within one operator, which a graph cannot repeat",
                where=where,
                hint="torch.backends.mha.set_fastpath_enabled(False)",
            )


# -- what stays whole while the backward is derived -----------------------------------------------

_RESAMPLING = (
    *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
    *(f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)


@contextmanager
def eager_resampling(*, symbolic: bool = False) -> Iterator[None]:
    """Keep upsampling as the operators that eager runs.

    Tracing prefers Python decompositions of these composite operators. They are written for code
    generators and round differently.

    Args:
        symbolic: whether sizes may be symbols, of which eager's composite would make numbers.
    """
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    operators = [
        getattr(packet, overload)
        for packet in (getattr(torch.ops.aten, n) for n in _RESAMPLING)
        for overload in packet.overloads()
    ]
    kernels = [
        (op, k, op.py_kernels.pop(k)) for op in operators for k in keys if k in op.py_kernels
    ]
    try:
        for operator in operators:
            operator._dispatch_cache.clear()
        with ExitStack() as stack:
            for operator in operators if symbolic else ():
                if operator._overloadname == "vec":
                    stack.enter_context(python_kernel(operator, _resampling(operator)))
            yield
    finally:
        for operator, key, kernel in kernels:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


def _resampling(operator: torch._ops.OpOverload) -> Callable[..., Any]:
    """The composite that takes sizes or scales, as a call of the operator that takes both."""
    target = operator.overloadpacket.default
    names = [argument.name for argument in operator._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        source, sizes = given["input"], given.get("output_size")
        scales = given.get("scale_factors") or [None] * (source.dim() - 2)
        if sizes is None:
            sizes = [_scaled(n, s) for n, s in zip(source.shape[2:], scales, strict=True)]
        corners = [given["align_corners"]] if "align_corners" in names else []
        return target(source, sizes, *corners, *scales)

    return kernel


def _scaled(size: Any, scale: float) -> Any:
    whole = scale == int(scale)
    return size * int(scale) if whole else torch.sym_int(size * scale)  # type: ignore[no-untyped-call]


# A check returns nothing, and must stay where nobody uses it.
has_side_effect(torch.ops.aten._linalg_check_errors.default)


@contextmanager
def checks_without_order() -> Iterator[None]:
    """Keep the checks of linear algebra as plain operators.

    Tracing otherwise threads a token through all of them, as if they were prints. A check reads
    its argument and nothing else, so the order of the graph is order enough.
    """
    entry = torch._library.simple_registry.singleton.find("aten::_linalg_check_errors")
    before = entry.effect.effect
    entry.effect.register(None)
    try:
        yield
    finally:
        entry.effect.register(before)
