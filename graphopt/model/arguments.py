"""Check and normalise the arguments of `optimize`, before anything is touched."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import constants
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.optim import LBFGS, Optimizer

from graphopt import registry
from graphopt.capture.flat import location
from graphopt.errors import ArgumentError
from graphopt.passbase import Pass
from graphopt.pipeline import Pipeline


def pipeline_of(passes: str | Sequence[Pass], *, several_ranks: bool) -> Pipeline:
    """The passes that `optimize` was given."""
    if isinstance(passes, str):
        one, several = registry.PRESETS.get(passes, (passes, passes))
        return Pipeline.parse(several if several_ranks else one)
    for item in passes:
        if not isinstance(item, Pass):
            raise ArgumentError(
                f"passes must be a spec or a list of passes, and holds {item!r}",
                hint="passes='cleanup', or passes=[Cleanup()] with an instance of each pass",
            )
    return Pipeline(tuple(passes))


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise `ArgumentError` for a value that is none of these."""
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")


def has_no_forward(model: nn.Module) -> bool:
    """Whether nobody has written a forward; that of Lightning's base class only raises."""
    forward = model.__dict__.get("forward", type(model).forward)
    name = getattr(forward, "__qualname__", "")
    return name in ("_forward_unimplemented", "LightningModule.forward")


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
            hint="optimize first, wrap afterwards"
            + (
                "; in a job optimize(...) takes its place, unless passes='cleanup'"
                if type(model).__name__ == "DistributedDataParallel"
                else ""
            ),
        )
    if has_no_forward(model):
        parts = [
            name
            for name, part in model.named_children()
            if next(part.parameters(), None) is not None
        ]
        raise ArgumentError(
            f"{type(model).__name__} has no forward, so there is nothing to optimize",
            hint=f"optimize the networks in it: graphopt.optimize(model.{(parts or ['net'])[0]})",
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


def check_step(
    model: nn.Module, loss: object, optimizer: object, pipeline: Pipeline, mesh: Mesh
) -> None:
    """Raise `ArgumentError` where loss and optimizer do not fit model, passes and mesh."""
    owns = [pass_.name for pass_ in pipeline.passes if pass_.owns_step]
    given = {"loss": loss, "optimizer": optimizer}
    for name, value in given.items():
        if value is not None and not owns:
            raise ArgumentError(
                f"{name} is given, and no pass of {str(pipeline)!r} runs whole steps",
                hint=f"leave {name} out, and train with the model as usual",
            )
    if loss is not None and not callable(loss):
        raise ArgumentError(
            f"loss is a {type(loss).__name__} and cannot be called",
            hint="loss=torch.nn.functional.cross_entropy",
        )
    reduces = any(pass_.reduces for pass_ in pipeline.passes)
    # Without a mesh, the ranks of a job are its dp.
    dp = mesh.groups["dp"].size() if "dp" in mesh.groups else 1
    if owns and dp > 1 and not reduces:
        raise ArgumentError(
            f"no pass of {str(pipeline)!r} reduces gradients over the {dp} ranks of dp",
            hint=f"passes='{pipeline},{_reducing()}'; or mesh='pp={dp}', if these ranks are to "
            "share the model",
        )


def _reducing() -> str:
    """A pass that reduces gradients of steps in stages."""
    kinds = {name: registry.get(name) for name in registry.names()}
    return next(n for n, kind in kinds.items() if kind.reduces and "staged" not in kind.conflicts)


def check_kept(
    pipeline: Pipeline, sizes: Mapping[str, int], what: str, forward: Callable[..., object]
) -> None:
    """Raise `ArgumentError` where several ranks share the work of a forward that keeps things.

    Args:
        pipeline: of the model.
        sizes: of the mesh dimensions in use.
        what: an object that keeps tensors or numbers of a call, as Dynamo names it.
        forward: of the model.
    """
    for pass_ in pipeline.passes:
        if pass_.owns_step and any(sizes.get(name, 1) > 1 for name in pass_.communicates):
            raise ArgumentError(
                f"forward keeps tensors or numbers in {_readable(what)}, and with {pass_.name!r} "
                "no rank computes all of them",
                where=location(forward),
                hint="return what is to be kept, or keep it in a buffer: register_buffer",
            )


def _readable(source: str) -> str:
    """``L['self']._modules['head'].seen`` -> ``self.head.seen``."""
    found = re.sub(r"\._(modules|buffers|parameters)\['(\w+)'\]", r".\2", source)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", found)


def made_optimizer(
    model: nn.Module, optimizer: object, replaced: Mapping[str, Tensor]
) -> Optimizer | None:
    """The optimizer of a model's parameters, made where a function was given.

    Args:
        model: the model.
        optimizer: what `optimize` was given.
        replaced: parameters that it had before, by name.

    Raises:
        ArgumentError: it is none, or has a parameter that is not the model's.
    """
    if optimizer is None:
        return None
    if not isinstance(optimizer, Optimizer) and callable(optimizer):
        optimizer = optimizer(model.parameters())
    if not isinstance(optimizer, Optimizer):
        raise ArgumentError(
            f"optimizer gives a {type(optimizer).__name__} and no torch.optim.Optimizer",
            hint="optimizer=torch.optim.SGD(model.parameters(), lr=0.1)",
        )
    if isinstance(optimizer, LBFGS):
        raise ArgumentError(
            "LBFGS calls the model within its step, and a step in stages has one call",
            where="optimizer",
            hint="take an optimizer whose step() needs no closure",
        )
    own = set(model.parameters())
    gone = {id(parameter): name for name, parameter in replaced.items()}
    for number, group in enumerate(optimizer.param_groups):
        if name := next((gone[id(p)] for p in group["params"] if id(p) in gone), ""):
            raise ArgumentError(
                f"the optimizer was made before and holds {name!r}, in whose place optimize has "
                "put others",
                hint="give what makes one of them: "
                "optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)",
            )
        if any(parameter not in own for parameter in group["params"]):
            raise ArgumentError(
                f"group {number} of the optimizer has a parameter that is not the model's",
                hint="make the optimizer of model.parameters()",
            )
    return optimizer


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


@dataclass(frozen=True)
class Mesh:
    """The parallel dimensions of a job.

    Attributes:
        sizes: by name.
        groups: process groups of the running job by name; empty where none runs.
    """

    sizes: Mapping[str, int]
    groups: Mapping[str, Any]


def mesh_of(mesh: object) -> Mesh:
    """What `optimize` was given: a text, a dict, a `DeviceMesh`, a process group, or nothing.

    Without one the whole world of a running job is its ``dp``.

    Raises:
        ArgumentError: it is none of these, or does not fit the ranks of the running job.
    """
    running = dist.is_available() and dist.is_initialized()
    if running and isinstance(mesh, DeviceMesh):
        names = mesh.mesh_dim_names
        if names is None:
            raise ArgumentError(
                "the dimensions of this DeviceMesh have no names",
                hint="init_device_mesh(device, shape, mesh_dim_names=('dp',))",
            )
        groups = {name: mesh.get_group(name) for name in names}
        _wait_as_the_job(groups)
        return Mesh({name: group.size() for name, group in groups.items()}, groups)
    if running and isinstance(mesh, dist.ProcessGroup):
        return Mesh({"dp": mesh.size()}, {"dp": mesh})
    if mesh is dist.GroupMember.NON_GROUP_MEMBER and mesh is not None:
        raise ArgumentError(
            f"rank {dist.get_rank()} is not in the process group that mesh names",
            hint="call optimize on the ranks of the group only",
        )
    sizes = parse_mesh(mesh)
    if not running:
        return Mesh(sizes, {})
    world = dist.group.WORLD
    assert world is not None
    if sizes and math.prod(sizes.values()) != world.size():
        words = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ArgumentError(
            f"mesh says {words}, and this job has {world.size()} ranks",
            hint="start as many ranks as the mesh has, or leave mesh out if all of them are dp",
        )
    large = [name for name, size in sizes.items() if size > 1]
    if len(large) > 1:
        # As with torch's own meshes, the last dimension has neighbouring ranks.
        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        made = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        groups = {name: made.get_group(name) for name in sizes}
        _wait_as_the_job(groups)
        return Mesh(sizes, groups)
    return Mesh(sizes, {large[0] if large else "dp": world})


def _wait_as_the_job(groups: Mapping[str, dist.ProcessGroup]) -> None:
    """Give the groups of a mesh the timeout of the job, where they have torch's default.

    `init_device_mesh` does not ask for one, so that a rank which is frozen would be waited for half
    an hour, whatever `init_process_group` was told.
    """
    world = dist.group.WORLD
    assert world is not None
    job = _timeout(world)
    defaults = (constants.default_pg_timeout, constants.default_pg_nccl_timeout)
    for group in groups.values():
        if _timeout(group) != job and _timeout(group) in defaults:
            _set_pg_timeout(job, group)


def _timeout(group: dist.ProcessGroup) -> Any:
    device = group._device_types[0]
    return group._get_backend(torch.device(device)).options._timeout


def parse_mesh(mesh: object) -> Mapping[str, int]:
    """``"dp=8,pp=4"`` or ``{"dp": 8}`` as a dict; empty for ``None``.

    Raises:
        ArgumentError: it is neither, a size is no positive whole number, or a name is missing or
            there twice.
    """
    if mesh is None:
        return {}
    items = list(mesh.items()) if isinstance(mesh, Mapping) else _mesh_items(mesh)
    sizes: dict[str, int] = {}
    for name, size in items:
        whole = size if type(size) is int else int(size) if str(size).isdecimal() else 0
        if whole < 1 or isinstance(size, float):
            raise ArgumentError(
                f"mesh dimension {name}={size!r} is not a positive whole number",
                hint="mesh='dp=8,pp=4'",
            )
        if not str(name).isidentifier() or name in sizes:
            raise ArgumentError(
                f"mesh has {'two dimensions' if name in sizes else 'a dimension'} of the name "
                f"{name!r}",
                hint="mesh='dp=8,pp=4'",
            )
        sizes[str(name)] = whole
    return sizes


def _mesh_items(mesh: object) -> list[tuple[str, Any]]:
    if not isinstance(mesh, str):
        raise ArgumentError(
            f"mesh={mesh!r} is no text, dict, DeviceMesh or process group of a running job",
            hint="mesh='dp=8'",
        )
    pairs = [part.partition("=") for part in mesh.split(",")]
    return [(name.strip(), value) for name, _, value in pairs]
