"""The error that a command line shows in two lines."""

from __future__ import annotations


class WorkloadError(Exception):
    """Bad input of a workload.

    Args:
        message: one sentence saying what is wrong.
        hint: one thing to try.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(f"{message}\n  try: {hint}")
