"""Serving: concurrent requests in batches, by the eager rule of Deep Speech 2."""

from graphopt.runtime.serving.asgi import Application
from graphopt.runtime.serving.dispatcher import Dispatcher
from graphopt.runtime.serving.stats import Stats

__all__ = ["Application", "Dispatcher", "Stats"]
