"""What a simulated step did, span by span."""

from __future__ import annotations

import math
from dataclasses import dataclass

COMPUTE = "compute"
NEGOTIATION = "negotiation"


def channel_lane(index: int) -> str:
    """Name of the lane of channel `index`, counted from 0."""
    return f"channel {index}"


@dataclass(frozen=True)
class Span:
    """One activity on one lane.

    Attributes:
        lane: ``"compute"``, ``"negotiation"`` or ``"channel 0"``, ``"channel 1"``, …
        name: what it was.
        start: seconds since the step began.
        end: seconds since the step began.
    """

    lane: str
    name: str
    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Trace:
    """One simulated step.

    Attributes:
        spans: in the order in which they ended; a lane never does two things at once.
        compute_end: when the last gradient has been computed.
        reduced: when the last group has been reduced; 0.0 without groups.
    """

    spans: tuple[Span, ...]
    compute_end: float
    reduced: float

    @property
    def step(self) -> float:
        """Seconds until all is computed and all is reduced."""
        return max(self.compute_end, self.reduced)

    @property
    def exposed(self) -> float:
        """Seconds of the step after the computation has ended."""
        return self.step - self.compute_end

    @property
    def lanes(self) -> tuple[str, ...]:
        """All lanes with a span: compute first, then negotiation, then the channels."""
        names = {span.lane for span in self.spans}
        first = [lane for lane in (COMPUTE, NEGOTIATION) if lane in names]
        channels = sorted(names - set(first), key=lambda lane: int(lane.rpartition(" ")[2]))
        return (*first, *channels)

    def busy(self, lane: str) -> float:
        """Seconds during which `lane` was busy; ``"channel"`` sums over all channels."""
        return math.fsum(
            s.seconds
            for s in self.spans
            if s.lane == lane or (lane == "channel" and s.lane.startswith("channel "))
        )
