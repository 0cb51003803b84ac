"""Runs in files: resumed bit by bit, whole or not at all, by one process and by ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
from graphopt.errors import StateError
from graphopt.model import saving
from tests.support.ranks import on_ranks

SPEC = "cleanup,kfac{interval=2,solver=eigen}"


def _made(spec: str | None = SPEC, width: int = 8) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, 3))
    model[2].bias = nn.Parameter(torch.zeros(3))  # type: ignore[index, union-attr, assignment]
    if spec is not None:
        graphopt.optimize(model, passes=spec, backend="eager")
    return model, torch.optim.Adam(model.parameters(), lr=0.01)


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = {
        f"{i}/{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()
    }
    return {**model.state_dict(), **graphopt.state_dict(model), **state}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    straight, resumed = _made(), _made()
    _train(*straight, range(3))
    file = tmp_path / "run"
    graphopt.save(file, *straight, {"epoch": 3, 5: [torch.arange(2), (1.5, None, True, "x")]})
    extra = graphopt.load(file, *resumed)
    assert extra["epoch"] == 3
    assert extra[5][0].tolist() == [0, 1]
    assert extra[5][1] == (1.5, None, True, "x")
    assert _equal(_everything(*straight), _everything(*resumed))
    for run in (straight, resumed):
        _train(*run, range(3, 7))
    assert _equal(_everything(*straight), _everything(*resumed))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_plain_model_with_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    graphopt.save(tmp_path / "run", model)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    assert graphopt.load(tmp_path / "run", other) is None
    assert _equal(model.state_dict(), other.state_dict())


def test_a_crash_while_saving_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = _made()
    _train(*run, range(1))
    graphopt.save(tmp_path / "run", *run)
    before = (tmp_path / "run").read_bytes()
    _train(*run, range(1, 2))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saving.shards, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        graphopt.save(tmp_path / "run", *run)
    assert (tmp_path / "run").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def _other_width() -> Any:
    return _made(width=9)


def _other_kind() -> Any:
    model, _ = _made()
    return model, torch.optim.RMSprop(model.parameters())


def _other_optimizer() -> Any:
    model, _ = _made()
    return model, torch.optim.SGD([*model.parameters()][:2], lr=0.1)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (_other_width, r"'0.bias' is float32\[8\] in the file and float32\[9\] in the model"),
        (_other_optimizer, "is of another optimizer: "),
        (_other_kind, "is of another optimizer: it has no 'momentum', which RMSprop needs"),
        (lambda: (_made()[0], None), "has a state of an optimizer, and none is given"),
        (lambda: _made("cleanup"), "and no pass of this model is called 'kfac'"),
        (lambda: _made(None), "the model is not optimized"),
    ],
)
def test_another_run_is_refused_and_nothing_changes(other: Any, said: str, tmp_path: Path) -> None:
    run = _made()
    _train(*run, range(2))
    graphopt.save(tmp_path / "run", *run)
    model, optimizer = other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(StateError, match=said):
        graphopt.load(tmp_path / "run", model, optimizer)
    assert _equal(before, model.state_dict())
    assert graphopt.state_dict(model) == {}


@pytest.mark.parametrize("damage", ["a bit", "half", "empty", "nothing"])
def test_a_damaged_file_is_refused(damage: str, tmp_path: Path) -> None:
    run = _made()
    _train(*run, range(2))
    file = tmp_path / "run"
    graphopt.save(file, *run)
    data = bytearray(file.read_bytes())
    if damage == "a bit":
        data[-5] ^= 4
    file.write_bytes(data[: {"half": len(data) // 2, "empty": 0}.get(damage, len(data))])
    if damage == "nothing":
        file.unlink()
    before = _everything(*run)
    with pytest.raises(StateError, match=r"is damaged, or was not|there is no file"):
        graphopt.load(file, *run)
    assert _equal(before, _everything(*run))


def test_what_a_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"extra\.f is a builtin_function_or_method"):
        graphopt.save(tmp_path / "run", nn.Linear(2, 2), extra={"f": print})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["no folder", "a folder", "a file as folder"])
def test_where_nothing_can_be_written(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / {"no folder": "no/run", "a folder": "", "a file as folder": "file/run"}[kind]
    said = "is a folder" if kind == "a folder" else r"cannot be written: .*\n  try: look whether"
    with pytest.raises(StateError, match=said):
        graphopt.save(path, nn.Linear(2, 2))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


class Counted(nn.Linear):
    """Saves something that is no tensor."""

    steps = 0

    def get_extra_state(self) -> Any:
        return {"steps": self.steps, "mean": torch.ones(2) * self.steps}

    def set_extra_state(self, state: Any) -> None:
        assert torch.equal(state["mean"], torch.ones(2) * state["steps"])
        self.steps = state["steps"]


def test_a_module_with_a_state_of_its_own(tmp_path: Path) -> None:
    model = Counted(2, 2)
    model.steps = 5
    graphopt.save(tmp_path / "run", model)
    other = Counted(2, 2)
    graphopt.load(tmp_path / "run", other)
    assert other.steps == 5
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(StateError, match="the file has '_extra_state', which the model lacks"):
        graphopt.load(tmp_path / "run", nn.Linear(2, 2))


def _of_ranks(rank: int, folder: str) -> None:
    spec = "cleanup,kfac{interval=2},group_gradients"
    run = _made(spec)
    _train(*run, range(3))
    for _ in range(2):  # the second one takes the place of the first
        graphopt.save(Path(folder, "run"), *run, {"rank": "all"})
    other = _made(spec)
    assert graphopt.load(Path(folder, "run"), *other) == {"rank": "all"}
    for each in (run, other):
        _train(*each, range(3, 6))
    assert _equal(_everything(*run), _everything(*other))
    dist.barrier()
    if rank == 0:
        assert [p.name for p in Path(folder).iterdir()] == ["run"]


@pytest.mark.distributed
def test_ranks_save_their_shares_and_one_process_resumes(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    folder.mkdir()
    on_ranks(tmp_path, 2, _of_ranks, str(folder))
    files = sorted(p.name for p in (folder / "run").glob("*.safetensors"))
    assert len(files) == 2
    alone = _made("cleanup,kfac{interval=2},group_gradients")
    graphopt.load(folder / "run", *alone)
    _train(*alone, range(3, 5))
    damaged = folder / "run" / files[1]
    damaged.unlink()
    with pytest.raises(StateError, match="tensors are missing, or others than were written"):
        graphopt.load(folder / "run", *alone)
