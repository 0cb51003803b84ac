"""The folder with kept captures, and what is said where it does not work."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
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
class Store:
    """Entries by key, one file each; a file is never read half written."""

    kind: str = "captures"

    def read(self, key: str) -> Any:
        """The entry; ``None`` where there is none. One that was damaged is one warning."""
        try:
            text = self._file(key).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, ValueError) as error:
            self.warn(f"cannot read kept captures: {error}")
            return None
        try:
            value = json.loads(text)
            body = value["entry"]
            if value["key"] != key or value["digest"] != digest([key, json.dumps(body)]):
                raise ValueError("it is not what was written")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self.damaged(key, str(error))
            return None
        return body

    def write(self, key: str, entry: Any) -> None:
        """Replace an entry; where that cannot be done, one warning."""
        try:
            file = self._file(key)
            file.parent.mkdir(parents=True, exist_ok=True)
            body = {"key": key, "digest": digest([key, json.dumps(entry)]), "entry": entry}
            partial = file.with_suffix(f".{os.getpid()}.{threading.get_ident()}.tmp")
            try:
                partial.write_text(json.dumps(body), encoding="utf-8")
                partial.replace(file)
            finally:
                partial.unlink(missing_ok=True)
            self._sweep(file.parent)
        except (OSError, RuntimeError) as error:
            self.warn(f"captures cannot be kept for later processes: {error}")

    def damaged(self, key: str, reason: str) -> None:
        """Say that an entry cannot be used, and take it away."""
        with contextlib.suppress(OSError, RuntimeError):
            file = self._file(key)
            self.warn(f"a kept capture is damaged and is made anew ({reason}): {file}")
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
