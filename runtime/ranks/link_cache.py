"""Measured link costs of earlier runs, one JSON file per job shape in the user's cache folder.

A job's shape is everything that its messages may depend on: the ranks and the hosts they are on, in
order, the kind of device, the backend, and the variables by which users choose interfaces.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from graphopt.network.curve import Curve

log = logging.getLogger("graphopt")


def describe(group: Any, device: torch.device) -> str:
    """This rank's part of the job's shape."""
    chosen = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(("GLOO_", "NCCL_")))
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    backend = group._get_backend(device).name()
    return "\n".join([socket.gethostname(), kind, backend, torch.__version__, *chosen])


def find(ranks: Sequence[str]) -> Curve | None:
    """The curve of an earlier run of this shape.

    Args:
        ranks: what `describe` says on every rank, in order.

    Returns:
        ``None`` where there is no file, or one that does not hold a curve.
    """
    try:
        data = json.loads(_file(ranks).read_text())
        points = tuple((float(size), float(seconds)) for size, seconds in data["points"])
        if not all(math.isfinite(size) and seconds > 0 for size, seconds in points):
            raise ValueError("times must be positive")
        source = f"{data['source']} (kept from an earlier run)"
        return Curve(points, source, float(data["joining"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.info("no link cost was kept: %s", error)
        return None


def keep(ranks: Sequence[str], curve: Curve) -> None:
    """Keep a measured curve; a folder that cannot be written costs the next run a measurement."""
    file = _file(ranks)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(vars(curve)))
        partial.replace(file)
    except OSError as error:
        log.info("the link cost could not be kept: %s", error)


def _file(ranks: Sequence[str]) -> Path:
    key = hashlib.sha256("\n\n".join(ranks).encode()).hexdigest()[:24]
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "graphopt" / "links" / f"{key}.json"
