"""What a calibration found, as data: ranges per tensor, sensitivities per operator, one JSON file.

Tensors and operators are named by the nodes of the cleaned graph (``cleanup`` alone), which keep
their names in every later pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch

from graphopt.errors import ArgumentError, PlanError
from graphopt.plan.part import from_data, to_data

SCHEMA = "graphopt.calibration/1"

FORMATS: Mapping[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The formats that sensitivities are recorded for."""

_AGAIN = "write it again with graphopt calibrate M -o FILE"


@dataclass(frozen=True)
class Range:
    """The magnitudes of one tensor, over all batches.

    Attributes:
        elements: how many were seen.
        zeros: how many of them were zero.
        nan: how many were NaN.
        infinite: how many were infinite; neither counts anywhere else.
        log2_amax: of the largest finite magnitude; ``None`` where all are zero.
        binades: by exponent ``e`` how many magnitudes lay in ``[2**e, 2**(e + 1))``.
        inexact: by format the share of the elements other than 0 whose bits do not fit its
            significand (8 bits of bf16, 11 of fp16), whatever their magnitude.
    """

    elements: int
    zeros: int
    nan: int
    infinite: int
    log2_amax: float | None
    binades: Mapping[str, int]
    inexact: Mapping[str, float]

    def share_below(self, exponent: int) -> float:
        """Share of the elements other than 0 that are smaller than ``2**exponent``."""
        counts = {int(e): n for e, n in self.binades.items()}
        total = sum(counts.values())
        return sum(n for e, n in counts.items() if e < exponent) / total if total else 0.0

    def mass_below(self, exponent: int) -> float:
        """Share of the sum of magnitudes that is made of elements smaller than ``2**exponent``.

        All elements of a binade count alike.
        """
        top = max(map(int, self.binades), default=0)
        mass = {int(e): n * 2.0 ** (int(e) - top) for e, n in self.binades.items()}
        total = sum(mass.values())
        return sum(m for e, m in mass.items() if e < exponent) / total if total else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """The expected change of the loss by what one forward operator rounds, by format.

    ``None`` stands for what could not be found: its value leaves the format, or is not finite.

    Attributes:
        operator: what the node calls.
        result: by rounding its results.
        reads: by rounding what it reads, each for this reader alone, by the name of the value.
    """

    operator: str
    result: Mapping[str, float | None]
    reads: Mapping[str, Mapping[str, float | None]]

    def total(self, format: str) -> float | None:
        """By running it alone in the format."""
        parts = [self.result.get(format), *(read.get(format) for read in self.reads.values())]
        return None if None in parts else sum(part for part in parts if part is not None)


@dataclass(frozen=True)
class Calibration:
    """One model on some batches.

    Attributes:
        model: its class.
        torch: version that ran it.
        parameters: their shapes, by which the model is told from others.
        batches: how many were run.
        samples: examples in all of them, the leading dimensions of their first tensors.
        loss: ``"given"``, ``"model"`` (its only output is one number), or ``"outputs"``: half the
            squared change of the outputs, summed over all elements and divided by the examples.
        value: mean loss of the batches; ``None`` for ``"outputs"`` or where none is finite.
        tensors: ranges by node; forward, backward and inputs.
        sensitivities: by node of the forward operators; empty where they could not be found.
        notes: what is to be known about the data.
    """

    model: str
    torch: str
    parameters: Mapping[str, tuple[int, ...]]
    batches: int
    samples: int
    loss: str
    value: float | None
    tensors: Mapping[str, Range]
    sensitivities: Mapping[str, Sensitivity]
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Same data, same digest."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """All of it, with sorted keys; the inverse of `from_json`."""
        return json.dumps({"schema": SCHEMA, **to_data(self)}, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, where: str = "") -> Calibration:
        """Read and check it.

        Args:
            text: what `to_json` wrote.
            where: the file, for errors.

        Raises:
            ArgumentError: it is not JSON, not a calibration, or holds what none can.
        """

        def refused(what: str) -> NoReturn:
            raise ArgumentError(f"this is no calibration: {what}", where=where, hint=_AGAIN)

        def not_a_number(name: str) -> NoReturn:
            raise ValueError(f"{name} among its numbers")

        try:
            data = json.loads(text, parse_constant=not_a_number)
        except ValueError as error:
            refused(str(error))
        if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
            refused(f"its schema is not {SCHEMA}")
        try:
            found = from_data(cls, data)
        except PlanError as error:
            refused(error.message)
        if wrong := _impossible(found):
            refused(wrong)
        return found

    def save(self, path: str | Path) -> None:
        """Write the file.

        Raises:
            ArgumentError: it cannot be written.
        """
        try:
            Path(path).write_text(self.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise ArgumentError(
                f"the calibration cannot be written: {error.strerror}",
                where=str(path),
                hint="name a file in a folder that exists",
            ) from error

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote.

        Raises:
            ArgumentError: it cannot be read, or is no calibration.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            said = getattr(error, "strerror", None) or "it is not text"
            raise ArgumentError(
                f"the calibration cannot be read: {said}", where=str(path), hint=_AGAIN
            ) from error
        return cls.from_json(text, str(path))


def _impossible(found: Calibration) -> str:
    """What no calibration can hold; empty where all is well."""
    if found.batches < 1 or found.samples < 0:
        return f"{found.batches} batches, {found.samples} samples"
    for name, seen in found.tensors.items():
        try:
            counted = sum(seen.binades.values()) if all(map(_is_exponent, seen.binades)) else -1
        except ValueError:
            counted = -1
        if counted != seen.elements - seen.zeros - seen.nan - seen.infinite or counted < 0:
            return f"the counts of {name} do not add up"
        if (seen.log2_amax is None) is (counted > 0):
            return f"{name} has a largest magnitude and no elements, or the other way round"
    for name, each in found.sensitivities.items():
        values = [*each.result.values(), *(v for r in each.reads.values() for v in r.values())]
        if any(value is not None and value < 0 for value in values):
            return f"the sensitivity of {name} is negative"
    return ""


def _is_exponent(text: str) -> bool:
    return -160 <= int(text) <= 130
