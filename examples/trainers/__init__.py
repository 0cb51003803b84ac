"""Trainers of other packages, without graphopt and with it."""

from importlib.util import find_spec

for _package in (
    "accelerate",
    "diffusers",
    "ignite",
    "lightning",
    "peft",
    "torch_geometric",
    "transformers",
):
    if find_spec(_package) is None:
        raise ImportError(f"{_package} is not installed; pip install 'graphopt[harness]'")
