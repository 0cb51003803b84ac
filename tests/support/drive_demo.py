"""What an installed plugin is driven through; `tests/test_plugin_demo.py` runs it in a process.

The oracle is eager PyTorch: hooks on the activations, and gradients divided by hand.
"""

from __future__ import annotations

import copy
import io
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import graphopt
from graphopt import registry
from graphopt.cli.main import app
from graphopt.errors import StateError
from graphopt.model.surface import report
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan, Role
from graphopt.testing import check_pass, check_runtime, joint_graphs
from tests.support.graphs import inference_graph, linear_graph
from tests.support.ranks import on_ranks

SPEC = "scale_by_peak{decay=0.5}"
NET = f"{Path(__file__).with_name('models_for_cli.py')}:net"


def net() -> nn.Module:
    """Batch norm, so that the forward half has mutations."""
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6)]
    return nn.Sequential(*body, nn.Tanh(), nn.Linear(6, 3, bias=False))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))


def batch(step: int, shape: tuple[int, ...] = (4, 2, 6, 6)) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator) * (2 if step == 0 else 1)


class Oracle:
    """Plain training whose gradients are divided by the peaks of some activations."""

    def __init__(self, model: nn.Sequential, scaled: dict[str, tuple[str, ...]]) -> None:
        self.model, self.scaled = model, scaled
        self.peaks: dict[str, float] = {}
        self.running: dict[str, float] = {}
        for name in scaled:
            model.get_submodule(name).register_forward_hook(self._see(name))

    def _see(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_: nn.Module, __: object, result: Tensor) -> None:
            self.peaks[name] = max(self.peaks.get(name, 0.0), float(result.detach().abs().max()))

        return hook

    def finish(self) -> None:
        """Divide the gradients of a step that ends."""
        for name, parameters in self.scaled.items():
            self.running[name] = max(self.running.get(name, 0.0) * 0.5, self.peaks.pop(name))
            for parameter in parameters:
                gradient = self.model.get_parameter(parameter).grad
                assert gradient is not None
                gradient /= self.running[name]


def net_oracle() -> Oracle:
    scaled = {"2": ("0.weight", "0.bias", "1.weight", "1.bias"), "5": ("4.weight", "4.bias")}
    return Oracle(net(), scaled)  # type: ignore[arg-type]


def steps(model: nn.Module, numbers: Iterable[int], oracle: Oracle | None = None) -> None:
    for step in numbers:
        model.zero_grad()
        model(batch(step)).square().mean().backward()
        if oracle is not None:
            oracle.finish()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.05 * parameter.grad


def close(model: nn.Module, other: nn.Module, bound: float = 1e-5) -> None:
    named = zip(model.state_dict().items(), other.state_dict().values(), strict=True)
    for (name, one), two in named:
        torch.testing.assert_close(one, two, rtol=bound, atol=bound, msg=name)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# -- what is driven --------------------------------------------------------------------------------


def rewrites() -> None:
    """The pass without a runtime part, by itself."""
    assert registry.origins()["scale_gradients"] == "graphopt-demo 0.8", registry.origins()
    assert registry.origins(registry.RUNTIME_PARTS)["scale_by_peak"] == "graphopt-demo 0.8"
    assert registry.origins(registry.PLAN_PARTS)["scale_by_peak"] == "graphopt-demo 0.8"
    assert "graphopt_demo" not in sys.modules
    pipeline = Pipeline.parse("scale_gradients{factor=0.25}")
    assert str(pipeline) == "scale_gradients{factor=0.25}"
    w, x, tangent = torch.randn(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    y, before = linear_graph().module(w, x, tangent)
    graph = linear_graph()
    (step,) = pipeline.run(graph, verify="full")
    assert [(site.site, site.what) for site in step.outcome.applied] == [("w", "scaled")]
    after = graph.module(w, x, tangent)
    assert torch.equal(after[0], y)
    assert torch.equal(after[1], 0.25 * before)
    (step,) = Pipeline.parse("scale_gradients{factor=1}").run(linear_graph(), verify="full")
    assert [site.reason for site in step.outcome.declined] == ["factor-is-one"]
    (step,) = pipeline.run(inference_graph())
    assert step.skipped


def trains() -> None:
    """Forward statistics before forward mutations; micro-batches; what the model gets."""
    for backend in ("eager", "inductor"):
        model, oracle = net(), net_oracle()
        graphopt.optimize(model, passes=SPEC, backend=backend, verify="full")
        steps(model, range(4))
        steps(oracle.model, range(4), oracle)
        close(model, oracle.model)
        maxima = model.activation_maxima()
        assert [round(v, 5) for v in maxima.values()] == [
            round(v, 5) for v in oracle.running.values()
        ]
    entry = report(model).specialisations[0]
    roles = [slot.role for slot in entry.plan.signature.outputs]
    assert roles[:3] == [Role.AUX, Role.AUX, Role.MUTATION]
    assert Plan.from_json(entry.plan.to_json()) == entry.plan
    text = model.explain()
    assert f"scale_by_peak: largest activation {max(maxima.values()):.4g}" in text
    assert "scales the gradients of 4.bias, 4.weight" in text
    assert list(model.state_dict()) == list(net().state_dict())

    model, oracle = mlp(), Oracle(mlp(), {"1": ("0.weight", "0.bias")})
    graphopt.optimize(model, passes=SPEC, backend="eager")
    parts = [batch(step, (3, 5)) for step in range(3)]
    for x in parts[:2]:
        with model.no_sync():
            model(x).square().mean().backward()
    model(parts[2]).square().mean().backward()
    for x in parts:
        oracle.model(x).square().mean().backward()
    oracle.finish()
    for one, other in zip(model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def resumes() -> None:
    """Saved, loaded, copied; a state of another model is refused."""
    straight = graphopt.optimize(net(), passes=SPEC, backend="eager")
    steps(straight, range(3))
    file = io.BytesIO()
    torch.save([straight.state_dict(), graphopt.state_dict(straight)], file)
    twin = copy.deepcopy(straight)
    steps(straight, range(3, 6))
    assert sorted(graphopt.state_dict(straight)) == [
        "graphopt/format",
        "scale_by_peak/running/relu",
        "scale_by_peak/running/tanh",
    ]
    file.seek(0)
    parameters, state = torch.load(file, weights_only=True)
    resumed = graphopt.optimize(net(), passes=SPEC, backend="eager")
    resumed.load_state_dict(parameters)
    graphopt.load_state_dict(resumed, state)
    equal(graphopt.state_dict(twin), state)
    for other in (resumed, twin):
        steps(other, range(3, 6))
        equal(other.state_dict(), straight.state_dict())
        equal(graphopt.state_dict(other), graphopt.state_dict(straight))

    for before in (0, 1):  # it is found out when the model is captured, or at once
        other = graphopt.optimize(mlp(), passes=SPEC, backend="eager")
        for _ in range(before):
            other(batch(0, (2, 5))).sum().backward()
        with pytest.raises(StateError, match="and this model differ in activation 'gelu'"):  # noqa: PT012
            graphopt.load_state_dict(other, state)
            other(batch(0, (2, 5)))


def proves_itself() -> None:
    """What authors would run."""
    from graphopt_demo.scale_by_peak import ScaleByPeak

    check_pass(ScaleByPeak(), graphs=joint_graphs(kinds=["linear", "unary"]), max_examples=30)
    check_runtime(SPEC)


def _on_rank(rank: int) -> None:
    model = mlp()
    graphopt.optimize(model, passes=f"{SPEC},group_gradients{{link=10gbe}}", backend="eager")
    plain = mlp()
    scaled = {"1": ("0.weight", "0.bias")}
    oracle = Oracle(plain, scaled)  # type: ignore[arg-type]
    for step in range(3):
        both = [batch(2 * step + r, (4, 5)) for r in (0, 1)]
        for m in (model, plain):
            m.zero_grad()
        model(both[rank]).square().mean().backward()
        plain(torch.cat(both)).square().mean().backward()
        oracle.finish()
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one.grad, other.grad)
        with torch.no_grad():
            for parameter in (*model.parameters(), *plain.parameters()):
                parameter -= 0.1 * parameter.grad
    assert abs(model.activation_maxima()["gelu"] - oracle.running["1"]) < 1e-5


def on_two_ranks() -> None:
    """The maximum is that of both ranks' batches."""
    with tempfile.TemporaryDirectory() as folder:
        on_ranks(Path(folder), 2, _on_rank)


def is_known_to_the_command_line() -> None:
    """Listed with its origin, run, and asked why."""
    listed = json.loads(_command("passes", "--json"))["passes"]
    (entry,) = [p for p in listed if p["name"] == "scale_by_peak"]
    assert entry["origin"] == "graphopt-demo 0.8"
    assert [o["name"] for o in entry["options"]] == ["decay"]

    spec = ["-p", "cleanup,scale_by_peak"]
    assert "scales the gradients of" in _command("run", NET, *spec)
    told = json.loads(_command("why", NET, "stem.weight", *spec, "--json"))
    (found,) = [d for d in told["decisions"] if d["pass"] == "scale_by_peak"]
    (applied,) = found["applied"]
    assert "stem.weight" in applied["what"]


def _command(*arguments: str) -> str:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


DRIVES = {
    drive.__name__: drive
    for drive in (
        rewrites,  # first, as it sees that nothing of the package has been imported
        is_known_to_the_command_line,
        trains,
        resumes,
        proves_itself,
        on_two_ranks,
    )
}

if __name__ == "__main__":
    for name, drive in DRIVES.items():
        print(name, flush=True)
        drive()
