"""Training runs in files: a model, its optimizer and what passes own, whole or not at all.

One process writes one file of tensors in the safetensors format, whose header has a JSON document
with everything else, and a checksum of both. Several ranks write one folder of such files, each its
own share, by ``torch.distributed.checkpoint``. A file or folder appears under its name when it is
complete; until then the former one stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import StateError
from graphopt.model import shards
from graphopt.model.checkpoint import opened, sealed, session_of
from graphopt.model.controller import controller_of

FORMAT_VERSION = 1
_MODEL, _PASSES, _REST = "model/", "passes/", "rest/"
_DOCUMENT, _CHECKSUM, _VERSION = "graphopt", "graphopt.checksum", "graphopt.format"


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: Any = None,
) -> None:
    """Write model, optimizer and the state of passes; a crash leaves the former file as it was.

    Call it on every rank of a job: there `path` is a folder, to which each rank writes its share.

    Args:
        path: of the file or folder; its parent must be there.
        model: optimized or not.
        optimizer: whose state belongs to it.
        extra: more to keep: tensors, numbers and texts in lists, and in dicts with such keys.

    Raises:
        StateError: something has no place in a file, or a step is not finished.
        RankError: another rank does not answer.
    """
    target = Path(path)
    controller, ranks = controller_of(model), shards.ranks()
    state = model.state_dict()
    tensors = {_MODEL + name: t for name, t in state.items() if isinstance(t, Tensor)}
    others = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
    if controller is not None and ranks == 1:
        passes = sealed(controller.session.state_dict())
    else:
        passes = {} if controller is None else controller.session.own_state()
    tensors |= {_PASSES + name: t for name, t in passes.items()}
    rest = {"optimizer": None if optimizer is None else optimizer.state_dict(), "extra": extra}
    if others:  # of modules with get_extra_state
        rest["model"] = others
    document = json.dumps({"rest": _without_tensors(rest, tensors, _REST)})
    plain = {name: _plain(name, tensor) for name, tensor in tensors.items()}
    if ranks > 1:
        shards.write(target, plain, document)
        return
    layout = json.dumps({n: list(t.stride()) for n, t in plain.items() if not t.is_contiguous()})
    plain = {name: tensor.contiguous() for name, tensor in plain.items()}
    document = json.dumps({"rest": json.loads(document)["rest"], "strides": json.loads(layout)})
    metadata = {
        _VERSION: str(FORMAT_VERSION),
        _DOCUMENT: document,
        _CHECKSUM: _checksum(plain, document),
    }
    _write(target, plain, metadata)


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    strict: bool = True,
) -> Any:
    """Continue from what `save` has written: all of it, or nothing where it raises.

    Args:
        path: of the file or folder.
        model: of the same architecture, optimized as it was; of a job any number of ranks.
        optimizer: if one was saved.
        strict: as for `graphopt.load_state_dict`.

    Returns:
        What was given as `extra`.

    Raises:
        StateError: the file is damaged or no such file, or belongs to another model; nothing was
            changed.
    """
    source = Path(path)
    tensors, document = shards.read(source) if source.is_dir() else _read(source)
    try:
        rest = _with_tensors(json.loads(document)["rest"], tensors)
        optimizer_state, extra = rest["optimizer"], rest["extra"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise _damaged(source, "its document is none of graphopt.save") from error
    weights = {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)}
    weights |= rest.get("model", {})
    passes = {n.removeprefix(_PASSES): t for n, t in tensors.items() if n.startswith(_PASSES)}
    if source.is_dir():
        passes = sealed(passes)
    _check_weights(model, weights)
    checked = None
    if passes or controller_of(model) is not None:
        session = session_of(model)
        found, whole = opened(passes)
        checked = session.check(found, strict=strict)
        if strict and not whole:
            raise _damaged(source, "some of the state of passes is missing")
    if (optimizer is None) != (optimizer_state is None):
        has, given = ("a", "none") if optimizer is None else ("no", "one")
        raise StateError(
            f"{source} has {has} state of an optimizer, and {given} is given",
            hint="give the optimizer that was saved, or save without one",
        )
    if optimizer is not None:
        _check_options(source, optimizer, optimizer_state)
        try:
            optimizer.load_state_dict(optimizer_state)
        except (ValueError, KeyError, TypeError) as error:
            raise StateError(f"{source} is of another optimizer: {error}") from error
    model.load_state_dict(weights)
    if checked is not None:
        session_of(model).load(checked)
    return extra


def _check_weights(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    for name in sorted(own.keys() | saved.keys()):
        if name not in saved or name not in own:
            lacks = "lacks" if name in own else "has"
            raise StateError(
                f"the file {lacks} {name!r}, which the model {'has' if name in own else 'lacks'}",
                hint="make the model as it was made when it was saved",
            )
        one, other = own[name], saved[name]
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            raise StateError(
                f"{name!r} is {str(other.dtype)[6:]}{list(other.shape)} in the file and "
                f"{str(one.dtype)[6:]}{list(one.shape)} in the model",
                hint="make the model as it was made when it was saved",
            )


def _check_options(source: Path, optimizer: Optimizer, saved: Any) -> None:
    """Torch takes the state of any optimizer, whose options then take the place of one's own."""
    groups = saved.get("param_groups", ()) if isinstance(saved, dict) else ()
    lacking = [name for name in optimizer.defaults for group in groups if name not in group]
    if lacking:
        raise StateError(
            f"{source} is of another optimizer: it has no {lacking[0]!r}, which "
            f"{type(optimizer).__name__} needs",
            hint="make the optimizer as it was made when it was saved",
        )


# -- everything that is no tensor ------------------------------------------------------------------


def _without_tensors(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """A value as JSON, its tensors in a table of their own."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, dict) and all(type(key) in (int, str) for key in value):
        return {
            "dict": [[k, _without_tensors(v, tensors, f"{name}.{k}")] for k, v in value.items()]
        }
    raise StateError(
        f"{name.removeprefix(_REST).lstrip('.') or 'it'} is a {type(value).__name__}, which a file "
        "of tensors, numbers and texts does not hold",
        hint="save what its state_dict() gives",
    )


def _with_tensors(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    match data:
        case {"tensor": str(name)}:
            return tensors[name]
        case {"list": list(items)}:
            return [_with_tensors(item, tensors) for item in items]
        case {"tuple": list(items)}:
            return tuple(_with_tensors(item, tensors) for item in items)
        case {"dict": list(pairs)}:
            return {key: _with_tensors(item, tensors) for key, item in pairs}
    return data


# -- one file --------------------------------------------------------------------------------------


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.layout is not torch.strided or type(tensor.detach()) not in (Tensor, nn.Parameter):
        raise StateError(f"{name!r} is no ordinary tensor, and has no place in a file")
    # In memory of its own: tied weights and views of one buffer stand in the file as often.
    return tensor.detach().cpu().clone()


def _checksum(tensors: Mapping[str, Tensor], document: str) -> str:
    found = hashlib.blake2b(document.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _write(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if target.is_dir():
        raise StateError(f"{target} is a folder", hint="name a file in it")
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        save_file(tensors, partial, metadata)
        shards.flush(partial)
        partial.replace(target)
        shards.flush(target.parent)
    except (SafetensorError, OSError) as error:
        why = getattr(error, "strerror", None) or str(error).split("\n")[0]
        raise StateError(
            f"{target} cannot be written: {why}",
            hint="look whether its folder is there, may be written to and has room",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _read(source: Path) -> tuple[dict[str, Tensor], str]:
    from safetensors import SafetensorError, safe_open

    if not source.exists():
        raise StateError(f"there is no file {str(source)!r}", hint="look at the path")
    try:
        with safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        version, document = metadata[_VERSION], metadata[_DOCUMENT]
        if version != str(FORMAT_VERSION):
            raise StateError(
                f"{source} has format {version:.20}, and this graphopt reads {FORMAT_VERSION}",
                hint="load it with the graphopt that saved it",
            )
        if _checksum(tensors, document) != metadata[_CHECKSUM]:
            raise _damaged(source, "its checksum is another one")
        for name, strides in json.loads(document)["strides"].items():
            like = torch.empty_strided(tensors[name].shape, strides, dtype=tensors[name].dtype)
            tensors[name] = like.copy_(tensors[name])
    except (SafetensorError, OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        if isinstance(error, StateError):
            raise
        raise _damaged(source, str(error).split("\n")[0]) from error
    return tensors, document


def _damaged(source: Path, why: str) -> StateError:
    return StateError(
        f"{source} is damaged, or was not written by graphopt.save: {why}",
        hint="load an earlier one",
    )
