"""Distributions that exist only as metadata in a folder on `sys.path`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tests.support import demo_passes


def write_distribution(folder: Path, name: str, version: str, passes: Mapping[str, str]) -> Path:
    """Write the metadata of a distribution that offers `passes` as entry points."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {value}" for key, value in passes.items()]
    (info / "entry_points.txt").write_text("\n".join(["[graphopt.passes]", *lines, ""]))
    return folder


def write_demo_passes(folder: Path) -> Path:
    """A distribution with all passes of `tests.support.demo_passes`."""
    passes = {kind.name: f"tests.support.demo_passes:{kind.__name__}" for kind in demo_passes.ALL}
    return write_distribution(folder, "demo-passes", "1.2", passes)
