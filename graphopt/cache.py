"""Results of earlier runs, as small JSON files in the user's cache folder.

Nothing depends on them: an entry that is missing, corrupt or edited by hand counts as absent, and
one that cannot be written is only logged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import torch

log = logging.getLogger("graphopt")

# No step and no message that is measured while a program waits takes longer.
LONGEST = 3600.0


@dataclass(frozen=True)
class JsonCache:
    """The entries of one kind, one file each.

    Attributes:
        kind: folder below ``graphopt``, in ``$XDG_CACHE_HOME`` or else in ``~/.cache``.
    """

    kind: str

    def read(self, key: str) -> object:
        """The entry, with all numbers as floats; ``None`` where there is none that is JSON."""
        try:
            text = self._file(key).read_text(encoding="utf-8")
            value: object = json.loads(text, parse_int=float)
        except (OSError, ValueError, RuntimeError) as error:
            log.info("nothing usable in the cache of %s: %s", self.kind, error)
            return None
        return value

    def write(self, key: str, value: object) -> None:
        """Replace the entry; other processes see the old one or the new one, never a part."""
        try:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.tmp")
            partial.write_text(json.dumps(value), encoding="utf-8")
            partial.replace(file)
        except (OSError, RuntimeError) as error:
            log.info("cannot write to the cache of %s: %s", self.kind, error)

    def _file(self, key: str) -> Path:
        return folder(self.kind) / f"{key}.json"


def folder(kind: str) -> Path:
    """Where entries of a kind are; a user without a home has a ``RuntimeError``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "graphopt" / kind


def is_duration(value: object) -> TypeGuard[float]:
    """Whether what was read is a number of seconds that a measurement can have."""
    return isinstance(value, float) and 0 < value < LONGEST


def fingerprint(*texts: str) -> str:
    """A key for times measured here: same texts, same torch, same machine, same key."""
    processor = torch.backends.cpu.get_cpu_capability()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor
    machine = f"{torch.__version__} {device} {torch.get_num_threads()} {os.cpu_count()}"
    return hashlib.sha256("\n".join([machine, *texts]).encode()).hexdigest()[:24]
