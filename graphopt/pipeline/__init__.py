"""Pipelines: passes in a checked order, their spec language, and what each of them did."""

from graphopt.pipeline.pipeline import Observer, Pipeline, VerifyLevel

__all__ = ["Observer", "Pipeline", "VerifyLevel"]
