"""Check and normalise the arguments of `optimize`, before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from graphopt.errors import ArgumentError


def check_model(model: object) -> None:
    """Raise `ArgumentError` for a model that cannot be optimized in place."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"optimize needs an nn.Module, and got a {type(model).__name__}",
            hint="pass the model object itself",
        )
    wrapped = getattr(model, "_orig_mod", None)
    if isinstance(wrapped, nn.Module):
        raise ArgumentError(
            "this model is wrapped by torch.compile",
            hint="optimize the model itself; backend='inductor' uses the same code generator",
        )
    if type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
        raise ArgumentError(
            f"this model is wrapped in {type(model).__name__}",
            hint="optimize first, wrap afterwards",
        )
    if "forward" in model.__dict__:
        raise ArgumentError(
            "this model has a forward of its own on the instance, which a class cannot replace",
            hint="remove it (del model.forward) or define forward on the class",
        )
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ArgumentError(
            f"{type(model).__name__} has no parameters, so there is no training step to optimize",
            hint="optimize the model that holds the parameters",
        )
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise ArgumentError(
                f"parameter {name!r} is on the meta device and has no values",
                hint="materialise the model first: model.to_empty(device=...), then load weights",
            )
    devices = {str(p.device): n for n, p in parameters.items()}
    if len(devices) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in devices.items())
        raise ArgumentError(
            f"the parameters are on {len(devices)} devices: {places}",
            hint="move the model to one device",
        )


Example = tuple[tuple[Any, ...], dict[str, Any]]


def split_example_inputs(example: object) -> Example | None:
    """``example_inputs`` as positional and keyword arguments; ``None`` when there are none."""
    if example is None:
        return None
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        if len(example) == 2 and isinstance(example[0], tuple) and isinstance(example[1], dict):
            return example[0], example[1]
        return tuple(example), {}
    raise ArgumentError(
        f"example_inputs must be a tensor, a tuple, a dict or a (tuple, dict) pair, and is a "
        f"{type(example).__name__}",
        hint="example_inputs=(batch,)",
    )


def parse_mesh(mesh: object) -> Mapping[str, int]:
    """``"dp=8,pp=4"`` or ``{"dp": 8}`` as a dict; empty for ``None``."""
    if mesh is None:
        return {}
    items = mesh.items() if isinstance(mesh, Mapping) else _mesh_items(mesh)
    sizes = {}
    for name, size in items:
        try:
            sizes[str(name)] = int(size)
        except (TypeError, ValueError):
            sizes[str(name)] = 0
        if sizes[str(name)] < 1:
            raise ArgumentError(
                f"mesh dimension {name}={size!r} is not a positive whole number",
                hint="mesh='dp=8,pp=4'",
            )
    return sizes


def _mesh_items(mesh: object) -> list[tuple[str, Any]]:
    if not isinstance(mesh, str):
        raise ArgumentError(f"mesh={mesh!r} is neither a text nor a dict", hint="mesh='dp=8'")
    pairs = [part.partition("=") for part in mesh.split(",")]
    return [(name.strip(), value) for name, _, value in pairs]
