"""`graphopt plan`, `why` and `calibrate` where formats are chosen, end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.analysis import gradient_order
from graphopt.analysis.gradient_order import Device
from graphopt.cli.main import app

ROOT = Path(__file__).parents[2]
FILE = "tests/support/models_for_cli.py"
NET = f"{FILE}:net"
SPEC = "cleanup,precision{cost=roofline}"

MODELS = """
import torch
from torch import nn


def several():
    return nn.Linear(4, 4), [(torch.randn(2, 4),), {"input": torch.randn(3, 4)}]


def one():
    return nn.Linear(4, 4), (torch.randn(1, 4),)


def with_nan():
    return nn.Linear(4, 4), (torch.full((2, 4), float("nan")),)


def norm():
    return nn.LayerNorm(4), (torch.randn(2, 4),)


def none():
    return nn.Linear(4, 4), []
"""


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    # A device on which lower precision pays from the first element on.
    quick = Device(flops=1e9, half_flops=1e12, bandwidth=1e10, overhead=0.0)
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", quick)


@pytest.fixture
def models(tmp_path: Path) -> str:
    file = tmp_path / "models_to_lower.py"
    file.write_text(MODELS)
    return str(file)


@pytest.fixture
def calibration(tmp_path: Path) -> str:
    file = tmp_path / "net.json"
    run("calibrate", NET, "-o", str(file))
    return str(file)


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def answer(*arguments: str) -> dict:
    found = json.loads(run(*arguments, "--json").stdout, parse_constant=pytest.fail)
    assert found.pop("schema") == f"graphopt.{arguments[0]}/1"
    return found


# -- plan ------------------------------------------------------------------------------------------


def test_json_has_every_operator_and_the_totals() -> None:
    found = answer("plan", NET, "-p", SPEC)
    rows = {row["site"]: row for row in found["operators"]}
    assert {row["module"] for row in rows.values()} >= {"stem", "layers.0.conv", "head"}
    stem = rows["convolution"]
    assert stem["operator"] == "aten.convolution.default"
    assert (stem["phase"], stem["kind"], stem["format"]) == ("forward", "allow", "bf16")
    assert stem["low_us"] < stem["float32_us"]
    assert stem["bound"] == "compute"  # 27 multiplications per element, and one FLOP is ten bytes
    assert 0 < stem["error"] < 2**-7
    assert stem["change"] is None
    assert {row["phase"] for row in rows.values()} == {"forward", "backward"}
    totals = found["totals"]
    assert totals["lowered"] == sum(row["format"] == "bf16" for row in rows.values())
    assert totals["flops_lowered"] == pytest.approx(1)
    assert totals["chosen_us"] < totals["float32_us"]
    assert totals["casts"] > 0
    assert totals["cast_bytes"] > 0
    assert totals["times"] == "roofline"
    assert found["pass"] == "precision{cost=roofline}"
    assert found["front"] == found["accuracy"] == []


def test_what_is_memory_bound_is_said_to_be() -> None:
    found = answer("plan", NET, "-p", SPEC)
    bounds = {row["operator"]: row["bound"] for row in found["operators"]}
    assert bounds["aten.relu.default"] == "memory"


def test_the_text_has_layers_operators_and_totals() -> None:
    out = run("plan", NET, "-p", SPEC).stdout
    assert re.search(r"^layer +operator +float32 ms +bf16 ms +error +bound +format", out, re.M)
    assert re.search(r"^stem +convolution +[\d.e-]+ +[\d.e-]+ +0\.0\d+ +compute +bf16", out, re.M)
    assert re.search(r"^relu +3 +bf16", out, re.M)
    assert re.search(r"^casts +\d+, ", out, re.M)
    assert "roofline of an assumed device; not measured" in out
    assert "100.0% of" in out


def test_times_are_measured_by_default_and_kept() -> None:
    mlp = f"{FILE}:mlp"
    assert answer("plan", mlp, "-p", "precision")["totals"]["times"] == "measured"
    assert answer("plan", mlp, "-p", "precision")["totals"]["times"] == "kept"
    out = run("plan", mlp, "-p", "precision").stdout
    assert "measured on this device in an earlier run" in out


def test_passes_before_are_run_and_those_behind_are_not() -> None:
    found = answer("plan", NET, "-p", f"{SPEC},schedule{{link=summit}}")
    assert found["operators"] == answer("plan", NET, "-p", SPEC)["operators"]


def test_accuracy_lowers_each_layer_alone() -> None:
    found = answer("plan", NET, "-p", SPEC, "--accuracy")
    errors = {row["layer"]: row for row in found["accuracy"]}
    layers = {"stem", *(f"layers.{i}.conv" for i in range(3)), "head"}
    assert errors.keys() == {*layers, "all"}
    for row in errors.values():
        assert 0 < row["output"] < 0.03
        assert 0 < row["gradient"] < 0.05
    assert errors["all"]["operators"] == sum(errors[name]["operators"] for name in layers)
    out = run("plan", NET, "-p", SPEC, "--accuracy").stdout
    assert re.search(r"^layer +operators +output moves +gradients move$", out, re.M)


def test_emulated_formats_have_layers_and_no_times() -> None:
    spec = "cleanup,precision{format=flex16}"
    found = answer("plan", NET, "-p", spec, "--accuracy")
    assert {r["format"] for r in found["operators"]} == {"flex16"}
    errors = {row["layer"]: row["output"] for row in found["accuracy"]}
    assert errors.keys() >= {"stem", "head", "all"}
    assert all(0 < error < 1e-3 for error in errors.values())
    out = run("plan", NET, "-p", spec).stdout
    assert re.search(r"^FLOPs +100.0% of .* in flex16 *$", out, re.M)
    assert " ms as chosen" not in out


def test_accuracy_of_a_graph_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "net.gopt").write_text(run("show", NET, "--text").stdout)
    found = answer("plan", f"{tmp_path}/net.gopt", "-p", SPEC, "--accuracy")
    assert 0 < found["accuracy"][-1]["output"] < 0.05


def test_a_budget_and_the_picture_of_the_front(calibration: str, tmp_path: Path) -> None:
    spec = f"cleanup,precision{{cost=roofline,calibration={calibration},budget=1e-6}}"
    picture = tmp_path / "front.svg"
    found = answer("plan", NET, "-p", spec, "--plot", str(picture))
    assert 0 < found["totals"]["change"] <= 1e-6
    assert found["totals"]["budget"] == 1e-6
    assert len(found["front"]) > 2
    root = Xml.parse(picture).getroot()
    circles = root.findall("{*}circle")
    assert len(circles) == len(found["front"])
    assert [c.get("r") for c in circles].count("6") == 1
    heights = [float(c.get("cy") or 0) for c in circles]
    assert heights == sorted(heights)  # slower to the right, and less change of the loss
    assert any("over-budget" in row["reason"] for row in found["operators"])
    out = run("plan", NET, "-p", spec).stdout
    assert re.search(r"^layer +operator +float32 ms +bf16 ms +error +change +bound", out, re.M)
    assert re.search(r"^loss +expected to change by \S+, of a budget of 1e-06 *$", out, re.M)
    assert re.search(r"^step ms +change +lowered +chosen *$", out, re.M)


def test_nothing_to_choose(models: str) -> None:
    out = run("plan", f"{models}:norm", "-p", "precision").stdout
    assert "nothing to choose" in out
    assert "nothing-to-lower" in out
    found = answer("plan", f"{models}:norm", "-p", "precision")
    assert found["operators"] == []
    assert found["declined"][-1]["reason"] == "nothing-to-lower"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("-p", SPEC, "--link", "summit"), "--link is about groups of gradients", "leave --link"),
        (("-p", SPEC, "--flops", "1e9"), "--flops is about groups", "leave --flops out"),
        (("-p", SPEC, "--mesh", "dp=4"), "--mesh is about groups", "group_gradients"),
        (("--plot", "a.svg", "--mesh", "dp=4"), "--plot is about formats", "a pass that lowers"),
        (("--accuracy", "--mesh", "dp=4"), "--accuracy is about formats", "a pass that lowers"),
        (("-p", SPEC, "--plot", "a.svg"), "there is no front to draw", "graphopt calibrate"),
        (("-p", "precision{budget=1}"), "needs a calibration", "graphopt calibrate M -o FILE"),
        (
            ("-p", "precision{calibration=missing.json}"),
            "the calibration cannot be read",
            "graphopt calibrate",
        ),
        (("-p", "kfac{damping=0.1}"), "no pass of", "group_gradients"),
        (("-p", SPEC + ",group_gradients"), "for a number of ranks", "--mesh dp=64"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_clear_error(arguments: Sequence[str], message: str, hint: str) -> None:
    result = run("plan", NET, *arguments, code=2)
    assert message in result.stderr
    assert hint in result.stderr
    assert result.stdout == ""


def test_a_picture_that_cannot_be_written(calibration: str, tmp_path: Path) -> None:
    spec = f"cleanup,precision{{cost=roofline,calibration={calibration}}}"
    result = run("plan", NET, "-p", spec, "--plot", f"{tmp_path}/none/a.svg", code=2)
    assert "a.svg' cannot be written: No such file or directory" in result.stderr


def test_groups_are_planned_as_before_where_both_are_asked_for() -> None:
    found = answer(
        "plan", NET, "--mesh", "dp=4", "--device", "h100", "-p", f"{SPEC},group_gradients"
    )
    assert found["world"] == 4
    assert found["groups"]


# -- why -------------------------------------------------------------------------------------------


def test_why_tells_the_formats_of_a_weight() -> None:
    found = answer("why", NET, "head.weight", "-p", SPEC)["formats"]
    assert (found["before"], found["after"]) == ("float32", "float32")
    (cast,) = found["casts"]
    assert found["casts"][cast] == "bfloat16"
    assert {r["phase"] for r in found["readings"]} == {"forward", "backward"}
    assert all((r["format"], r["cast"]) == ("bfloat16", cast) for r in found["readings"])
    assert all("runs in bf16" in r["why"] for r in found["readings"])
    out = run("why", NET, "head.weight", "-p", SPEC).stdout
    assert "float32 as captured, float32 now" in out
    assert re.search(rf"^cast +{cast} to bfloat16", out, re.M)
    assert re.search(
        rf"^read forward +t_?\d* +aten.t.default +in bfloat16 through {cast}", out, re.M
    )


def test_why_tells_the_formats_of_an_operator() -> None:
    found = answer("why", NET, "convolution", "-p", SPEC)["formats"]
    assert (found["before"], found["after"]) == ("float32", "bfloat16")
    assert found["why"] == "runs in bf16"
    kept = SPEC.replace("}", ",keep=stem}")
    found = answer("why", NET, "convolution", "-p", kept)["formats"]
    assert found["after"] == "float32"
    assert found["why"] == "runs in float32: its module is kept in float32"


def test_why_knows_no_formats_where_nothing_lowers() -> None:
    assert "formats" not in answer("why", NET, "convolution", "-p", "cleanup")
    assert "as captured" not in run("why", NET, "convolution").stdout


# -- calibrate -------------------------------------------------------------------------------------


def test_calibrate_says_what_it_has_seen(models: str, tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    found = answer("calibrate", f"{models}:several", "-o", str(file))
    assert (found["batches"], found["samples"], found["loss"]) == (2, 5, "outputs")
    assert found["file"] == str(file)
    assert found["operators"] >= 1
    assert found["notes"] == []
    assert json.loads(file.read_text())["schema"] == "graphopt.calibration/1"


def test_one_sample_is_enough_and_is_said_to_be_one(models: str, tmp_path: Path) -> None:
    out = run("calibrate", f"{models}:one", "-o", f"{tmp_path}/c.json").stdout
    assert "calibrated on 1 sample in 1 batch" in out
    assert "may not be those of others" in out


def test_nan_is_flagged(models: str, tmp_path: Path) -> None:
    found = answer("calibrate", f"{models}:with_nan", "-o", f"{tmp_path}/c.json")
    assert any("has NaN in" in note for note in found["notes"])
    assert "note" in run("calibrate", f"{models}:with_nan", "-o", f"{tmp_path}/c.json").stdout


def test_other_commands_take_the_first_of_several_batches(models: str) -> None:
    assert answer("show", f"{models}:several")["modules"]["output"] == "f32[2,4]"


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (NET, (), "--output"),
        (NET, ("-o", "none/c.json"), "there is no folder 'none'"),
        ("graph.gopt", ("-o", "c.json"), "no weights and no batches"),
        (f"{FILE}:nothing", ("-o", "c.json"), "no factory 'nothing'"),
    ],
    ids=str,
)
def test_wrong_usage_of_calibrate(model: str, arguments: Sequence[str], message: str) -> None:
    assert message in run("calibrate", model, *arguments, code=2).stderr


def test_a_list_without_batches_is_no_example(models: str, tmp_path: Path) -> None:
    result = run("calibrate", f"{models}:none", "-o", f"{tmp_path}/c.json", code=2)
    assert "as example inputs" in result.stderr
