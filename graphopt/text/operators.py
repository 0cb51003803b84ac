"""Which operators a text may call, and which arguments each of them takes.

A text is data that somebody gave us, and its operators are run on fake tensors while it is read. So
only those are called that compute values from values: nothing that reads or writes files, prints,
changes a generator or a storage, or packs weights for one kernel. And no operator is called with an
argument that its schema does not have: torch casts some of them without a look, and the process
ends.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HIGHER_ORDER = _words(
    "cond while_loop scan associative_scan map_impl flex_attention flex_attention_backward wrap "
    "tag_activation_checkpoint wrap_activation_checkpoint wrap_with_set_grad_enabled "
    "wrap_with_autocast out_dtype invoke_subgraph autograd_function_apply"
)

_NAMESPACES = frozenset({"aten", "prims", "graphopt", "_c10d_functional"})
# Of torch, with operators that are no mathematics.
_INTERNAL = _words(
    "quantized _quantized symm_mem static_runtime c10d onednn mkldnn sparse inductor profiler "
    "_test _c10d_functional_autograd mkldnn_prepacked mkl quantization debugprims rngprims _native "
    "inductor_prims debug_mode_ops export _dtensor prim fsdp prepacked rpc caffe2"
)
_COLLECTIVES = _words(
    "all_reduce all_reduce_coalesced all_gather_into_tensor all_gather_into_tensor_coalesced "
    "reduce_scatter_tensor reduce_scatter_tensor_coalesced all_to_all_single broadcast "
    "wait_tensor"
)
# They make tensors of nothing but numbers.
_FACTORIES = _words(
    "arange bartlett_window blackman_window empty empty_permuted empty_strided eye full "
    "hamming_window hann_window kaiser_window linspace logspace ones rand randint randn randperm "
    "range scalar_tensor tril_indices triu_indices zeros fft_fftfreq fft_rfftfreq iota"
)
_REFUSED = re.compile(
    r"""
      # families: for lists of tensors, one device or library, formats, tests
      (?: _foreach | _fused_(?!rms|sdp|dropout) | _amp_ | _test | _nested | _sparse | sparse_
        | _coo | _cslt | fbgemm_ | _mkldnn | mkldnn_ | miopen_ | _use_cudnn | _cudnn | cudnn_
        | _cuda | _lazy | _mps | _nnpack | _triton | _thnn | _make_ | q_ | quantize | _fake_quant
        | _wrapped | _coalesced | _has_ | _sobol | _spsolve | _to_sparse | to_sparse | _convert_
        | _dyn_ | _weight_int | _int_mm | _scaled_grouped | _transform_bias | _pin | _rowwise
        | _batch_norm_impl | _validate | _indices | _values | _neg_view_copy | _ctc_loss_T
        | _add_batch_dim | _remove_batch_dim ).*
    | .*(?: _coo_tensor | _csr | _csc | _bsr | _bsc | sparse | quantized ).*
      # what changes a storage, a generator or autograd, or reads a file; _ in place
    | (?: from_file | set | resize | resize_as | _resize_output | record_stream | set_data
        | share_memory | is_pinned | pin_memory | unsafe_storage | lift.*_storage
        | manual_seed | seed | initial_seed | _print
        | _backward | backward | requires_grad | retain_grad | output_nr | is_leaf | _version
        | data | align_.* | rename | refine_names | names | _fw_primal | _make_dual.*
        | _unpack_dual | dequantize | int_repr | coalesce | to_mkldnn.* | _propagate_xla_data
        | _reshape_from_tensor | _shape_as_tensor | _functional_assert_scalar | chalf )_?
    """,
    re.VERBOSE,
)


def names_no_mathematics(name: str) -> bool:
    """Whether an operator of ATen, or the method or function of its name, does something else."""
    return _REFUSED.fullmatch(name) is not None


def is_allowed(target: OpOverload | HigherOrderOperator) -> bool:
    """Whether a text may call this operator."""
    if isinstance(target, HigherOrderOperator):
        return target.__name__ in HIGHER_ORDER
    return _is_allowed(target)


@cache
def _is_allowed(target: OpOverload) -> bool:
    schema = target._schema
    namespace, _, name = schema.name.partition("::")
    if any(
        map(iskeyword, (name, *target.overloadpacket.__name__.split("."), target._overloadname))
    ):
        return False  # a module that calls it is no Python
    if any(a.is_out for a in schema.arguments):
        return False
    if not all(_is_known(a.real_type) for a in schema.arguments):
        return False
    if namespace not in _NAMESPACES:
        return namespace not in _INTERNAL and _has_fake_kernel(target)
    if namespace == "_c10d_functional":
        return name in _COLLECTIVES
    if namespace == "graphopt":
        return True
    if names_no_mathematics(name):
        return False
    if name == "_assert_scalar":  # a condition on sizes
        return True
    if any(_element(a.real_type).kind() == "TensorType" for a in schema.arguments):
        return True
    return name in _FACTORIES


def _has_fake_kernel(target: OpOverload) -> bool:
    """Whether a package has said in Python what an operator of its own gives."""
    from torch._library.simple_registry import singleton

    return singleton.find(target._schema.name).fake_impl.kernel is not None


_KNOWN = _words(
    "TensorType IntType BoolType SymIntType NumberType FloatType ScalarTypeType StringType "
    "DeviceObjType LayoutType GeneratorType MemoryFormatType SymBoolType ComplexType AnyType"
)


def _is_known(kind: Any) -> bool:
    return _element(kind).kind() in _KNOWN


def _element(kind: Any) -> Any:
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return kind


_TAKE_APART = ("unbind", "split", "chunk", "rnn", "lstm", "gru")
_MOST_PIECES = 1 << 16
_INTEGERS = (int, torch.SymInt)
_REALS = (*_INTEGERS, float, torch.SymFloat)
_TYPES: Mapping[str, tuple[type, ...]] = {
    "IntType": _INTEGERS,
    "SymIntType": _INTEGERS,
    "FloatType": _REALS,
    "BoolType": (bool, torch.SymBool),
    "SymBoolType": (bool, torch.SymBool),
    "NumberType": (*_REALS, complex, torch.SymBool),
    "ComplexType": (*_REALS, complex),
    "StringType": (str,),
    "DeviceObjType": (torch.device,),
    "ScalarTypeType": (torch.dtype,),
    "LayoutType": (torch.layout,),
    "MemoryFormatType": (torch.memory_format,),
    "GeneratorType": (),
    "AnyType": (str,),  # the name of a group of ranks
}


def misfit(target: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """What is wrong with the arguments of a call; ``""`` where they are those of the schema."""
    arguments = target._schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    if len(args) > len(positional):
        return f"it takes {len(positional)} arguments without a name, and there are {len(args)}"
    given = dict(zip((a.name for a in positional), args, strict=False))
    for name in kwargs:
        if name in given:
            return f"the argument {name} is given twice"
        if all(a.name != name for a in arguments):
            return f"it has no argument {name}"
    given.update(kwargs)
    for argument in arguments:
        if argument.name not in given:
            if not argument.has_default_value():
                return f"the argument {argument.name} is missing"
            continue
        value = given[argument.name]
        if not _fits(value, argument.real_type):
            return f"{argument.name} should be {argument.real_type}, and is {_said(value)}"
        if isinstance(value, (list, tuple)) and not value and _is_tensors(argument.real_type):
            return f"{argument.name} should have a tensor, and has none"
        # One number stands for all, and `int[1]` for any number of them.
        if isinstance(value, (list, tuple)) and (wanted := getattr(argument, "N", 0) or 0) > 1:
            # No stride is that of the window, in backwards, too, which have no default for it.
            absent = not value and (argument.name == "stride" or argument.has_default_value())
            if len(value) != wanted and not absent:
                return f"{argument.name} should have {wanted} entries, and has {len(value)}"
    return _too_many(target, given)


def _too_many(target: OpOverload, given: Mapping[str, Any]) -> str:
    """Whether a tensor would be taken apart into more pieces than any graph has nodes."""
    name = target._schema.name.rpartition("::")[2]
    tensor = next((v for v in given.values() if isinstance(v, Tensor)), None)
    if tensor is None or not any(word in name for word in _TAKE_APART):
        return ""
    sizes = [size for size in tensor.shape if type(size) is int]
    pieces, by = max(sizes, default=0), given.get("split_size")
    if type(by) is int and by > 0:
        pieces //= by
    counts = [v for k, v in given.items() if k in ("chunks", "sections") and type(v) is int]
    if counts:
        pieces = max(counts)
    if isinstance(given.get("split_sizes", given.get("indices")), (list, tuple)):
        return ""  # one piece for each
    return f"it would give {pieces} tensors" if pieces > _MOST_PIECES else ""


def _is_tensors(kind: Any) -> bool:
    return bool(kind.kind() == "ListType" and kind.getElementType().kind() == "TensorType")


def _fits(value: Any, kind: Any) -> bool:
    name = kind.kind()
    if name == "OptionalType":
        return value is None or _fits(value, kind.getElementType())
    if name == "ListType":
        element = kind.getElementType()
        if isinstance(value, (list, tuple)):
            return all(_fits(item, element) for item in value)
        return element.kind() in ("IntType", "SymIntType") and _fits(value, element)
    if name == "TensorType":
        # A number is wrapped into a tensor.
        return isinstance(value, (Tensor, *_REALS, complex))
    return isinstance(value, _TYPES[name])


def _said(value: object) -> str:
    if isinstance(value, Tensor):
        return "a tensor"
    if isinstance(value, (list, tuple)):
        return f"a list of {', '.join(dict.fromkeys(map(_said, value))) or 'nothing'}"
    return f"{value!r:.40}" if value is None else f"{type(value).__name__} {value!s:.40}"
