"""The random streams of a process: torch's, Python's and NumPy's."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

# Any seed will do, as long as it is not what forward itself sets.
SEED = 0x6F7074


def states(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """Where every stream of the process is now.

    Args:
        devices: CUDA devices whose streams count.
    """
    found: dict[str, Any] = {
        "torch": (torch.initial_seed(), torch.get_rng_state()),
        "python": random.getstate(),
    }
    found |= {f"torch on {d}": torch.cuda.get_rng_state(d) for d in devices}
    numpy = _numpy()
    if numpy is not None:
        found["numpy"] = numpy.random.get_state()
    return found


def restore(before: Mapping[str, Any]) -> None:
    """Set every stream to where it was."""
    torch.set_rng_state(before["torch"][1])
    random.setstate(before["python"])
    for name, state in before.items():
        if name.startswith("torch on "):
            torch.cuda.set_rng_state(state, name.removeprefix("torch on "))
    if "numpy" in before:
        _numpy().random.set_state(before["numpy"])


@contextmanager
def isolated(devices: Iterable[torch.device] = ()) -> Iterator[None]:
    """Within, all streams begin at one place; outside, nobody notices."""
    devices = list(devices)
    before = states(devices)
    try:
        begin(devices)
        yield
    finally:
        restore(before)


def begin(devices: Iterable[torch.device] = ()) -> None:
    """Set all streams to one place."""
    torch.default_generator.manual_seed(SEED)
    random.seed(SEED)
    for device in devices:
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(SEED)
    numpy = _numpy()
    if numpy is not None:
        numpy.random.seed(SEED)


def marks() -> dict[str, object]:
    """Where the streams are, in a form that can be compared and takes no memory.

    Those of GPUs are left out: how far a kernel moves one depends on how it was launched.
    """
    now = states()
    found: dict[str, object] = {
        "a seed": now["torch"][0],
        "torch's random stream": hash(now["torch"][1].numpy().tobytes()),
        "Python's random": hash(now["python"]),
    }
    if "numpy" in now:
        kind, keys, *rest = now["numpy"]
        found["numpy.random"] = hash((kind, keys.tobytes(), *rest))
    return found


def _numpy() -> Any:
    """NumPy, if anything in this process has imported it."""
    return sys.modules.get("numpy")
