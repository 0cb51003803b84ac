"""The torch releases that graphopt's use of torch's capture APIs was checked on."""

from __future__ import annotations

TORCH = ("2.11", "2.14")
"""The first, and the first that is too new."""

WANTED = f">={TORCH[0]},<{TORCH[1]}"


def supports(version: str) -> bool:
    """Whether this is one of them: ``"2.13.0+cpu"``."""
    low, release, high = (_numbers(text) for text in (TORCH[0], version, TORCH[1]))
    return low <= release < high


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("+")[0].split(".")[:2])
