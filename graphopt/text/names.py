"""The bare words of a text: dtypes, devices, layouts, memory formats and operators."""

from __future__ import annotations

import difflib
import importlib
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch

from graphopt.ops.numbers import NUMBER_FUNCTIONS, number_function

SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint64": "u64",
    "uint32": "u32",
    "uint16": "u16",
    "uint8": "u8",
    "complex128": "c128",
    "complex64": "c64",
    "complex32": "c32",
}


def _named(kind: type) -> dict[str, Any]:
    return {str(v).removeprefix("torch."): v for v in vars(torch).values() if isinstance(v, kind)}


DTYPES: dict[str, torch.dtype] = {SHORT.get(n, n): v for n, v in _named(torch.dtype).items()}
DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}
_LAYOUTS: dict[str, torch.layout] = _named(torch.layout)
_FORMATS: dict[str, torch.memory_format] = _named(torch.memory_format)
CPU = torch.device("cpu")


def word_of(value: torch.dtype | torch.device | torch.layout | torch.memory_format) -> str:
    """The word for one of torch's own constants."""
    if isinstance(value, torch.dtype):
        return DTYPE_WORDS[value]
    return str(value).removeprefix("torch.")


def constant_of(
    word: str,
) -> torch.dtype | torch.device | torch.layout | torch.memory_format | None:
    """The inverse of `word_of`; ``None`` for a word that names nothing."""
    for table in (DTYPES, _LAYOUTS, _FORMATS):
        if word in table:
            return table[word]
    return device_of(word)


def device_of(word: str) -> torch.device | None:
    """The device that a word names, whether or not this machine has it."""
    try:
        return torch.device(word)
    except (RuntimeError, ValueError, IndexError, OverflowError):  # of numbers that are too large
        return None


def closest(word: str, options: Iterable[str]) -> str:
    """A hint naming the most similar option; ``""`` when none is similar."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f"did you mean {found[0]}?" if found else ""


# -- operators -------------------------------------------------------------------------------------

GETITEM = "getitem"

# Operators of these namespaces exist, or can run on fake tensors, once the module is imported.
_REGISTERED_BY = {
    "graphopt": "graphopt.ops",
    "_c10d_functional": "torch.distributed._functional_collectives",
}


def operator_of(name: str) -> Callable[..., Any] | None:
    """What a qualified name calls; ``None`` when no such operator is registered.

    ``aten.mm.default`` is an overload, ``getitem`` picks from several results, any other single
    word is one of torch's higher-order operators. ``operator.mul`` is one of `NUMBER_FUNCTIONS`.
    """
    if name == GETITEM:
        return operator.getitem
    if name in NUMBER_FUNCTIONS:
        return NUMBER_FUNCTIONS[name]
    namespace, *rest = name.split(".")
    module = _REGISTERED_BY.get(namespace) if rest else "torch._higher_order_ops"
    if module:
        importlib.import_module(module)
    found: Any = torch.ops if rest else torch.ops.higher_order
    kind = torch._ops.OpOverload if rest else torch._ops.HigherOrderOperator
    for part in (namespace, *rest):
        found = getattr(found, part, None)
    return found if isinstance(found, kind) else None


def operator_hint(name: str) -> str:
    """What the writer of an unknown operator may have meant."""
    namespace, *rest = name.split(".")
    if not rest:
        return closest(name, [GETITEM, *torch._ops._higher_order_ops]) or _FULL_NAME
    known = [n.replace("::", ".") for n in torch._C._dispatch_get_all_op_names()]
    known = [n if n.count(".") > 1 else f"{n}.default" for n in known]
    same = [n for n in known if n.startswith(f"{namespace}.")]
    if not same:
        return f"import the module that registers the operators of {namespace}"
    return closest(name, same) or _FULL_NAME


_FULL_NAME = "write the full name with its overload, such as aten.add.Tensor"


def name_of(target: object) -> str | None:
    """The qualified name of what a node calls; ``None`` when a text cannot hold it."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target.__name__)
    return GETITEM if target is operator.getitem else number_function(target) or None
