"""Results of earlier runs, as small JSON files in the user's cache folder.

Nothing depends on them: an entry that is missing counts as absent, one that is corrupt or edited
by hand too, with one warning per kind and process, and one that cannot be written is only logged.
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

from graphopt.notices import warn

log = logging.getLogger("graphopt")

FORMAT_VERSION = 1
LARGEST = 64 << 20  # bytes of an entry
_warned: set[str] = set()  # kinds of which an entry was ignored in this process

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
            file = self._file(key)
            if file.stat().st_size > LARGEST:
                raise ValueError(f"it has more than {LARGEST} bytes")
            text = file.read_text(encoding="utf-8")
            found: object = json.loads(text, parse_int=float)
        except (OSError, RuntimeError) as error:
            # Without a file there is nothing wrong; a RecursionError is one of the latter.
            if isinstance(error, RecursionError):
                self.distrust(key, "it is no JSON")
            log.info("nothing in the cache of %s: %s", self.kind, error)
            return None
        except ValueError:
            self.distrust(key, "it is no JSON")
            return None
        match found:
            case {"format": float(version), "entry": value, **rest} if (
                version == FORMAT_VERSION and not rest
            ):
                return value
        self.distrust(key, f"it is no entry of format {FORMAT_VERSION}")
        return None

    def distrust(self, key: str, why: str) -> None:
        """Say once that an entry is ignored, for whoever finds that it is none."""
        if self.kind not in _warned:
            _warned.add(self.kind)
            try:
                file = str(self._file(key))
            except RuntimeError:
                file = key
            warn(
                f"an entry in the cache of {self.kind} is ignored: {why} ({file}); delete it if "
                "this comes again",
                RuntimeWarning,
            )

    def write(self, key: str, value: object) -> None:
        """Replace the entry; other processes see the old one or the new one, never a part."""
        try:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}.tmp")
            entry = {"format": FORMAT_VERSION, "entry": value}
            partial.write_text(json.dumps(entry), encoding="utf-8")
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
