"""Which passes exist, where they come from, and what happens with bad plugins."""

from __future__ import annotations

import subprocess
import sys

import pytest

from graphopt import registry
from graphopt.errors import PluginError, SpecError
from graphopt.pipeline.spec import parse_spec
from tests.support.demo_passes import Tuned
from tests.support.plugins import write_demo_passes, write_distribution


def test_built_in_passes_are_known_without_importing_any():
    program = (
        "import sys; from graphopt import registry; names = registry.names();"
        "assert {'cleanup', 'fold_inference'} <= set(names), names;"
        "assert registry.origins()['cleanup'] == 'built-in';"
        "loaded = [m for m in sys.modules if m.startswith('graphopt.passes.')];"
        "assert not loaded, loaded; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", registry.names())
def test_each_built_in_pass_loads(name):
    assert registry.get(name).name == name


def test_an_unknown_pass_names_near_ones():
    with pytest.raises(SpecError, match="unknown pass 'claenup'") as caught:
        registry.get("claenup")
    assert caught.value.hint == "did you mean 'cleanup'? `graphopt passes` lists all passes"


def test_plugins_are_found_with_their_origin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_demo_passes(tmp_path))
    assert "tuned" in registry.names()
    assert registry.origins()["tuned"] == "demo-passes 1.2"
    assert registry.get("tuned") is Tuned


def test_plugins_disappear_with_their_path(tmp_path):
    sys.path.insert(0, str(write_demo_passes(tmp_path)))
    try:
        assert "tuned" in registry.names()
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(SpecError, match="unknown pass 'tuned'"):
        registry.get("tuned")


def test_two_plugins_with_one_name(tmp_path, monkeypatch):
    for name in ("first", "second"):
        folder = write_distribution(
            tmp_path / name, name, "1.0", {"same": "tests.support.demo_passes:Idle"}
        )
        monkeypatch.syspath_prepend(folder)
    for ask in (registry.names, registry.origins, lambda: registry.get("cleanup")):
        with pytest.raises(PluginError, match="two passes have the name 'same'") as caught:
            ask()
        assert "first 1.0" in caught.value.message
        assert "second 1.0" in caught.value.message


def test_a_plugin_cannot_replace_a_built_in_pass(tmp_path, monkeypatch):
    value = {"cleanup": "tests.support.demo_passes:Idle"}
    monkeypatch.syspath_prepend(write_distribution(tmp_path, "thief", "2.0", value))
    with pytest.raises(PluginError, match=r"'cleanup': one is built-in, the other is from thief"):
        registry.names()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module_at_all:X", "pass 'bad' of broken 0.3 cannot be imported: ModuleNotFound"),
        ("tests.support.demo_passes:Missing", "cannot be imported: AttributeError"),
        ("exploding_plugin:X", r"cannot be imported: ZeroDivisionError"),
        ("tests.support.demo_passes:ALL", "of broken 0.3 is not a subclass of Pass"),
        (
            "tests.support.demo_passes:Idle",
            "offers a pass as 'bad' whose class says its name is 'id",
        ),
    ],
)
def test_a_bad_plugin_fails_only_when_asked_for(tmp_path, monkeypatch, value, reason):
    folder = write_distribution(tmp_path, "broken", "0.3", {"bad": value})
    (folder / "exploding_plugin.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(write_demo_passes(tmp_path / "demo"))
    monkeypatch.syspath_prepend(folder)
    assert registry.origins()["bad"] == "broken 0.3"
    assert parse_spec("tuned") == (Tuned(),)
    with pytest.raises(PluginError, match=reason):
        registry.get("bad")
    with pytest.raises(PluginError, match=reason):
        parse_spec("tuned,bad")
