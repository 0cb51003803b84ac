"""What a step on several ranks refuses: on all of them, before anything was sent or changed."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import ArgumentError, RankError
from tests.support.pipelines import Residual, accumulated, data, differing
from tests.support.ranks import on_ranks

pytestmark = [pytest.mark.distributed]

Loss = Callable[[Any, Any], Any]


def _residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _made(
    model: nn.Module,
    loss: Loss | None = F.cross_entropy,
    options: str = "microbatches=4",
    mesh: str | None = "pp=2",
) -> Any:
    return graphopt.optimize(
        model,
        passes=f"partition{{{options}}}",
        mesh=mesh,
        backend="eager",
        loss=loss,
        optimizer=_sgd(model),
    )


class Keeping(nn.Module):
    """Keeps what it has computed, in a way that is chosen."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)
        self.how = how
        self.seen: list[Tensor] = []
        self.steps = 0
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        """Scores of three classes for rows of eight numbers."""
        h = torch.tanh(self.first(x))
        if self.how == "attribute":
            self.last = h
        if self.how == "list":
            self.seen.append(h)
        if self.how == "counter":
            self.steps += 1
        scores = self.second(h)
        if self.how == "sizes":
            return scores, scores.detach().nonzero()
        return scores


def _contrastive(output: Tensor, target: Tensor) -> Tensor:
    normal = F.normalize(output)
    return F.cross_entropy(normal @ normal.T, torch.arange(len(output)))


def _refused_losses() -> dict[str, Loss | None]:
    return {
        "needs the whole batch at once": _contrastive,
        "does not depend on what the model computes": lambda o, t: F.cross_entropy(o.detach(), t),
        "is not one number": lambda o, t: F.cross_entropy(o, t, reduction="none"),
        "the loss has shape [4, 3]": None,
    }


def _arguments(rank: int) -> None:
    x, y = data(0)
    for words, loss in _refused_losses().items():
        model = _made(_residual(), loss)
        with pytest.raises(ArgumentError) as caught:
            model.step(*((x,) if loss is None else (x, y)))
        assert words in str(caught.value), str(caught.value)
        assert not differing(model, _residual())
        assert all(p.grad is None for p in model.parameters())

    model = _made(_residual())
    cases: list[tuple[str, tuple[Any, ...]]] = [
        ("needs inputs and a target", (x,)),
        ("no tensor with examples", (3, "y")),
        ("cannot be divided among micro-batches", (x, torch.tensor(1))),
        ("requires a gradient", (x.clone().requires_grad_(), y)),
    ]
    for words, batch in cases:
        with pytest.raises(ArgumentError, match=words):
            model.step(*batch)
    model.step(x, y)  # as if nothing had happened
    plain = _residual()
    accumulated(plain, F.cross_entropy, _sgd(plain), (x, y), 4)
    assert not differing(model, plain)

    with pytest.raises(ArgumentError, match=r"called to train.*several ranks"):
        model(x)
    other = copy.deepcopy(model)
    with pytest.raises(ArgumentError, match="is a copy"):
        other.step(x, y)

    interleaved = _made(_residual(), options="schedule=interleaved,microbatches=4")
    with pytest.raises(ArgumentError, match="1 examples has fewer micro-batches than the 2 ranks"):
        interleaved.step(x[:1], y[:1])
    interleaved.step(x, y)


def _models(rank: int) -> None:
    x, y = data(0)
    for how, words in {
        "attribute": "forward keeps tensors or numbers in self.last",
        "list": "forward keeps tensors or numbers in self.seen",
        "counter": "forward keeps tensors or numbers in self.steps",
        "sizes": "output 1 of the model is a number or has a size that depends on data",
    }.items():
        model = _made(
            Keeping(how), lambda o, t: F.cross_entropy(o[0] if type(o) is tuple else o, t)
        )
        with pytest.raises(ArgumentError) as caught:
            model.step(x, y)
        assert words in str(caught.value), str(caught.value)

    with pytest.raises(ArgumentError, match="stages"):
        _made(nn.Sequential(nn.Linear(8, 3)), options="microbatches=4").step(x, y)
    with pytest.raises(ArgumentError, match="bytes"):
        _made(_residual(), options="memory=1000").step(x, y)

    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)]
    normed = _made(nn.Sequential(*layers), options="microbatches=16")
    with pytest.warns(UserWarning, match=r"'1' take mean and variance of 1 example, where .* 16"):
        normed.step(x[:, None], y)


def test_arguments(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _arguments)


def test_models(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _models)


def _unequal(rank: int) -> None:
    x, y = data(rank)
    with pytest.raises(RankError, match="the batches differ"):
        _made(_residual()).step(x, y)
    x, y = data(0, 16 - rank)
    with pytest.raises(RankError, match=r"batches differ.*\[16, 8\].*\[15, 8\]"):
        _made(_residual()).step(x, y)


def test_unequal_batches(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _unequal)


@pytest.mark.parametrize(
    "spec", ["precision{format=fp16,cost=roofline,policy=tf},%s", "flexpoint,%s"]
)
def test_methods_that_need_the_whole_step(spec: str) -> None:
    model = _residual()
    graphopt.optimize(
        model, passes=spec % "partition{stages=2}", backend="eager", loss=F.cross_entropy
    )
    with pytest.raises(ArgumentError, match="cannot work in stages: its"):
        model.step(*data(0))


def test_arguments_of_optimize() -> None:
    model = _residual()
    with pytest.raises(ArgumentError, match="loss is given, and no pass of 'cleanup' runs whole"):
        graphopt.optimize(model, passes="cleanup", loss=F.cross_entropy)
    with pytest.raises(ArgumentError, match="group 0 of the optimizer has a parameter that is not"):
        graphopt.optimize(
            model, passes="partition{stages=2}", loss=F.cross_entropy, optimizer=_sgd(_residual())
        )
    assert "forward" not in vars(model)


# -- a rank that is gone ---------------------------------------------------------------------------


def _killed(rank: int, folder: Path) -> None:
    calls = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if output.stride() != (0, 0) and calls.count(1) > 100:
            os._exit(0)
        return F.cross_entropy(output, target)

    model = _residual()
    optimizer = _sgd(model)
    graphopt.optimize(
        model,
        passes="partition{microbatches=4}",
        mesh="pp=3",
        backend="eager",
        loss=loss,
        optimizer=optimizer,
    )
    model.step(*data(0))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if rank == 0:
        torch.save(saved, folder / "saved.pt")
    calls.extend([1] * 99)  # the second micro-batch from here is the last one of this rank
    with pytest.raises(RankError) as caught:
        model.step(*data(1))
    (folder / f"error{rank}").write_text(str(caught.value))
    with pytest.raises(RankError, match="an earlier step was interrupted: the"):
        model.step(*data(1))
    with pytest.raises(RankError, match="own_state_dict"):
        model.state_dict()
    assert ("a.weight" in model.own_state_dict()) == (rank == 0)
    os._exit(0)


def _restarted(rank: int, folder: Path) -> None:
    saved = torch.load(folder / "saved.pt")
    model = _residual()
    optimizer = _sgd(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    graphopt.optimize(
        model,
        passes="partition{microbatches=4}",
        mesh="pp=3",
        backend="eager",
        loss=F.cross_entropy,
        optimizer=optimizer,
    )
    plain = _residual()
    theirs = _sgd(plain)
    for step in range(3):
        if step:
            model.step(*data(step))
        accumulated(plain, F.cross_entropy, theirs, data(step), 4)
    assert not differing(model, plain)


def test_a_rank_that_is_gone_and_a_new_start(tmp_path: Path) -> None:
    on_ranks(tmp_path, 3, _killed, tmp_path)
    first, second = ((tmp_path / f"error{rank}").read_text() for rank in (0, 1))
    lost = r"the \w+ of micro-batch \d from stage \d to stage \d did not arrive"
    assert re.search(f"{lost}: rank 2 did not answer", second), second
    assert re.search(f"{lost}: rank 2 did not answer, for which rank 1 waits", first), first
    assert not (tmp_path / "error2").exists()
    on_ranks(tmp_path, 3, _restarted, tmp_path)
