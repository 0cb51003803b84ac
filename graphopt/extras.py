"""Packages that graphopt does without until something needs them: they come by extras."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from graphopt.errors import ExtraError


@contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Import packages of the extra `name` within.

    Args:
        name: as ``pip install 'graphopt[name]'`` has it.
        what: needs them, for the error.

    Raises:
        ExtraError: one is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing == "graphopt":
            raise
        raise ExtraError(
            f"{what} needs {missing}, which is not installed",
            hint=f"pip install 'graphopt[{name}]'",
            package=missing,
        ) from None
