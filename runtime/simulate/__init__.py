"""An event-driven model of one data-parallel training step. All times are seconds."""

from graphopt.runtime.simulate.scale import Point, scaling
from graphopt.runtime.simulate.step import simulate
from graphopt.runtime.simulate.timeline import Timeline
from graphopt.runtime.simulate.trace import Span, Trace

__all__ = ["Point", "Span", "Timeline", "Trace", "scaling", "simulate"]
