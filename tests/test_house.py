"""The tree, the package list and who may import whom."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from graphopt import registry

ROOT = Path(__file__).parents[1]
SEAMS = {f"graphopt.{name}": ROOT / name for name in ("examples", "passes", "runtime")}


def _packages_in_tree() -> set[str]:
    found = set()
    for name, folder in {"graphopt": ROOT / "graphopt", **SEAMS}.items():
        for init in folder.rglob("__init__.py"):
            inside = init.parent.relative_to(folder).parts
            if inside and f"{name}.{inside[0]}" in SEAMS:
                continue
            found.add(".".join((name, *inside)))
    return found


def test_package_list_matches_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(project["tool"]["setuptools"]["packages"]) == _packages_in_tree()


def test_seams_are_links_into_the_tree() -> None:
    for name in ("examples", "passes", "runtime"):
        link = ROOT / "graphopt" / name
        assert link.is_symlink()
        assert link.resolve() == (ROOT / name).resolve()


def build_wheel(folder: Path) -> Path:
    """The wheel of this tree, made from a copy of it."""
    source = folder / "source"
    left_out = shutil.ignore_patterns(".*", "build", "results", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_every_module_under_graphopt_only(tmp_path: Path) -> None:
    names = {n for n in zipfile.ZipFile(build_wheel(tmp_path)).namelist() if n.endswith(".py")}
    expected = {
        "/".join((*package.split("."), file.name))
        for package in _packages_in_tree()
        for file in (ROOT / package.replace(".", "/")).glob("*.py")
    }
    assert names == expected


@pytest.mark.parametrize("name", ["passes", "runtime"])
def test_a_second_copy_is_refused(name: str) -> None:
    code = f"import {name}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"graphopt.{name}" in done.stderr


def _module_level_imports(file: Path) -> set[str]:
    """Names imported when the module loads; imports under TYPE_CHECKING or in functions do not."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _all_imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def _files(folder: str) -> list[Path]:
    return [
        f
        for f in sorted((ROOT / folder).rglob("*.py"))
        if not any(p.is_symlink() for p in f.parents)
    ]


def _within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def test_passes_never_import_the_runtime() -> None:
    for file in _files("passes"):
        assert not [n for n in _all_imports(file) if _within(n, "graphopt.runtime")], file


def test_runtime_knows_the_ground_floor_only() -> None:
    allowed = (
        *("graphopt.plan", "graphopt.registry", "graphopt.network", "graphopt.cache"),
        *("graphopt.ops", "graphopt.grouping", "graphopt.errors", "graphopt.runtime"),
        "graphopt.notices",
        # How a step is cut, in which order stages run, whose memory a value lies in, fake values
        # with symbols, and minimum cuts: plain functions of graphs and numbers.
        *("graphopt.partitioning.split", "graphopt.partitioning.place", "graphopt.schedules"),
        *("graphopt.analysis.aliasing", "graphopt.analysis.cut", "graphopt.analysis.fakes"),
        "graphopt.analysis.remade",  # and which of them a backward makes anew
        # Which operators data may call, by which names, with which arguments.
        *("graphopt.text.names", "graphopt.text.operators", "graphopt.text.elements"),
        "graphopt.text.syntax",
    )
    for file in _files("runtime"):
        own = {n for n in _all_imports(file) if n.startswith("graphopt.")}
        assert not [n for n in own if not _within(n, *allowed)], file


def test_the_ground_floor_knows_errors_only() -> None:
    ground = ("graphopt.plan", "graphopt.registry", "graphopt.errors")
    for file in [*_files("graphopt/plan"), ROOT / "graphopt" / "registry.py"]:
        own = {n for n in _all_imports(file) if n.startswith("graphopt.")}
        assert not [n for n in own if not _within(n, *ground)], file


def _methods() -> list[str]:
    """The methods that are on all four floors."""
    return [name for name, _ in registry.RUNTIME_PARTS.built_in]


@pytest.mark.parametrize("method", _methods())
def test_a_method_lives_in_its_own_rooms(method: str) -> None:
    """Nothing else names it, except the registry's tables."""
    rooms = (
        *(f"passes/{method}/", f"graphopt/plan/{method}.py", f"runtime/{method}/"),
        *(f"tests/{method}/", "graphopt/registry.py"),
    )
    for folder in ("graphopt", "passes", "runtime"):
        for file in _files(folder):
            place = str(file.relative_to(ROOT))
            if not place.startswith(rooms):
                assert not re.search(rf"[\"'.,{{/]{method}\b(?!\()", file.read_text()), place
    for room in (f"passes/{method}", f"runtime/{method}", f"tests/{method}"):
        assert (ROOT / room / "__init__.py").is_file()


@pytest.mark.parametrize("method", _methods())
def test_tests_of_a_method_live_with_it(method: str) -> None:
    """Other tests run methods from outside, by a spec, and never import one."""
    for file in _files("tests"):
        if any(file.is_relative_to(ROOT / "tests" / room) for room in (method, "gpu")):
            continue
        own = (f"graphopt.passes.{method}", f"graphopt.runtime.{method}", f"tests.{method}")
        assert not [n for n in _all_imports(file) if _within(n, *own)], file


def test_plan_and_runtime_parts_belong_to_passes() -> None:
    for table in (registry.PLAN_PARTS, registry.RUNTIME_PARTS):
        assert set(registry.names(table)) <= set(registry.names())


def test_graphopt_loads_neither_passes_nor_runtime() -> None:
    for file in _files("graphopt"):
        bad = [
            n
            for n in _module_level_imports(file)
            if _within(n, "graphopt.passes", "graphopt.runtime")
        ]
        assert not bad, f"{file}: {bad}"


def test_nobody_knows_render_and_cli() -> None:
    for file in _files("graphopt"):
        if {"cli", "render"} & set(file.relative_to(ROOT).parts) or file.name == "__main__.py":
            continue
        bad = [n for n in _all_imports(file) if _within(n, "graphopt.cli", "graphopt.render")]
        assert not bad, f"{file}: {bad}"


def test_one_folder_touches_the_capture_apis() -> None:
    private = (
        "torch._dynamo.convert_frame",
        "torch._dynamo.functional_export",
        "torch._functorch.aot_autograd",
        "torch._functorch._aot_autograd",
    )
    users = {
        file.parent.name
        for folder in ("graphopt", "passes", "runtime")
        for file in _files(folder)
        if any(_within(n, *private) for n in _all_imports(file))
    }
    assert users == {"capture"}


def test_no_file_is_over_500_lines() -> None:
    for folder in ("graphopt", "passes", "runtime", "tests", "benchmarks", "examples"):
        for file in _files(folder):
            assert len(file.read_text().splitlines()) <= 500, file


def test_importing_graphopt_does_not_import_torch() -> None:
    code = "import sys, graphopt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
