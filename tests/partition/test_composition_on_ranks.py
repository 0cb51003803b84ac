"""Other methods in the stages of a step on several ranks: what one process has with them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.model.controller import controller_of
from graphopt.model.surface import report
from graphopt.runtime.engine.compared import NAME as FORMS
from tests.support.pipelines import Residual, alone, data, differing
from tests.support.ranks import on_ranks

pytestmark = [pytest.mark.distributed]

KFAC = "kfac{damping=0.02}"


class Tied(nn.Module):
    """A weight that an early and a late layer share."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(8, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes for rows of eight numbers."""
        x = torch.tanh(self.a(x))
        x = torch.tanh(self.b(x))
        x = torch.tanh(self.a(x))
        scores: Tensor = self.c(x)
        return scores


class OneLayer(nn.Module):
    """A layer, and so much behind it that the last stage has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes for rows of eight numbers."""
        scores: Tensor = self.layer(x)
        for _ in range(8):
            scores = torch.tanh(scores) * 1.5
        return scores


def _residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def _made(model: nn.Module, spec: str, mesh: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    graphopt.optimize(
        model,
        passes=spec,
        mesh=mesh,
        backend="eager",
        loss=F.cross_entropy,
        optimizer=optimizer,
    )
    return model, optimizer


def _both(model: nn.Module, before: str, steps: int, schedule: str = "1f1b") -> nn.Module:
    """Train on two ranks and in one process; the model on ranks."""
    name = f"partition{{schedule={schedule},microbatches=4%s}}"
    ours, _ = _made(copy.deepcopy(model), f"{before},{name % ''}", "pp=2")
    theirs, _ = _made(model, f"{before},{name % ',stages=2'}", alone())
    for step in range(steps):
        batch = data(step, 16 if step != 1 else 13)
        assert torch.equal(ours.step(*batch), theirs.step(*batch)), (before, step)
    assert not differing(ours, theirs), (before, schedule, differing(ours, theirs))
    assert _same(graphopt.state_dict(ours), graphopt.state_dict(theirs)), (before, schedule)
    return ours


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def _states(model: nn.Module, folder: Path) -> None:
    """Stages that continue from a saved state do what those do that were not interrupted."""
    saved = {"model": model.state_dict(), "kfac": graphopt.state_dict(model)}
    assert any(key.startswith("kfac/solution/") for key in saved["kfac"])
    if dist.get_rank() == 0:
        torch.save(saved, folder / "saved.pt")
    loaded = _loaded(saved, f"{KFAC},partition{{microbatches=4}}", "pp=2")
    assert _same(graphopt.state_dict(loaded), saved["kfac"])
    for step in range(4, 7):
        model.step(*data(step))
        loaded.step(*data(step))
    assert not differing(loaded, model)
    assert _same(graphopt.state_dict(loaded), graphopt.state_dict(model))
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), folder / "continued.pt")


def _loaded(saved: dict[str, Any], spec: str, mesh: Any) -> nn.Module:
    model = _residual()
    model.load_state_dict(saved["model"])
    _made(model, spec, mesh)
    graphopt.load_state_dict(model, saved["kfac"])
    return model


def _other_stages(rank: int, folder: Path) -> None:
    saved = torch.load(folder / "saved.pt")
    three = _loaded(saved, f"{KFAC},partition{{microbatches=4}}", "pp=3")
    one = _loaded(saved, f"{KFAC},partition{{microbatches=4,stages=2}}", alone())
    for step in range(4, 7):
        three.step(*data(step))
        one.step(*data(step))
    continued = torch.load(folder / "continued.pt")
    for model in (three, one):
        assert all(torch.equal(v, continued[n]) for n, v in model.state_dict().items())
    assert _same(graphopt.state_dict(three), graphopt.state_dict(one))


def _two(rank: int, folder: Path) -> None:
    for schedule in ("1f1b", "zero_bubble"):
        model = _both(_residual(), KFAC, 4, schedule)
    _states(model, folder)
    tied = _both(Tied(), KFAC, 3)
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, set(tied.own_state_dict()))
    assert all(parts)
    assert not parts[0] & parts[1]  # a weight has one stage
    one = _both(OneLayer(), KFAC, 3)
    assert bool(one.own_state_dict()) == (rank == 0)
    _both(_residual(), "cleanup,precision{format=bf16,cost=roofline,policy=tf}", 2)


def _interval(rank: int) -> None:
    found = []
    for kind in (OneLayer, _residual):
        for verify in ("eager", "structure"):
            model = kind()
            graphopt.optimize(
                model,
                passes="kfac{damping=0.02,interval=2},partition{microbatches=4}",
                mesh="pp=2",
                backend="eager",
                verify=verify,
                loss=F.cross_entropy,
                optimizer=torch.optim.SGD(model.parameters(), lr=0.05),
            )
            found.append(torch.stack([model.step(*data(step)) for step in range(3)]))
            forms = {f.name: f.result for f in report(model).forms if f.part == "kfac"}
            # A stage without layers has one form of the backward, where the other one has two.
            compares = verify == "eager" and (rank == 0 or kind is _residual)
            assert (forms.get(FORMS) in ("bit-equal", "within tolerance")) == compares, forms
        assert torch.equal(*found[-2:]), (kind, found[-2:])


def test_forms_of_stages_are_compared_without_a_trace(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _interval)


def test_two_stages(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _two, tmp_path)
    on_ranks(tmp_path, 3, _other_stages, tmp_path)


def _grid(rank: int) -> None:
    half = rank // 2  # along dp; along pp neighbours
    for spec in ("partition,group_gradients", "kfac,partition,group_gradients", "kfac,partition"):
        name = spec.replace("kfac", KFAC).replace("partition", "partition{microbatches=2}")
        ours, _ = _made(_residual().double(), name, "dp=2,pp=2")
        whole = name.removesuffix(",group_gradients")
        theirs, _ = _made(
            _residual().double(),
            whole.replace("microbatches=2", "microbatches=4,stages=2"),
            alone(),
        )
        for step in range(3):
            x, y = data(step)
            x = x.double()
            mine = slice(8 * half, 8 * half + 8)
            losses = [torch.zeros(()) for _ in range(4)]
            dist.all_gather(losses, ours.step(x[mine], y[mine]))
            assert torch.allclose(torch.stack(losses).mean(), theirs.step(x, y), rtol=1e-6)
        if "kfac" in spec:  # stages have one list of owners
            division = controller_of(ours).session.part("kfac").division
            owners: list[Any] = [None] * 4
            dist.all_gather_object(owners, division.owners)
            assert all(found == owners[0] for found in owners)
        assert not differing(ours, theirs, tolerance=1e-9), differing(ours, theirs)
        one, other = graphopt.state_dict(ours), graphopt.state_dict(theirs)
        assert other.keys() <= one.keys(), spec
        other.pop("graphopt/format", None)  # it has a checksum of all names
        assert all(torch.allclose(one[k].double(), v.double()) for k, v in other.items()), spec


def test_data_parallel_stages_as_one_process_on_all_data(tmp_path: Path) -> None:
    on_ranks(tmp_path, 4, _grid)
