"""Link cache: costs measured in earlier runs, one entry per job shape.

A job's shape is everything that the cost of a message may depend on: the ranks and their hosts, in
order, the kind of device, the backend, and the variables with which users choose interfaces.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Sequence
from typing import Any

import torch

from graphopt.cache import JsonCache, is_duration
from graphopt.network.curve import Curve

CACHE = JsonCache("links")


def describe(group: Any, device: torch.device) -> str:
    """This rank's part of the job's shape."""
    chosen = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(("GLOO_", "NCCL_")))
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    backend = group._get_backend(device).name()
    return "\n".join([socket.gethostname(), kind, backend, torch.__version__, *chosen])


def find(ranks: Sequence[str]) -> Curve | None:
    """The curve of an earlier run of this shape; ``None`` unless all of the entry makes sense.

    Args:
        ranks: what `describe` says on every rank, in order.
    """
    key = _key(ranks)
    match CACHE.read(key):
        case None:
            return None
        case {"points": list(points), "source": str(source), "joining": float(joining)} if (
            all(map(_is_point, points)) and 0 <= joining < 1
        ):
            pairs = tuple((size, seconds) for size, seconds in points)
            try:
                return Curve(pairs, f"{source} (kept from an earlier run)", joining)
            except ValueError:  # no points, or falling ones
                pass
    CACHE.distrust(key, "it is no cost of messages")
    return None


def keep(ranks: Sequence[str], curve: Curve) -> None:
    """Cache a measured curve for the next job of this shape."""
    CACHE.write(_key(ranks), vars(curve))


def _is_point(point: object) -> bool:
    match point:
        case [float(size), seconds]:
            return 1 <= size < 2**63 and is_duration(seconds)
    return False


def _key(ranks: Sequence[str]) -> str:
    return hashlib.sha256("\n\n".join(ranks).encode()).hexdigest()[:24]
