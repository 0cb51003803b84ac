"""Calls that a captured forward must not take apart: recurrent networks and the CTC loss.

PyTorch decomposes both while a graph is traced. An LSTM or GRU is unrolled over time, which is slow,
and its dropout between layers is lost; the CTC loss is refused, because the shape of an intermediate
depends on data. Here they become operators of `graphopt.ops` instead: enter `capturable_leaves`
while Dynamo captures, and call `replace_leaves` on the graph before its backward is derived.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, fx

from graphopt.errors import CaptureError
from graphopt.graph import module_of, source_of
from graphopt.ops.rnn import MODES

Kernel = Callable[..., Any]


# -- what each leaf becomes ------------------------------------------------------------------------


def _rnn(
    mode: str,
    input: Any,
    hx: Any,
    params: Any,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    state = list(hx) if mode == "lstm" else [hx]
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    call = (mode, input, state, list(params), *options, None, [])
    return torch.ops.graphopt.rnn.default, call


def _ctc_loss(
    log_probs: Any,
    targets: Any,
    input_lengths: Any,
    target_lengths: Any,
    blank: int = 0,
    reduction: int = 1,
    zero_infinity: bool = False,
) -> tuple[torch._ops.OpOverload, tuple[Any, ...]]:
    operators = torch.ops.graphopt.ctc_loss
    listed = isinstance(input_lengths, list | tuple)
    lengths = (list(input_lengths), list(target_lengths)) if listed else (input_lengths, target_lengths)
    call = (log_probs, targets, *lengths, blank, reduction, zero_infinity, None, [])
    return operators.IntList if listed else operators.default, call


def _refuse_packed(*args: Any, **kwargs: Any) -> Any:
    raise CaptureError(
        "a recurrent network on a packed sequence cannot be captured: its shapes depend on data",
        hint="pass the padded batch and mask the outputs beyond each length",
    )


# -- while Dynamo captures -------------------------------------------------------------------------


def _kernels() -> Mapping[torch._ops.OpOverload, Kernel]:
    """Stand-ins under which PyTorch's tracing sees the shapes of a leaf without entering it."""

    def rnn(mode: str) -> Kernel:
        def kernel(*args: Any) -> tuple[Tensor, ...]:
            target, call = _rnn(mode, *args)
            output, hn, cn, _ = target(*call)
            return (output, hn, cn) if mode == "lstm" else (output, hn)

        return kernel

    def ctc_loss(*args: Any) -> Tensor:
        target, call = _ctc_loss(*args)
        loss: Tensor = target(*call)[0]
        return loss

    aten = torch.ops.aten
    kernels: dict[torch._ops.OpOverload, Kernel] = {
        aten.ctc_loss.Tensor: ctc_loss,
        aten.ctc_loss.IntList: ctc_loss,
    }
    for mode in MODES:
        packet = getattr(aten, mode)
        kernels[packet.input] = rnn(mode)
        kernels[packet.data] = _refuse_packed
    return kernels


@contextmanager
def capturable_leaves() -> Iterator[None]:
    """Let Dynamo (or `torch.export`) trace through leaves without taking them apart.

    Nothing that a guard can see is changed, and everything is put back on leaving: guards of a graph
    captured inside hold outside. Real tensors still run PyTorch's own kernels, in all threads.
    """
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(allow_rnn=True))
        for op, kernel in _kernels().items():
            stack.enter_context(_python_kernel(op, kernel))
        yield


@contextmanager
def _python_kernel(op: torch._ops.OpOverload, kernel: Kernel) -> Iterator[None]:
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
        module: as Dynamo made it; call nodes carry ``meta["example_value"]``.

    Returns:
        One description per rewritten call: the module it belongs to and what it computes.

    Raises:
        CaptureError: a recurrent network works on a packed sequence.
    """
    replaced = []
    for node in module.graph.find_nodes(op="call_function", target=torch.ctc_loss):
        _replace_ctc_loss(node)
        replaced.append(_describe(node, "ctc_loss"))
    for mode, function in MODES.items():
        for node in module.graph.find_nodes(op="call_function", target=function):
            _replace_rnn(node, mode)
            replaced.append(_describe(node, mode))
    if replaced:
        module.recompile()
    return tuple(replaced)
