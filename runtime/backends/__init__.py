"""Engines that turn the halves of a step into callables."""
