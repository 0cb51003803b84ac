"""How generated code calls an operator: the way with the least Python between.

``torch.ops.aten.relu.default`` matches its arguments against a schema at every call;
``torch.relu``, which eager calls, has a parser generated for it and takes two thirds of the time.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Any

import torch

_NEXT = re.compile(r"^    (\w+) = next\(args_iter\)\n", re.MULTILINE)
_ITERATOR = re.compile(r"^    args_iter = iter\(args_list\)\n", re.MULTILINE)
OPERATOR = re.compile(r"(?<![\w.])torch\.ops\.(\w+\.\w+\.\w+)\(")

# Operators of ATen that have a function of the same arguments in the same order.
_FUNCTIONS = {
    *("_log_softmax.default", "_native_batch_norm_legit.default", "_softmax.default"),
    *("add.Tensor", "add.out", "addmm.default", "div.out", "empty_like.default", "mul.out"),
    "sub.out",
    *("amax.default", "argmax.default", "bitwise_and.Tensor", "bitwise_not.default"),
    *("bitwise_or.Tensor", "bmm.default", "baddbmm.default", "clone.default"),
    *("convolution.default", "cos.default", "cumsum.default", "detach.default", "div.Scalar"),
    *("div.Tensor", "embedding.default", "eq.Scalar", "eq.Tensor", "erf.default"),
    *("exp.default", "ge.Scalar", "gt.Scalar", "index_select.default", "le.Scalar"),
    *("log.default", "logical_and.default", "logical_not.default", "logical_or.default"),
    *("lt.Scalar", "masked_fill.Scalar", "masked_fill.Tensor", "mean.dim", "mm.default"),
    *("mul.Scalar", "mul.Tensor", "native_dropout.default", "native_group_norm.default"),
    *("native_layer_norm.default", "ne.Scalar", "neg.default", "permute.default"),
    *("pow.Tensor_Scalar", "relu.default", "relu_.default", "rsqrt.default", "rsub.Scalar"),
    *("select.int", "sigmoid.default", "sin.default", "sqrt.default", "squeeze.dim"),
    *("squeeze.dims", "sub.Scalar", "sub.Tensor", "sum.dim_IntList", "t.default"),
    *("tanh.default", "transpose.int", "unsqueeze.default", "where.self"),
}
_METHODS = {
    *("add_.Scalar", "add_.Tensor", "bernoulli_.float", "div_.Scalar", "div_.Tensor"),
    *("expand.default", "view.dtype"),
    *("mul_.Scalar", "mul_.Tensor", "sub_.Scalar", "sub_.Tensor", "unsqueeze_.default"),
}
# A view where that can be. Some kernels lay their results out otherwise than tracing says, and
# what eager did by `reshape` became a view there.
_VIEW = torch._C.TensorBase.reshape
_OF_LAYERS = {
    *("gelu.default", "hardswish.default", "hardtanh.default", "leaky_relu.default"),
    *("silu.default",),
}


def bind(name: str, bound: dict[str, Any]) -> str:
    """The beginning of a call of ``namespace.operator.overload``; `bound` gets what it names."""
    operator = attrgetter(name)(torch.ops)
    if not isinstance(operator, torch._ops.OpOverload):
        return f"torch.ops.{name}("
    alias = "op_" + name.replace(".", "_")
    bound[alias] = _function(name) or operator._op
    return f"{alias}("


def unpacked(source: str) -> str:
    """Generated code that takes its arguments out of their list at once, not one by one."""
    names = _NEXT.findall(source)
    at_once = f"    [{', '.join(names)}] = args_list\n" if names else ""
    return _NEXT.sub("", _ITERATOR.sub(lambda _: at_once, source))


def _function(name: str) -> Any:
    namespace, short, overload = name.split(".")
    key = f"{short}.{overload}"
    if namespace != "aten":
        return None
    if key == "view.default":
        return _VIEW
    if key in _FUNCTIONS:
        return getattr(torch._C._VariableFunctions, short, None)
    if key in _METHODS:
        return getattr(torch._C.TensorBase, short, None)
    return getattr(torch._C._nn, short, None) if key in _OF_LAYERS else None
