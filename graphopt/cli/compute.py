"""What each rank of a machine that is not here computes with: one cost model for all commands."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from torch import fx

    from graphopt.analysis.gradient_order import Device, GradientOrder
    from graphopt.graph import Graph

MEASURE = "measure"
DEVICES = ("h100", "v100", "cpu", MEASURE)
"""Names for ``--device``."""

HELP = (
    "What each rank computes with: the roofline of an h100, a v100 or one core of a cpu, or "
    "'measure' for the times of the operators on this machine."
)


@dataclass(frozen=True)
class Compute:
    """How long operators take.

    Attributes:
        name: one of `DEVICES`, or ``"--flops"``.
        device: for the roofline; ``None`` where times are measured.
    """

    name: str
    device: Device | None

    @classmethod
    def of(cls, device: str | None, flops: float | None, *, because: str) -> Compute:
        """What the options say.

        Args:
            device: the value of ``--device``.
            flops: the value of ``--flops``, which goes before the device's own.
            because: what it is asked for: ``"--mesh dp=64"``.

        Raises:
            ArgumentError: there is no such device, none is named, or it is no speed.
        """
        if flops is not None and not (math.isfinite(flops) and flops > 0):
            raise ArgumentError(
                f"--flops {flops:g} is no speed of a device", hint="--flops 1.5e13 is 15 TFLOP/s"
            )
        choices = ", ".join(f"--device {name}" for name in DEVICES)
        if device is None and flops is None:
            raise ArgumentError(
                f"{because} does not say what each rank computes with", hint=f"one of {choices}"
            )
        if device is not None and device not in DEVICES:
            raise ArgumentError(f"--device {device} is unknown", hint=f"one of {choices}")
        if device == MEASURE:
            if flops is not None:
                raise ArgumentError(
                    "--flops is about a roofline, and --device measure has none",
                    hint="leave --flops out, or name a device",
                )
            return cls(MEASURE, None)
        from graphopt.analysis.gradient_order import ASSUMED

        known = ASSUMED[device or "cuda"]
        if flops is None:
            return cls(device or "", known)
        return cls(device or "--flops", replace(known, flops=flops, half_flops=flops))

    def seconds(self, graph: Graph) -> Mapping[fx.Node, float]:
        """Of every operator of a graph, wherever it was captured."""
        from graphopt.analysis.gradient_order import roofline
        from graphopt.analysis.profile import profile_graph

        return profile_graph(graph) if self.device is None else roofline(graph, self.device)

    def order(self, graph: Graph) -> GradientOrder:
        """When the gradients of a joint graph are ready."""
        from graphopt.analysis.gradient_order import measured_order

        found = measured_order(graph, self.seconds(graph))
        return replace(found, times="measured" if self.device is None else "roofline")

    def words(self) -> str:
        """For a reader."""
        from graphopt.render.units import count, duration, size

        device = self.device
        if device is None:
            return "measured: each operator on this machine (--device measure)"
        named = "a device" if self.name == "--flops" else self.name
        return (
            f"roofline of {named}: {count(device.flops)}FLOP/s ("
            f"{count(device.half_flops)}FLOP/s in 16 bits), {size(device.bandwidth)}/s, "
            f"{duration(device.overhead)} to start an operator; assumed, not measured"
        )

    def to_json(self) -> dict[str, object]:
        """For answers of commands."""
        return {"device": self.name, **(asdict(self.device) if self.device else {})}
