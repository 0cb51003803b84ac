"""Capture: names, places, the second way in, and what the signature says."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import CaptureError
from graphopt.graph import Level, module_of, phase_of, source_of
from graphopt.plan import Phase, Role


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images: Tensor, *, mask: Tensor | None = None) -> Tensor:
        h = self.head(self.body(images))
        return h if mask is None else h * mask


def test_slots_have_the_names_that_the_user_gave() -> None:
    signature = capture(Small(), (torch.randn(2, 4),), {"mask": torch.ones(3)}).graph.signature
    assert set(signature.names(Role.PARAM)) == {n for n, _ in Small().named_parameters()}
    assert set(signature.names(Role.INPUT)) == {"images", "mask"}
    assert signature.names(Role.OUTPUT) == ("0",)


def test_module_and_source_line_survive_on_both_halves() -> None:
    graph = capture(Small(), (torch.randn(2, 4),)).graph
    for phase in Phase:
        nodes = [n for n in graph.operators if phase_of(n) is phase]
        assert {"body.0", "head"} <= {module_of(n) for n in nodes}
    forward = [n for n in graph.operators if module_of(n) == "head"]
    assert any("self.head(self.body(images))" in source_of(n) for n in forward)


def test_input_that_is_named_like_a_parameter() -> None:
    class Clash(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.x

    signature = capture(Clash(), (torch.randn(2, 3),)).graph.signature
    assert signature.names(Role.PARAM) == ("x",)
    assert signature.names(Role.INPUT) == ("x_",)


def test_levels_follow_the_grad_mode() -> None:
    model, x = Small(), torch.randn(2, 4)
    assert capture(model, (x,)).graph.level is Level.JOINT
    with torch.no_grad():
        assert capture(model, (x,)).graph.level is Level.INFERENCE


def test_mutated_inputs_are_written_back() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            seen.add_(x.sum().detach())
            return self.lin(x)

    model = Counts()
    optimized = graphopt.optimize(copy.deepcopy(model), backend="eager")
    x = torch.randn(2, 4)
    a, b = torch.zeros(1), torch.zeros(1)
    for _ in range(2):
        assert torch.equal(model(x, a), optimized(x, b))
        assert torch.equal(a, b)


def test_graphs_are_not_pickled() -> None:
    import pickle

    with pytest.raises(graphopt.errors.TextError, match="not pickled"):
        pickle.dumps(capture(Small(), (torch.randn(2, 4),)).graph)


@pytest.mark.parametrize("version", ["2.10.1", "2.14.0+cpu", "3.0.0"])
def test_other_torch_versions_are_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(CaptureError, match=r"outside the supported range >=2\.11,<2\.14"):
        capture(Small(), (torch.randn(2, 4),))
