"""Figures for people: three digits and a unit."""

from __future__ import annotations


def count(value: float) -> str:
    """``5758176`` as ``"5.76 M"``; ``0`` as ``"-"``, which keeps columns readable."""
    return _scaled(value, ("", "k", "M", "G", "T", "P")) if value else "-"


def size(value: float) -> str:
    """``151104`` bytes as ``"151 kB"``, ``0`` as ``"-"``."""
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB")) if value else "-"


def duration(seconds: float) -> str:
    """``0.0123`` as ``"12.3 ms"``."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    digits = f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
    return f"{digits} {units[power]}".rstrip()


def plural(number: int, noun: str) -> str:
    """``2, "batch"`` as ``"2 batches"``."""
    ending = "es" if noun.endswith(("s", "x", "ch", "sh")) else "s"
    return f"{number} {noun}{'' if number == 1 else ending}"
