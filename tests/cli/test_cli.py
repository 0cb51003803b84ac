"""The command line, end to end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli import console
from graphopt.cli.main import app
from graphopt.plan import Phase
from graphopt.text import parse_graph
from tests.support import passes_for_cli
from tests.support.plugins import write_distribution

ROOT = Path(__file__).parents[2]
FILE = "tests/support/models_for_cli.py"
NET, MLP = f"{FILE}:net", f"{FILE}:mlp"
COMMANDS = (
    *("show", "run", "plan", "calibrate", "simulate", "why", "diff", "verify", "passes"),
    "doctor",
    "report",
)


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the passes of `passes_for_cli` known."""
    passes = {
        kind.name: f"tests.support.passes_for_cli:{kind.__name__}" for kind in passes_for_cli.ALL
    }
    folder = write_distribution(tmp_path, "cli-passes", "0.3", passes)
    monkeypatch.syspath_prepend(str(folder))


def graphopt(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def answer(*arguments: str, code: int = 0) -> dict:
    result = graphopt(*arguments, "--json", code=code)
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert found.pop("schema") == f"graphopt.{arguments[0]}/1"
    return found


def in_a_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "graphopt", *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(arguments: Sequence[str]) -> None:
    program = (
        "import sys; from graphopt.cli.main import app\n"
        f"try: app([*{list(arguments)!r}, '--help'], prog_name='graphopt')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'networkx', 'transformers', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: graphopt" in done.stdout
    for name in COMMANDS if not arguments else ():
        assert re.search(rf"^│ {name} ", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_the_json_schema(name: str) -> None:
    assert "JSON: " in graphopt(name, "--help").stdout


def test_no_command_and_an_unknown_command_are_wrong_usage() -> None:
    assert graphopt(code=2).exit_code == 2
    assert "No such command" in graphopt("shown", code=2).stderr


# -- naming a model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("nowhere.py:net", "there is no file 'nowhere.py'", ""),
        (f"{FILE[:-4]}.py:net", "there is no file", "files there: models_for_cli.py"),
        (FILE, "names no factory", f"write {FILE}:FACTORY"),
        (f"{FILE}:", "names no factory", f"write {FILE}:FACTORY"),
        (f"{FILE}:nett", "has no factory 'nett'", "near names: net"),
        (f"{FILE}:zzz", "has no factory 'zzz'", "near names: Block, Branching"),
        ("tests.support.models_for_cli:nett", "has no factory 'nett'", "near names: net"),
        ("tests.unit.no_models:net", "there is no module 'tests.unit.no_models'", ""),
        ("no_package.models:net", "there is no module 'no_package.models'", ""),
        (f"{FILE}:only_a_model", "returned a Mlp", "return (model, example_inputs)"),
        (f"{FILE}:no_model", "returned a int instead of a module", "(model, example_inputs)"),
        (f"{FILE}:no_inputs", "returned a Tensor as example inputs", "(tuple, dict)"),
        ("nothing.gopt", "there is no file 'nothing.gopt'", ""),
    ],
)
def test_a_name_that_leads_nowhere_is_wrong_usage(name: str, message: str, hint: str) -> None:
    result = graphopt("show", name, code=2)
    assert message in result.stderr
    assert hint in result.stderr
    assert result.stdout == ""


def test_a_factory_that_raises_is_shown_with_its_own_line() -> None:
    stderr = graphopt("show", f"{FILE}:raising", code=2).stderr
    assert "the factory raised: RuntimeError: no weights here" in stderr
    assert 'models_for_cli.py:80: raise RuntimeError("no weights here")' in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_inst"),
        ("def net(:", "SyntaxError: "),
        ("x = 1 / 0", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_fails_to_import_is_shown_with_its_line(
    tmp_path: Path, code: str, said: str
) -> None:
    (tmp_path / "broken.py").write_text(f"# first line\n{code}\n")
    stderr = graphopt("show", f"{tmp_path}/broken.py:net", code=2).stderr
    assert f"importing broken.py failed: {said}" in stderr
    assert f"broken.py:2: {code}" in stderr


def test_imports_beside_the_file_work(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("import torch\nsize = 3\n")
    (tmp_path / "uses_it.py").write_text(
        "import torch\nfrom beside_it import size\n\n"
        "def net():\n    return torch.nn.Linear(size, 2), (torch.ones(1, size),)\n"
    )
    found = answer("show", f"{tmp_path}/uses_it.py:net")
    assert found["modules"]["parameters"] == 8


def test_a_model_that_cannot_be_captured_is_a_finding_with_the_users_line() -> None:
    stderr = graphopt("show", f"{FILE}:branching", code=1).stderr
    assert "[GO-C01]" in stderr
    assert "return x * 2 if x.sum() > 0 else x * 3" in stderr


# -- show ------------------------------------------------------------------------------------------


def test_show_prints_modules_and_totals() -> None:
    out = graphopt("show", NET).stdout
    assert re.search(r"^module +output +params +ops +FLOPs +bytes +saved$", out, re.MULTILINE)
    assert re.search(r"^ +0, 1 \(x2, each\) Block +f32\[2,4,6,6\] +156 ", out, re.MULTILINE)
    assert "\nbackward " in out


def test_show_json_is_the_tree_of_modules() -> None:
    found = answer("show", "tests.support.models_for_cli:net")
    assert (found["model"], found["level"]) == ("models_for_cli:net", "joint")
    modules = found["modules"]
    assert [m["path"] for m in modules["children"]] == ["stem", "layers", "head"]
    assert modules["backward"]["flops"] > modules["forward"]["flops"] > 0
    assert found["peak_bytes"] >= modules["saved"] > 0
    assert set(modules) == {
        "path", "kind", "output", "parameters", "forward", "backward", "saved", "children",
    }  # fmt: skip


def test_show_without_grad_is_the_inference_graph_in_eval_mode() -> None:
    text = graphopt("show", NET, "--no-grad", "--text").stdout
    graph = parse_graph(text)
    assert str(graph.level) == "inference"
    assert {slot.phase for slot in graph.signature.outputs} == {Phase.FORWARD}
    assert not graph.signature.names(next(iter(graph.signature.outputs)).role.MUTATION)


def test_keyword_inputs_and_pairs_of_both_give_the_same_graph() -> None:
    by_pair, by_keyword = (
        graphopt("show", f"{FILE}:{name}", "--text").stdout for name in ("mlp", "mlp_by_keyword")
    )
    assert by_pair == by_keyword
    assert by_pair.startswith("gopt 1 joint")


def test_show_after_passes_is_the_rewritten_graph() -> None:
    before, after = (answer("show", MLP, "-p", spec) for spec in ("", "cleanup"))
    assert after["passes"] == "cleanup"
    assert after["modules"]["forward"]["ops"] < before["modules"]["forward"]["ops"]


def test_show_writes_html_beside_its_answer(tmp_path: Path) -> None:
    page = tmp_path / "graph.html"
    out = graphopt("show", MLP, "--html", str(page)).stdout
    assert out.startswith("module")
    assert page.read_text().startswith('<div class="graphopt">')


def test_a_gopt_file_is_accepted_in_place_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "mlp.gopt"
    path.write_text(graphopt("show", MLP, "--text").stdout)
    from_model, from_text = answer("show", MLP), answer("show", str(path))
    assert from_text["model"] == "mlp"
    assert from_text["modules"]["forward"] == from_model["modules"]["forward"]
    assert "already" in graphopt("show", str(path), "--no-grad", code=2).stderr


# -- passes, run -----------------------------------------------------------------------------------


def test_passes_lists_options_origin_and_numerics(plugins: None) -> None:
    found = {p["name"]: p for p in answer("passes")["passes"]}
    assert found["cleanup"]["origin"] == "built-in"
    assert found["cleanup"]["numerics"] == "exact"
    assert found["coarse"]["origin"] == "cli-passes 0.3"
    assert found["coarse"]["numerics"] == "lowered(0.01)"
    assert found["coarse"]["summary"] == "Does the same as `Liar` and says so."
    out = graphopt("passes").stdout
    assert re.search(r"coarse +cli-passes 0\.3", out)


def test_passes_shows_what_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {"broken": "not_installed_anywhere:Broken"}
    monkeypatch.syspath_prepend(str(write_distribution(tmp_path, "bad", "1", broken)))
    found = {p["name"]: p for p in answer("passes", code=1)["passes"]}
    assert "[GO-S02]" in found["broken"]["error"]
    assert "numerics" in found["cleanup"]


def test_run_shows_per_pass_what_changed_what_was_applied_and_declined(plugins: None) -> None:
    out = graphopt("run", MLP, "-p", "cleanup,shy").stdout
    assert re.search(r"^cleanup +\d+ → \d+ nodes, exact, ", out, re.MULTILINE)
    assert re.search(r"^  applied ", out, re.MULTILINE)
    assert "  declined 2x too-small: it is not worth it: lin.weight (gain=inf)" in out


def test_run_json_has_one_entry_per_pass(plugins: None) -> None:
    steps = answer("run", NET, "-p", "shy,joint_only", "--no-grad")["steps"]
    assert [step["pass"] for step in steps] == ["shy", "joint_only"]
    assert steps[0]["declined"][0] == {
        "site": "stem.weight",
        "reason": "too-small",
        "detail": "it is not worth it",
        "numbers": {"gain": "Infinity"},
    }
    assert "joint" in steps[1]["skipped"]
    assert steps[0]["nodes_before"] == steps[0]["nodes_after"]


def test_a_bad_spec_is_wrong_usage_before_the_model_is_captured() -> None:
    stderr = graphopt("run", "nowhere.py:net", "-p", "cleenup", code=2).stderr
    assert "unknown pass 'cleenup'" in stderr
    assert "did you mean 'cleanup'?" in stderr
    assert "Missing option" in graphopt("run", MLP, code=2).stderr


# -- why -------------------------------------------------------------------------------------------


def test_why_of_a_parameter(plugins: None) -> None:
    out = graphopt("why", NET, "layers.1.conv.weight", "-p", "cleanup,shy").stdout
    assert out.startswith("layers.1.conv.weight  param\n")
    for key, text in [
        ("type", r"f32\[4,4,3,3\]"),
        ("module", r"layers\.1\.conv"),
        ("source", r"tests/support/models_for_cli\.py:16: return torch\.relu"),
        ("used forward", r"convolution_2  aten\.convolution\.default"),
        ("gradient", r"getitem_\d+, from aten\.convolution_backward\.default"),
        ("pass", r"shy: declined too-small: it is not worth it \(gain=inf\)"),
    ]:
        assert re.search(rf"^{key} +{text}", out, re.MULTILINE), key


def test_why_tells_only_what_is_about_the_name(plugins: None) -> None:
    found = answer("why", NET, "stem.weight", "-p", "shy,joint_only")
    assert [d["pass"] for d in found["decisions"]] == ["shy", "joint_only"]
    assert [d["site"] for d in found["decisions"][0]["declined"]] == ["stem.weight"]
    assert found["story"]["gradient"]["of"] > 0
    assert (found["graph"], found["removed"]) == ("captured", False)


def test_why_of_a_node_that_a_pass_removed_and_of_one_it_made(plugins: None) -> None:
    removed = answer("why", MLP, "sin_1", "-p", "cleanup")
    assert (removed["graph"], removed["removed"]) == ("captured", True)
    applied = [(a["site"], a["what"]) for a in removed["decisions"][0]["applied"]]
    assert applied == [("aten.sin.default", "merged duplicate")]
    made = answer("why", MLP, "mul_tensor", "-p", "liar")
    assert (made["graph"], made["removed"]) == ("rewritten", False)


def test_why_of_an_unknown_name_suggests_near_ones() -> None:
    stderr = graphopt("why", NET, "layers.1.conv.wieght", code=2).stderr
    assert "no parameter, buffer or node 'layers.1.conv.wieght'" in stderr
    near = stderr.partition("near names: ")[2].replace("\n", " ").split(", ")
    assert near[0] == "layers.1.conv.weight"
    assert len(near) == len(set(near)) > 1


# -- diff ------------------------------------------------------------------------------------------


def test_diff_of_equal_graphs_is_no_finding(tmp_path: Path) -> None:
    path = tmp_path / "a.gopt"
    path.write_text(graphopt("show", MLP, "--text").stdout)
    assert answer("diff", str(path), MLP)["equal"] is True
    assert answer("diff", MLP, "", "")["equal"] is True


def test_diff_of_two_specs_is_a_finding(plugins: None) -> None:
    found = answer("diff", MLP, "", "cleanup", code=1)
    assert (found["a"], found["b"], found["equal"]) == ("", "cleanup", False)
    assert "sin" in graphopt("diff", MLP, "", "cleanup", code=1).stdout


def test_diff_of_two_files_is_a_finding(tmp_path: Path) -> None:
    paths = [tmp_path / "a.gopt", tmp_path / "b.gopt"]
    for path, spec in zip(paths, ("", "cleanup"), strict=True):
        path.write_text(graphopt("show", MLP, "--text", "-p", spec).stdout)
    assert answer("diff", *map(str, paths), code=1)["equal"] is False


# -- verify ----------------------------------------------------------------------------------------


def test_verify_of_honest_passes_is_bit_equal_with_dropout_and_batch_norm() -> None:
    for model in (MLP, NET):
        found = answer("verify", model, "-p", "cleanup")
        assert (found["ok"], found["first_bad"]) == (True, None)
        assert [s["stage"] for s in found["stages"]] == ["capture", "cleanup"]
        assert {s["result"] for s in found["stages"]} == {"bit-equal"}


def test_verify_names_the_first_pass_out_of_its_class(plugins: None) -> None:
    found = answer("verify", MLP, "-p", "cleanup,coarse,liar,cleanup", code=1)
    assert found["first_bad"] == "liar"
    results = {s["stage"]: s["result"] for s in found["stages"]}
    assert results["coarse"] == "within its class"
    assert results["liar"] == "out of its class"
    liar = next(s for s in found["stages"] if s["stage"] == "liar")
    assert liar["worst"] == "output 0"
    assert liar["error"] == pytest.approx(1e-3, rel=1e-2)
    out = graphopt("verify", MLP, "-p", "liar", code=1).stdout
    assert "first out of its class: liar" in out


def test_verify_without_grad_and_with_a_skipped_pass(plugins: None) -> None:
    found = answer("verify", NET, "-p", "joint_only", "--no-grad")
    assert [s["result"] for s in found["stages"]] == ["bit-equal", "skipped"]


def test_verify_runs_a_gopt_file_on_made_up_inputs(tmp_path: Path, plugins: None) -> None:
    path = tmp_path / "mlp.gopt"
    path.write_text(graphopt("show", MLP, "--text").stdout)
    found = answer("verify", str(path), "-p", "cleanup,liar", code=1)
    assert [(s["stage"], s["result"]) for s in found["stages"]] == [
        ("cleanup", "bit-equal"),
        ("liar", "out of its class"),
    ]


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor_reports_this_machine() -> None:
    checks = {c["name"]: c for c in answer("doctor")["checks"]}
    assert checks["torch"]["state"] == "ok"
    assert checks["python"]["detail"].startswith(f"{sys.version_info.major}.")
    assert {"cpu", "c++ compiler", "triton", "collectives", "threads"} <= set(checks)
    assert "inductor" not in checks


def test_doctor_finds_an_unsupported_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.__version__", "2.99.0")
    checks = {c["name"]: c for c in answer("doctor", code=1)["checks"]}
    assert checks["torch"]["state"] == "failed"


def test_a_deep_look_finds_an_inductor_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(function: object, *, backend: str) -> None:
        raise RuntimeError(f"{backend} cannot find omp.h\nmany more lines")

    monkeypatch.setattr("torch.compile", failing)
    checks = {c["name"]: c for c in answer("doctor", "--deep", code=1)["checks"]}
    assert checks["inductor"]["state"] == "failed"
    assert checks["inductor"]["detail"].endswith("RuntimeError: inductor cannot find omp.h")
    assert "failed" in graphopt("doctor", "--deep", code=1).stdout


# -- where output goes -----------------------------------------------------------------------------


def fail_slowly() -> None:
    with console.phase("failing"):
        time.sleep(0.1)
        raise ZeroDivisionError


def test_a_slow_phase_says_so_on_stderr_and_a_quick_one_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PATIENCE", 0.01)
    with console.phase("counting"):
        time.sleep(0.1)
    with pytest.raises(ZeroDivisionError):
        fail_slowly()
    monkeypatch.setattr(console, "PATIENCE", 60.0)
    with console.phase("quick"):
        pass
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"counting… 0\.\d s\nfailing… 0\.\d s\n", captured.err)


def test_a_real_process_answers_on_stdout_without_colour() -> None:
    done = in_a_process("show", MLP, NO_COLOR="1", FORCE_COLOR="")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.startswith("module")
    assert not re.search("^(module|forward)", done.stderr, re.MULTILINE)


def test_a_real_process_exits_with_the_codes_that_are_documented() -> None:
    done = in_a_process("show", f"{FILE}:nett")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.search(r"^\[GO-A01\] .* has no factory 'nett'$", done.stderr, re.MULTILINE)
    narrow = in_a_process("passes", COLUMNS="50")
    assert narrow.returncode == 0, narrow.stderr
    assert max(map(len, narrow.stdout.splitlines())) <= 50
