"""`graphopt simulate`, end to end, and the files that it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as Xml

import pytest
from click.testing import Result
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.network.clusters import ALGORITHMS, CLUSTERS
from graphopt.network.negotiation import NEGOTIATIONS, Negotiator
from graphopt.plan.grouping import Group, Ready
from graphopt.render.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, efficiency_chart
from graphopt.render.perfetto import trace_events
from graphopt.simulate import Timeline, simulate

ROOT = Path(__file__).parents[2]
NET = "tests/support/models_for_cli.py:net"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "300")


def run(*arguments: str, code: int = 0) -> Result:
    named = () if {"--device", "--flops"} & set(arguments) else ("--device", "v100")
    result = CliRunner().invoke(app, ["simulate", *arguments, *named])
    assert result.exit_code == code, f"{result.stderr}\n{result.stdout}\n{result.exception!r}"
    return result


def on_summit(*arguments: str, code: int = 0) -> Result:
    return run(NET, "--mesh", "dp=27600", "--cluster", "summit", *arguments, code=code)


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from graphopt.cli.main import app\n"
        "try: app(['simulate', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--cluster" in done.stdout


def test_table_has_all_sizes_and_all_assumptions() -> None:
    out = on_summit("--straggler", "0.02", "--contention", "1.5", "--flops", "3e12").stdout
    rows = [line.split() for line in out.splitlines() if "%" in line and line.strip()[0].isdigit()]
    worlds = [int(row[0].replace(",", "")) for row in rows]
    assert worlds == [*(2**i for i in range(15)), 27600]
    assert "efficiency" in out
    assert "DDP default" in out
    for words in (
        "3 TFLOP/s (3 TFLOP/s in 16 bits), 1.5 TB/s",
        "not measured",
        "16 gradients, 2.42 kB",
        "summit: auto over 27,600 GPUs; assumed: intra_latency",
        "spread by 2 % (assumed)",
        "1.5 times as slow",
    ):
        assert words in out


def test_json_chart_and_trace_agree(tmp_path: Path) -> None:
    chart, trace = tmp_path / "out.svg", tmp_path / "out.json"
    out = on_summit("--chart", str(chart), "--trace", str(trace), "--json").stdout
    found = json.loads(out, parse_constant=pytest.fail)
    assert found["schema"] == "graphopt.simulate/1"
    points = found["points"]
    assert [points[0][key] for key in ("world", "efficiency", "groups")] == [1, 1.0, 0]
    compute = found["forward"] + found["backward"]
    for point in points:
        assert point["efficiency"] == pytest.approx(compute / point["step"])
        assert point["step"] <= point["ddp"]["step"] * (1 + 1e-9)
    steps = [point["step"] for point in points]
    assert steps == sorted(steps)

    events = json.loads(trace.read_text())["traceEvents"]
    ends = [event["ts"] + event["dur"] for event in events if event["ph"] == "X"]
    assert max(ends) == pytest.approx(1e6 * points[-1]["step"])

    svg = Xml.parse(chart).getroot()
    tips = [title.text for title in svg.iter(f"{SVG}title")]
    last = f"graphopt: {100 * points[-1]['efficiency']:.2f} % at 27,600 ranks"
    assert last in tips


def test_a_faster_device_is_less_efficient_on_the_same_link() -> None:
    def last(flops: str) -> float:
        options = ("--mesh", "dp=4", "--cluster", "25gbe", "--straggler", "0", "--json")
        points = json.loads(run(NET, *options, "--flops", flops).stdout)["points"]
        return points[-1]["efficiency"]

    assert last("1e14") < last("1e8") < 1.0


def test_one_rank_needs_no_link() -> None:
    out = run(NET, "--mesh", "dp=1", "--cluster", "10gbe", "--json").stdout
    (point,) = json.loads(out)["points"]
    assert (point["world"], point["efficiency"], point["exposed"]) == (1, 1.0, 0.0)


def test_more_ranks_than_the_machine_has_are_said_to_be() -> None:
    assert "beyond its" in run(NET, "--mesh", "dp=128", "--cluster", "10gbe").stdout


def points(*options: str) -> list[dict[str, float]]:
    answer = json.loads(run(NET, "--cluster", "summit", *options, "--json").stdout)
    return answer["points"]


@pytest.mark.parametrize("algorithm", ["torus", "hierarchical", "double_binary_tree"])
def test_algorithm_is_the_one_asked_for(algorithm: str) -> None:
    options = ("--mesh", "dp=96", "--straggler", "0", "--algorithm", algorithm)
    answer = json.loads(run(NET, "--cluster", "summit", *options, "--json").stdout)
    assert answer["assumptions"]["algorithm"] == algorithm
    last = answer["points"][-1]["ddp"]
    assert last["groups"] == 1
    # One bucket, which is full when the last gradient is ready: all of it is exposed.
    cost = CLUSTERS["summit"].all_reduce(96, algorithm)(answer["bytes"])
    assert last["exposed"] == pytest.approx(cost)
    out = run(NET, "--cluster", "summit", *options).stdout
    assert f"summit: {algorithm} over 96 GPUs" in out


def test_a_flat_ring_does_not_scale() -> None:
    options = ("--mesh", "dp=4096", "--straggler", "0", "--algorithm")
    ring, torus, tree = (
        points(*options, name)[-1]["efficiency"] for name in ("ring", "torus", "double_binary_tree")
    )
    assert ring < torus < tree


def test_negotiation_costs_what_its_formula_says() -> None:
    options = ("--mesh", "dp=4096", "--straggler", "0")
    alone = points(*options)[-1]
    assert alone["groups"] == 1
    link = CLUSTERS["summit"].hop(4096)
    for name in NEGOTIATIONS[1:]:
        talking = points(*options, "--negotiation", name)[-1]
        talk = Negotiator(name).seconds(4096, 16, 16, link)
        assert talk > 0
        assert talking["step"] == pytest.approx(alone["step"] + talk)


def test_negotiation_is_told(tmp_path: Path) -> None:
    chart = tmp_path / "out.svg"
    options = ("--mesh", "dp=64", "--negotiation", "control_tree", "--chart", str(chart))
    out = run(NET, "--cluster", "summit", *options).stdout
    assert "control_tree, before each group: a rank spends 1 us on each of up to 8 others" in out
    assert "negotiation control_tree" in " ".join(_texts(chart.read_text()))
    assert "negotiation" not in run(NET, "--cluster", "summit", "--mesh", "dp=64").stdout


@pytest.mark.parametrize(
    ("option", "word", "choices"),
    [("--algorithm", "rings", ALGORITHMS), ("--negotiation", "vote", NEGOTIATIONS)],
)
def test_an_unknown_word_gets_the_choices(option: str, word: str, choices: tuple[str, ...]) -> None:
    result = run("nowhere:f", "--mesh", "dp=8", "--cluster", "summit", option, word, code=2)
    assert all(choice in result.stderr for choice in choices)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "cluster", "options", "says"),
    [
        ("dp=8", "sumit", (), "no cluster 'sumit'"),
        ("pp=8", "summit", (), "has no dp"),
        ("", "summit", (), "is not a positive whole number"),
        ("dp=0", "summit", (), "dp='0' is not a positive"),
        ("dp=-4", "summit", (), "dp='-4' is not a positive"),
        ("dp=many", "summit", (), "dp='many' is not a positive"),
        ("dp=8,pp=2", "summit", (), "does not know: pp"),
        ("dp=8", "summit", ("--flops", "0"), "--flops 0 is no speed"),
        ("dp=8", "summit", ("--flops", "nan"), "--flops nan is no speed"),
        ("dp=8", "summit", ("--straggler", "-1"), "--straggler -1 is no standard"),
        ("dp=8", "summit", ("--contention", "0.5"), "--contention 0.5 would make"),
        ("dp=8", "summit", ("--algorithm", "rings"), "'rings' is no all-reduce of cluster"),
        ("dp=8", "10gbe", ("--algorithm", "nccl"), "'nccl' is no all-reduce of cluster"),
        ("dp=1", "10gbe", ("--algorithm", "rings"), "'rings' is no all-reduce of cluster"),
        ("dp=8", "summit", ("--negotiation", "vote"), "there is no negotiation 'vote'"),
    ],
)
def test_bad_arguments(mesh: str, cluster: str, options: tuple[str, ...], says: str) -> None:
    # The model does not exist: arguments are checked before the slow part.
    result = run("nowhere:f", "--mesh", mesh, "--cluster", cluster, *options, code=2)
    assert says in result.stderr
    assert "[GO-A01]" in result.stderr
    assert "try: " in result.stderr


def test_a_model_without_gradients(tmp_path: Path) -> None:
    file = tmp_path / "frozen_model.py"
    file.write_text(
        "import torch\n"
        "def f():\n"
        "    return torch.nn.Linear(2, 2).requires_grad_(False), (torch.ones(1, 2),)\n"
    )
    result = run(f"{file}:f", "--mesh", "dp=2", "--cluster", "10gbe", code=2)
    assert "no parameter of frozen_model:f receives a gradient" in result.stderr


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    place = tmp_path / "missing" / "out.svg"
    result = run(NET, "--mesh", "dp=2", "--cluster", "10gbe", "--chart", str(place), code=2)
    assert "cannot be written: No such file or directory" in result.stderr


# -- files -----------------------------------------------------------------------------------------


def test_trace_has_a_thread_per_lane_in_microseconds() -> None:
    timeline = Timeline(1.0, 2.0, (Ready("a", 8, 1.0),))
    trace = simulate(timeline, (Group(("a",), 8, "float32 cpu"),), lambda _: 0.5)
    found = trace_events(trace, "a step")
    events = json.loads(json.dumps(found))["traceEvents"]
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert sorted(threads.values()) == ["channel 0", "compute"]
    spans = [(threads[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert spans == [
        ("compute", "forward", 0.0, 1e6),
        ("compute", "a", 1e6, 1e6),
        ("channel 0", "a", 2e6, 5e5),
        ("compute", "rest of backward", 2e6, 1e6),
    ]
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["a step"]


def _texts(svg: str) -> list[str]:
    return [element.text or "" for element in Xml.fromstring(svg).iter(f"{SVG}text")]


def test_chart_axis_is_logarithmic_and_names_the_largest_machine() -> None:
    line = [(world, 1 - 0.01 * i) for i, world in enumerate((1, 2, 4, 8, 16))]
    svg = efficiency_chart("A & B <c>", "under", {"ours": line})
    dots = [float(c.get("cx", "")) for c in Xml.fromstring(svg).iter(f"{SVG}circle")]
    gaps = [b - a for a, b in pairwise(dots)]
    assert gaps == pytest.approx([gaps[0]] * 4, abs=0.2)
    texts = _texts(svg)
    assert {"A & B <c>", "under", "16", "100 %", "90 %", "ours 96.0 %"} <= set(texts)


def test_chart_labels_of_equal_lines_do_not_overlap() -> None:
    svg = efficiency_chart("t", "s", {"a": [(1, 1.0), (8, 0.5)], "b": [(1, 1.0), (8, 0.5)]})
    places = [
        float(t.get("y", ""))
        for t in Xml.fromstring(svg).iter(f"{SVG}text")
        if (t.text or "").endswith("50.0 %")
    ]
    assert len(places) == 2
    assert abs(places[0] - places[1]) >= 12


@pytest.mark.parametrize("efficiency", [0.0, 0.04, 1.0])
def test_chart_keeps_every_point_within_its_axes(efficiency: float) -> None:
    svg = efficiency_chart("t", "s", {"a": [(3, efficiency)]})
    (dot,) = Xml.fromstring(svg).iter(f"{SVG}circle")
    assert LEFT <= float(dot.get("cx", "")) <= WIDTH - RIGHT
    assert TOP <= float(dot.get("cy", "")) <= HEIGHT - BOTTOM


def test_chart_with_a_cut_axis_says_so() -> None:
    cut = efficiency_chart("t", "s", {"a": [(1, 1.0), (8, 0.95)]})
    whole = efficiency_chart("t", "s", {"a": [(1, 1.0), (8, 0.05)]})
    assert "scaling efficiency, from 90 %" in _texts(cut)
    assert "scaling efficiency" in _texts(whole)


def test_chart_wraps_a_long_subtitle() -> None:
    words = "predicted " * 15
    lines = [
        element
        for element in Xml.fromstring(efficiency_chart("t", words, {"a": [(1, 1.0)]})).iter(
            f"{SVG}text"
        )
        if "predicted" in (element.text or "")
    ]
    assert " ".join(element.text or "" for element in lines) == words.strip()
    assert len(lines) == 2
    assert max(float(element.get("y", "")) for element in lines) < TOP


def test_chart_without_points_is_refused() -> None:
    with pytest.raises(ValueError, match="needs points"):
        efficiency_chart("t", "s", {"a": []})
