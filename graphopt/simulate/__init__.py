"""An event-driven model of one data-parallel training step. All times are seconds."""

from graphopt.simulate.scale import Point, scaling
from graphopt.simulate.step import simulate
from graphopt.simulate.timeline import Timeline
from graphopt.simulate.trace import Span, Trace

__all__ = ["Point", "Span", "Timeline", "Trace", "scaling", "simulate"]
