"""`graphopt plan`, end to end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.schedule import Schedule

ROOT = Path(__file__).parents[2]
FILE = "tests/support/models_for_cli.py"
NET = f"{FILE}:net"

MODELS = """
import torch
from torch import nn


class Frozen(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.requires_grad_(False)


class Idle(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.embed(tokens))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 8).double()

    def forward(self, x):
        return self.last(self.first(x).double())


def frozen():
    return Frozen(), (torch.ones(2, 4),)


def frozen_with_gradient_of_input():
    return Frozen(), (torch.ones(2, 4, requires_grad=True),)


def no_parameters():
    return nn.ReLU(), (torch.ones(2, 4),)


def idle():
    return Idle(), (torch.ones(2, 4),)


def tied():
    return Tied(), (torch.tensor([[1, 2]]),)


def mixed():
    return Mixed(), (torch.ones(2, 4),)
"""


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture
def models(tmp_path: Path) -> str:
    """A file of models, as the argument M names it, up to the colon."""
    file = tmp_path / "models_to_plan.py"
    file.write_text(MODELS)
    return str(file)


DEVICE = ("--device", "v100")


def plan(model: str, *arguments: str, mesh: str = "dp=64", code: int = 0) -> Result:
    named = () if {"--device", "--flops"} & set(arguments) else ("--device", "v100")
    result = CliRunner().invoke(app, ["plan", model, "--mesh", mesh, *named, *arguments])
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def answer(model: str, *arguments: str, mesh: str = "dp=64") -> dict:
    found = json.loads(plan(model, *arguments, "--json", mesh=mesh).stdout)
    assert found.pop("schema") == "graphopt.plan/1"
    return found


def all_names(found: dict) -> list[str]:
    return [name for group in found["groups"] for name in group["names"]]


# -- what it finds ---------------------------------------------------------------------------------


def test_json_is_the_grouping_with_its_certificate() -> None:
    found = answer(NET)
    names = all_names(found)
    assert len(names) == len(set(names)) == 16
    assert names.index("head.weight") < names.index("layers.0.conv.weight")
    assert found["world"] == 64
    assert found["times"] == "roofline"
    assert found["order"] == "graph"
    assert 0 < found["bound"] <= found["finish"] * (1 + 1e-12)
    assert found["above_bound"] == pytest.approx(found["finish"] / found["bound"] - 1, abs=1e-12)
    assert found["exposed"] == pytest.approx(max(0.0, found["finish"] - found["backward"]))
    assert found["groups"][-1]["finish"] == pytest.approx(found["finish"])
    assert {c["name"] for c in found["candidates"]} >= {"ddp default", "one group"}
    assert all(c["finish"] >= found["finish"] * (1 - 1e-9) for c in found["candidates"])
    for candidate in found["candidates"]:
        assert sum(candidate["sizes"]) == sum(group["bytes"] for group in found["groups"])


def test_the_text_names_groups_candidates_bound_and_sources() -> None:
    out = plan(NET, "--link", "summit").stdout
    assert re.search(r"^group +params +bytes +first +last +ready ms +finish ms$", out, re.M)
    assert re.search(r"^plan +groups +finish ms +exposed ms$", out, re.M)
    assert re.search(r"^this plan ", out, re.M)
    assert re.search(r"^ddp default ", out, re.M)
    assert re.search(r"this plan is \d+\.\d\d % above", out)
    assert "compute: roofline" in out
    assert "summit" in out
    assert "from --link; assumed: intra_latency" in out
    assert "bucket_cap_mb_list" not in out


@pytest.mark.parametrize(
    ("arguments", "link", "origin"),
    [
        ((), "10gbe", "default"),
        (("-p", "group_gradients"), "10gbe", "default"),
        (("-p", "group_gradients{link=summit}"), "summit", "group_gradients"),
        (("-p", "cleanup,group_gradients{link=summit}"), "summit", "group_gradients"),
        (("-p", "group_gradients{link=measure}"), "10gbe", "default"),
        (("-p", "group_gradients{link=summit}", "--link", "25gbe"), "25gbe", "--link"),
    ],
    ids=str,
)
def test_the_link_is_the_options_then_the_specs_then_a_default(
    arguments: Sequence[str], link: str, origin: str
) -> None:
    found = answer(f"{FILE}:mlp", *arguments)
    assert found["link"].startswith(link)
    assert found["link_from"] == origin
    assert found["assumed"]


def test_the_default_link_is_said_to_be_one() -> None:
    assert "10gbe by default, --link names another" in plan(f"{FILE}:mlp").stdout


def test_passes_before_the_grouping_are_run() -> None:
    without, cleaned = answer(f"{FILE}:mlp"), answer(f"{FILE}:mlp", "-p", "cleanup,group_gradients")
    # The pass removes a sine that the model computes twice, and its backward.
    assert cleaned["backward"] < without["backward"]


def test_more_ranks_never_finish_earlier() -> None:
    finishes = [answer(NET, mesh=f"dp={world}")["finish"] for world in (2, 16, 64)]
    assert finishes == sorted(finishes)
    assert finishes[0] < finishes[-1]


def test_a_tied_weight_is_planned_once(models: str) -> None:
    assert sorted(all_names(answer(f"{models}:tied"))) == ["embed.weight", "head.bias"]


def test_a_graph_from_a_file_can_be_planned(tmp_path: Path) -> None:
    text = CliRunner().invoke(app, ["show", NET, "--text"]).stdout
    (tmp_path / "net.gopt").write_text(text)
    planned, direct = answer(f"{tmp_path}/net.gopt"), answer(NET)
    assert planned["model"] == "net"
    assert planned["groups"] == direct["groups"]


# -- for DistributedDataParallel -------------------------------------------------------------------


def test_emit_ddp_prints_a_line_that_python_can_run() -> None:
    last = plan(NET, "--emit", "ddp").stdout.splitlines()[-1]
    given: dict = {}

    def ddp(model: object, **options: object) -> None:
        given.update(options)

    exec(last, {"DistributedDataParallel": ddp, "model": None})
    found = answer(NET, "--emit", "ddp")
    assert given == {"bucket_cap_mb_list": found["bucket_cap_mb_list"]}
    sizes = [cap * 2**20 for cap in given["bucket_cap_mb_list"]]
    assert sizes == [group["bytes"] for group in found["groups"]]
    assert found["order"] == "ddp"


def test_emit_ddp_plans_for_tied_weights(models: str) -> None:
    assert all_names(answer(f"{models}:tied", "--emit", "ddp"))[-1] == "embed.weight"


# -- wrong usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "arguments", "message", "hint"),
    [
        ("pp=4", (), "--mesh pp=4 has no dp", "--mesh dp=64"),
        ("dp=8,pp=4", (), "dimensions that plan does not know: pp", "--mesh dp=8"),
        ("dp=1", (), "with dp=1 there is one rank", "--mesh dp=64"),
        ("dp=0", (), "dp='0' is not a positive whole number", ""),
        ("64", (), "is not a positive whole number", ""),
        ("dp=4", ("--link", "sumit"), "'sumit'", "summit"),
        ("dp=4", ("-p", "group_gradients{link=sumit}"), "'sumit'", "summit"),
        ("dp=4", ("--emit", "fsdp"), "--emit fsdp is unknown", "use --emit ddp"),
        ("dp=4", ("-p", "clenup"), "unknown pass 'clenup'", "cleanup"),
        ("dp=4", ("-p", "kfac"), "no pass of 'kfac' groups", "-p kfac,group_gradients"),
        ("dp=4", ("-p", ""), "no pass of '' groups gradients", "-p group_gradients"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_clear_error(
    mesh: str, arguments: Sequence[str], message: str, hint: str
) -> None:
    result = plan(NET, *arguments, mesh=mesh, code=2)
    assert message in result.stderr
    assert hint in result.stderr
    assert result.stdout == ""


def test_without_a_mesh_it_is_wrong_usage() -> None:
    result = CliRunner().invoke(app, ["plan", NET])
    assert result.exit_code == 2
    assert "--mesh" in result.stderr


@pytest.mark.parametrize("factory", ["frozen", "frozen_with_gradient_of_input", "no_parameters"])
def test_a_model_without_gradients_is_wrong_usage(models: str, factory: str) -> None:
    result = plan(f"{models}:{factory}", code=2)
    assert f"no parameter of models_to_plan:{factory} receives a gradient" in result.stderr
    assert "requires_grad" in result.stderr


def test_a_parameter_that_ddp_would_have_to_look_for_is_named(models: str) -> None:
    result = plan(f"{models}:idle", "--emit", "ddp", code=2)
    assert "parameter 'idle.weight' gets no gradient" in result.stderr
    assert "find_unused_parameters=True" in result.stderr


def test_emit_ddp_needs_a_model_and_not_only_a_graph(tmp_path: Path) -> None:
    text = CliRunner().invoke(app, ["show", f"{FILE}:mlp", "--text"]).stdout
    (tmp_path / "mlp.gopt").write_text(text)
    result = plan(f"{tmp_path}/mlp.gopt", "--emit", "ddp", code=2)
    assert "a .gopt file is only its graph" in result.stderr


def test_two_dtypes_are_planned_each_on_its_own(models: str) -> None:
    found = answer(f"{models}:mixed")
    assert {group["kind"] for group in found["groups"]} == {"float32 cpu", "float64 cpu"}


# -- beside other passes ---------------------------------------------------------------------------


def test_a_schedule_before_the_grouping_plans_for_the_same_link() -> None:
    links = []

    def seen(self: Schedule, graph: Graph, ctx: PassContext) -> Outcome:
        links.append((self.link, dict(ctx.mesh)))
        return Outcome()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Schedule, "apply", seen)
        answer(f"{FILE}:mlp", "-p", "schedule,group_gradients", "--link", "summit")
        answer(f"{FILE}:mlp", "-p", "schedule{link=abci},group_gradients", "--link", "summit")
    assert links == [("summit", {"dp": 64}), ("abci", {"dp": 64})]


def test_emit_ddp_refuses_a_schedule_that_eager_would_not_follow() -> None:
    result = plan(NET, "-p", "schedule,group_gradients", "--emit", "ddp", code=2)
    assert "leave schedule out of -p" in result.stderr


def test_help_imports_nothing_heavy_and_documents_the_json() -> None:
    program = (
        "import sys; from graphopt.cli.main import app\n"
        "try: app(['plan', '--help'], prog_name='graphopt')\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "JSON: " in done.stdout


@pytest.mark.parametrize("name", ["h100", "v100", "cpu"])
def test_plan_and_simulate_assume_the_same_device(name: str) -> None:
    """Not the CPU that the factory's model happens to lie on."""
    runner = CliRunner()
    on = ["--device", name, "--json"]
    planned = runner.invoke(app, ["plan", NET, "--mesh", "dp=64", "--link", "10gbe", *on])
    arguments = ["simulate", NET, "--mesh", "dp=64", "--cluster", "10gbe", *on]
    simulated = json.loads(runner.invoke(app, arguments).stdout)
    found = json.loads(planned.stdout)
    assert found["backward"] == pytest.approx(simulated["backward"])
    assert found["compute"] == simulated["assumptions"]["compute"]
    assert found["compute"]["device"] == name


@pytest.mark.parametrize("command", [("plan", "--link"), ("simulate", "--cluster")])
def test_a_mesh_without_a_device_is_an_error_with_the_choices(command: tuple[str, str]) -> None:
    name, link = command
    result = CliRunner().invoke(app, [name, NET, "--mesh", "dp=64", link, "10gbe"])
    assert result.exit_code == 2
    assert result.stderr == (
        "[GO-A01] --mesh dp=64 does not say what each rank computes with\n"
        "  try: one of --device h100, --device v100, --device cpu, --device measure\n"
    )


def test_devices_that_there_are_not() -> None:
    wrong = plan(NET, "--device", "abacus", code=2)
    assert "--device abacus is unknown" in wrong.stderr
    assert "--device h100" in wrong.stderr
    both = plan(NET, "--device", "measure", "--flops", "1e9", code=2)
    assert "--flops is about a roofline" in both.stderr


def test_measured_times_are_those_of_this_machine() -> None:
    found = answer(NET, "--device", "measure")
    assert found["compute"] == {"device": "measure"}
    assert found["times"] == "measured"
    assert "measured: each operator on this machine" in plan(NET, "--device", "measure").stdout


def test_plan_takes_the_speed_of_a_device() -> None:
    arguments = ["plan", NET, "--mesh", "dp=64", *DEVICE, "--json"]
    slow = json.loads(CliRunner().invoke(app, [*arguments, "--flops", "1e8"]).stdout)
    fast = json.loads(CliRunner().invoke(app, arguments).stdout)
    assert slow["backward"] > fast["backward"]


def test_inputs_that_forward_does_not_take(tmp_path: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 2), ()\n")
    result = CliRunner().invoke(app, ["show", f"{file}:make"])
    assert result.exit_code != 0
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit | ArgumentError)
