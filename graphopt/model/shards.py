"""Folders that the ranks of a job write together, each its own share."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import StateError

_DOCUMENT = "graphopt.json"
FORMAT_VERSION = 1


def ranks() -> int:
    """How many ranks the job has."""
    there = dist.is_available() and dist.is_initialized()
    return dist.get_world_size() if there else 1


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(target: Path, tensors: Mapping[str, Tensor], document: str) -> None:
    """Write a folder; a collective of all ranks.

    Tensors of one name are taken to be equal on all ranks that have it, and are written once.
    """
    from torch.distributed.checkpoint.state_dict_saver import save

    partial = target.with_name(f"{target.name}.partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    dist.barrier()
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, {name: _checksum(t) for name, t in tensors.items()})
    # The first rank that has it writes it.
    earlier = shares[: dist.get_rank()]
    mine = {n: t.contiguous() for n, t in tensors.items() if not any(n in s for s in earlier)}
    save(mine, storage_writer=_writer(partial))
    if dist.get_rank() == 0:
        checksums = {name: value for share in reversed(shares) for name, value in share.items()}
        strides = {n: list(t.stride()) for n, t in tensors.items() if not t.is_contiguous()}
        whole = {"format": FORMAT_VERSION, "document": document, "strides": strides}
        text = json.dumps({**whole, "checksums": checksums})
        (partial / _DOCUMENT).write_text(json.dumps([text, zlib.crc32(text.encode())]))
        for file in partial.iterdir():
            flush(file)
        _put_in_place(partial, target)
    dist.barrier()
    if not target.is_dir():
        raise StateError(f"{target} is not there on this rank", hint="save to a shared folder")


def _put_in_place(partial: Path, target: Path) -> None:
    former = target.with_name(f"{target.name}.former")
    shutil.rmtree(former, ignore_errors=True)
    if target.exists():
        target.rename(former)
    partial.rename(target)
    flush(target.parent)
    shutil.rmtree(former, ignore_errors=True)


def read(source: Path) -> tuple[dict[str, Tensor], str]:
    """All tensors of a folder, and its document, on any number of ranks.

    Raises:
        StateError: it is none, or damaged.
    """
    from safetensors.torch import load_file

    try:
        text, crc = json.loads((source / _DOCUMENT).read_text())
        if zlib.crc32(text.encode()) != crc:
            raise ValueError("its document is another one")
        found = json.loads(text)
        if found["format"] != FORMAT_VERSION:
            raise ValueError(f"it has format {found['format']}")
        tensors: dict[str, Tensor] = {}
        for file in sorted(source.glob("*.safetensors")):
            tensors.update(load_file(file))
        if {name: _checksum(tensor) for name, tensor in tensors.items()} != found["checksums"]:
            raise ValueError("tensors are missing, or others than were written")
        for name, strides in found["strides"].items():
            like = torch.empty_strided(tensors[name].shape, strides, dtype=tensors[name].dtype)
            tensors[name] = like.copy_(tensors[name])
    except Exception as error:  # of a library in Rust, too, that has an exception of its own
        raise StateError(
            f"{source} is damaged, or was not written by graphopt.save: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="load an earlier one",
        ) from error
    return tensors, str(found["document"])


def _writer(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    return HuggingFaceStorageWriter(str(folder), save_distributed=True)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
