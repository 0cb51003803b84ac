"""The folder with kept captures, and what is said where it does not work."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.cache import folder
from graphopt.capture.kept.fingerprints import digest
from graphopt.notices import warn

log = logging.getLogger("graphopt")

# Entries that are kept; those that were written longest ago go first.
MOST = 256
_warned: set[str] = set()


@dataclass(frozen=True)
class Found:
    """What was read.

    Attributes:
        entry: as it was written.
        digest: of the key and of the text of all of it.
    """

    entry: Any
    digest: str


@dataclass(frozen=True)
class Store:
    """Entries by key, one file each; a file is never read half written."""

    kind: str = "captures"

    def read(self, key: str) -> Found | None:
        """The entry; ``None`` where there is none. One that was damaged is one warning."""
        try:
            text = self._file(key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            self.warn(f"cannot read kept captures: {why} ({_root()})")
            return None
        try:
            first, _, body = text.partition("\n")
            if json.loads(first) != {"key": key, "digest": (found := digest([key, body]))}:
                raise ValueError("it is not what was written")
            return Found(json.loads(body), found)
        except (ValueError, RecursionError) as error:
            self.damaged(key, str(error))
            return None

    def write(self, key: str, entry: Any) -> str:
        """Replace an entry, and return its digest; where it cannot be replaced, one warning."""
        body = json.dumps(entry)
        told = digest([key, body])
        try:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            first = json.dumps({"key": key, "digest": told})
            partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
            try:
                partial.write_text(f"{first}\n{body}", encoding="utf-8")
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
            self._sweep(file.parent)
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or error  # without the name of the file
            self.warn(f"captures cannot be kept for later processes: {why} ({_root()})")
        return told

    def free(self, keys: Sequence[str]) -> str:
        """The first of these keys that has no entry, else the one that was written longest ago."""
        try:
            written = {key: self._file(key).stat().st_mtime for key in keys}
        except (OSError, RuntimeError):
            return next((key for key in keys if not self._there(key)), keys[0])
        return min(keys, key=written.__getitem__)

    def _there(self, key: str) -> bool:
        with contextlib.suppress(OSError, RuntimeError):
            return self._file(key).exists()
        return False

    def damaged(self, key: str, reason: str) -> None:
        """Say that an entry cannot be used, and take it away."""
        with contextlib.suppress(OSError, RuntimeError):
            file = self._file(key)
            what = f"a kept {self.kind.removesuffix('s')}"
            self.warn(f"{what} is damaged and is made anew ({reason}): {file}")
            file.unlink(missing_ok=True)

    def warn(self, message: str) -> None:
        """Once per process."""
        log.info(message)
        if message not in _warned:
            _warned.add(message)
            warn(message, RuntimeWarning)

    def _sweep(self, at: Path) -> None:
        """Keep the newest."""
        files = list(at.glob("*.json"))
        if len(files) > MOST:
            for file in sorted(files, key=lambda f: f.stat().st_mtime)[:-MOST]:
                file.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return folder(self.kind) / f"{key}.json"


def _root() -> str:
    try:
        return str(folder(""))
    except RuntimeError:
        return "there is no home folder"
