"""Results of a step, taken up while they appear, so that those of two are never there at once.

`Marks` keeps a hash of each, which tells whether two steps are bit-equal. `Filed` keeps them in a
temporary file, from which a comparison by value reads them one by one.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, Protocol

import torch
from torch import Tensor, nn


class Results(Protocol):
    """Whatever takes results up: a dictionary keeps them as they are."""

    def __setitem__(self, name: str, value: Tensor | None, /) -> None:
        """Take one up."""


class Marks:
    """Form and a hash of the bits of each result; nothing of the results themselves.

    Equal marks mean equal bits; other marks say nothing yet, since 0 and -0 have two, and so has
    NaN.

    Attributes:
        found: by name; ``None`` once a result came that is no plain tensor on the CPU, whose bits
            would be slow to read.
    """

    def __init__(self) -> None:
        self.found: dict[Any, object] | None = {}

    def __setitem__(self, name: Any, value: object) -> None:
        """Take one up; what is no tensor is its own mark."""
        if self.found is None:
            return
        if isinstance(value, Tensor) and not _is_plain(value):
            self.found = None
        else:
            self.found[name] = _mark(value.detach()) if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class _Place:
    """Where bits lie in a file, and their form."""

    begin: int
    dtype: torch.dtype
    shape: torch.Size


class Filed(Mapping[str, Tensor | None]):
    """Results in a temporary file; each is read anew, contiguous, when it is asked for.

    Results that are no plain tensors on the CPU stay in memory, and so do all that the disk has no
    place for.
    """

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._kept: dict[str, _Place | Tensor | None] = {}

    def __setitem__(self, name: str, value: Tensor | None) -> None:
        """Take one up; what is no tensor stays as it is."""
        value = value.detach() if isinstance(value, Tensor) else value
        place = self._write(value) if isinstance(value, Tensor) and _is_plain(value) else None
        self._kept[name] = place or value

    def __getitem__(self, name: str) -> Tensor | None:
        """Read one."""
        kept = self._kept[name]
        if not isinstance(kept, _Place):
            return kept
        value = torch.empty(kept.shape, dtype=kept.dtype, device="cpu")  # whatever the default is
        assert self._file is not None
        self._file.seek(kept.begin)
        self._file.readinto(_bits(value))  # type: ignore[attr-defined]
        return value

    def __iter__(self) -> Iterator[str]:
        """Names, in the order in which results appeared."""
        return iter(self._kept)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._kept)

    def _write(self, value: Tensor) -> _Place | None:
        """Write its bits behind all others; ``None`` where that cannot be."""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the object
                weakref.finalize(self, self._file.close)
            begin = self._file.seek(0, 2)
            self._file.write(_bits(value))
            self._file.flush()
        except OSError:  # no disk, or a full one
            return None
        return _Place(begin, value.dtype, value.shape)


def _is_plain(value: Tensor) -> bool:
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    return plain and value.device.type == "cpu"


def _bits(value: Tensor) -> Any:
    flat = value.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy()


def _mark(value: Tensor) -> object:
    return value.dtype, value.shape, hashlib.sha256(_bits(value)).digest()
