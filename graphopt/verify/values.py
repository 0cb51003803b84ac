"""The invariant of values: what a node's meta says is what its operator returns.

Each call is run on the recorded fake values of its arguments, so a wrong value is reported at the
node that is wrong and not at everything after it; by induction this is full propagation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.fakes import unasked
from graphopt.analysis.hints import hint
from graphopt.graph import value_of
from graphopt.verify.form import Scan, Violation


def values_true(scan: Scan) -> Iterator[Violation]:
    """Yield nodes whose recorded value is not what their operator returns."""
    mode = _fake_mode(scan)
    if mode is None:
        return
    # To check a graph adds no condition to it.
    with mode, torch.no_grad(), unasked(map(value_of, scan.placeholders)):
        for node in (*scan.attributes, *scan.calls):
            if scan.functions and not isinstance(node.target, OpOverload):
                continue  # what functions change, modes and memory, has changed already
            try:
                value = _recompute(scan, node, mode)
            except Exception as error:
                # Whatever a fake kernel raises, it means: not with these arguments.
                yield node, f"its operator refuses these arguments: {error}"
                continue
            if difference := _difference(value_of(node), value):
                yield node, f"its recorded value has {difference}"


def _fake_mode(scan: Scan) -> FakeTensorMode | None:
    values = map(value_of, scan.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def _recompute(scan: Scan, node: fx.Node, mode: FakeTensorMode) -> object:
    if node.op == "get_attr":
        value = scan.attribute(node)
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value, static_shapes=True)
        return value_of(node)

    if node.target is operator.getitem:
        source, index = cast("tuple[fx.Node, int]", node.args)
        return value_of(source)[index]

    def argument(used: fx.Node) -> Any:
        value = value_of(used)
        return scan.attribute(used) if value is None and used.op == "get_attr" else value

    call = cast("Callable[..., object]", node.target)
    return call(*fx.map_arg(node.args, argument), **fx.map_arg(node.kwargs, argument))


def _difference(recorded: object, true: object) -> str:
    """What differs between two values, as ``"dtype a instead of b"``; ``""`` for nothing."""
    if isinstance(recorded, torch.Tensor) and isinstance(true, torch.Tensor):
        return _tensor_difference(recorded, true)
    if isinstance(recorded, (list, tuple)) and isinstance(true, (list, tuple)):
        if len(recorded) != len(true):
            return f"{len(recorded)} elements instead of {len(true)}"
        found = (_difference(a, b) for a, b in zip(recorded, true, strict=True))
        return next(filter(None, found), "")
    if isinstance(recorded, torch.Tensor) or isinstance(true, torch.Tensor):
        return f"type {type(recorded).__name__} instead of {type(true).__name__}"
    return ""


def _tensor_difference(recorded: torch.Tensor, true: torch.Tensor) -> str:
    for what, have, want in (
        ("dtype", recorded.dtype, true.dtype),
        ("device", recorded.device, true.device),
    ):
        if have != want:
            return f"{what} {have} instead of {want}"
    for what, sizes, expected in (
        ("shape", tuple(recorded.shape), tuple(true.shape)),
        ("stride", _strides(recorded), _strides(true)),
    ):
        if not _same_sizes(sizes, expected):
            return f"{what} {sizes} instead of {expected}"
    return ""


def _strides(tensor: torch.Tensor) -> tuple[object, ...]:
    """Strides; 1 where there is one element, whose stride means nothing and varies in practice."""
    return tuple(
        1 if type(size) is int and size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def _same_sizes(left: tuple[object, ...], right: tuple[object, ...]) -> bool:
    """Equal for all sizes of inputs; sizes that depend on data count as equal.

    Each run of an operator makes new ones of these.
    """
    return len(left) == len(right) and all(map(_same_size, left, right))


def _same_size(left: object, right: object) -> bool:
    if not isinstance(left, torch.SymInt) and not isinstance(right, torch.SymInt):
        return left == right
    if hint(left) is None or hint(right) is None:
        return isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt)
    return bool(statically_known_true(left == right))
