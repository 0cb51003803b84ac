"""Under which key a capture is kept: all that can be told of a call before looking at any entry."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo.config
import torch._functorch.config
from torch import Tensor, nn
from torch.nn.modules import module as of_all_modules
from torch.utils import _pytree as pytree

import graphopt
from graphopt.capture.checkpoints import within_checkpoint
from graphopt.capture.kept.fingerprints import Fingerprints, Unkept, digest
from graphopt.capture.kept.operators import kernels_of_torch_only

_PLAIN = (type(None), bool, int, float, str)
_NOTHING: Mapping[int, str] = {}


def key_of(
    model: nn.Module,
    forward: Callable[..., object],
    args: Sequence[object],
    kwargs: Mapping[str, object],
    varying: Mapping[int, Mapping[int, str]] | None = None,
) -> str:
    """The key of one call in this process.

    Args:
        model: of the call.
        forward: its function.
        args: of the call.
        kwargs: of the call.
        varying: names of the sizes that are symbols, by the identity of a tensor and its dimension.

    Raises:
        Unkept: of calls in this mode none is kept.
    """
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        raise Unkept("it is called within a mode")
    if any(getattr(of_all_modules, name) for name in _HOOKS):
        raise Unkept("there are hooks on all modules")
    if within_checkpoint():
        raise Unkept("it is called within a checkpoint")
    kernels_of_torch_only()
    of = Fingerprints()
    code = getattr(forward, "__code__", None)
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    names = varying or {}
    given = [_leaf(leaf, names.get(id(leaf), {})) for leaf in leaves]
    symbols = sorted(name for dims in names.values() for name in dims.values())
    return digest([
        _environment(), _state(), of.code(code) if code is not None else "",
        of.kind(model), spec, *given, *_modules(model), *symbols,
    ])  # fmt: skip


_HOOKS = (
    "_global_forward_pre_hooks", "_global_forward_hooks",
    "_global_backward_pre_hooks", "_global_backward_hooks",
)  # fmt: skip


def _leaf(leaf: object, varying: Mapping[int, str] = _NOTHING) -> str:
    if isinstance(leaf, Tensor):
        shape = tuple(varying.get(number, size) for number, size in enumerate(leaf.shape))
        form: object = leaf.layout
        if leaf.layout is torch.strided:
            form = _order(leaf.stride()) if varying else leaf.stride()
        return str((
            type(leaf).__name__, shape, form, leaf.dtype, str(leaf.device), leaf.requires_grad,
        ))  # fmt: skip
    return (
        f"{type(leaf).__qualname__} {leaf!r}" if type(leaf) in _PLAIN else type(leaf).__qualname__
    )


def _order(strides: Sequence[int]) -> list[int]:
    """Which dimensions lie within which others, as far as that is the same at all sizes."""
    steps = sorted({*strides, 0, 1})
    return [steps.index(stride) for stride in strides]


def _modules(model: nn.Module) -> list[str]:
    """Names, classes and plain attributes of all modules, and the forms of their tensors."""
    found = []
    for name, module in model.named_modules():
        kind = type(module)
        plain = {k: v for k, v in vars(module).items() if type(v) in _PLAIN}
        found.append(f"{name} {kind.__module__}.{kind.__qualname__} {plain}")
        for own, tensor in (*module._parameters.items(), *module._buffers.items()):
            found.append(f"{own} {'' if tensor is None else _leaf(tensor)}")
    return found


def _state() -> str:
    """The state of the process that operators and Dynamo look at."""
    backends: Any = torch.backends
    return str([
        torch._C._dynamo.guards.GlobalStateGuard().__getstate__(),
        torch.is_inference_mode_enabled(), torch.is_anomaly_enabled(),
        torch.get_default_device(), torch.get_float32_matmul_precision(),
        backends.cuda.flash_sdp_enabled(), backends.cuda.mem_efficient_sdp_enabled(),
        backends.cuda.math_sdp_enabled(), backends.cuda.cudnn_sdp_enabled(),
        backends.mkldnn.enabled, backends.cudnn.enabled, backends.cudnn.benchmark,
        torch._C._get_nnpack_enabled(), backends.mha.get_fastpath_enabled(),
    ])  # fmt: skip


@functools.cache
def sources() -> str:
    """Every line of graphopt."""
    root = Path(graphopt.__file__).parent
    hashed = hashlib.sha256()
    for folder in (root, root / "passes", root / "runtime"):  # links, which rglob does not follow
        for path in sorted(folder.rglob("*.py")):
            hashed.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return hashed.hexdigest()


@functools.cache
def _installed() -> str:
    """Python, torch, graphopt and the processor; of graphopt every line."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return digest([
        sys.version, platform.machine(), torch.__version__, torch.version.git_version,
        torch.backends.cpu.get_cpu_capability(), gpu, os.name, sources(),
    ])  # fmt: skip


def _environment() -> str:
    """What is installed, and how Dynamo and AOTAutograd are set."""
    settings: tuple[Any, ...] = (torch._dynamo.config, torch._functorch.config)
    plain = [
        (name, sorted(map(str, value)) if isinstance(value, set | frozenset) else value)
        for config in settings
        for name, value in sorted(config.get_config_copy().items())
        if isinstance(value, (*_PLAIN, *_MANY))
        and not any(callable(item) for item in (value if isinstance(value, _MANY) else ()))
    ]
    return f"{_installed()} {plain}"


_MANY = (tuple, list, set, frozenset)
