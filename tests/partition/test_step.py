"""Steps in stages on several ranks have the bits of plain PyTorch over the same micro-batches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.testing.corpus import CORPUS
from tests.support.pipelines import (
    Residual,
    accumulated,
    data,
    differing,
    without_dropout,
)
from tests.support.ranks import in_processes, on_ranks

pytestmark = [pytest.mark.distributed]

SCHEDULES = ("1f1b", "gpipe", "zero_bubble", "interleaved")


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _residual() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


def _schedules(rank: int) -> None:
    for schedule in SCHEDULES:
        plain, model = _residual(), _residual()
        theirs, ours = _sgd(plain), _sgd(model)
        graphopt.optimize(
            model,
            passes=f"partition{{schedule={schedule}}}",
            mesh="pp=2",
            loss=F.cross_entropy,
            optimizer=ours,
        )
        with torch.no_grad():  # before the first training step
            x = data(9, 5)[0]
            assert torch.equal(model(x), plain(x)), schedule
        # The last batch is odd, and its micro-batches have two sizes.
        for step, examples in enumerate((16, 16, 13)):
            x, y = data(step, examples)
            loss = model.step(x, y)
            assert torch.equal(loss, accumulated(plain, F.cross_entropy, theirs, (x, y), 8))
            if step == 1:
                model.eval(), plain.eval()
                with torch.inference_mode():
                    assert torch.equal(model(x), plain(x)), schedule
                model.train(), plain.train()
        assert not differing(model, plain), (schedule, differing(model, plain))


def test_all_schedules(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _schedules)


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def _tokens(*shape: int) -> Tensor:
    return torch.randint(2, 20, shape, generator=torch.Generator().manual_seed(5))


# What makes positional and keyword arguments of a step, and the loss.
CASES: dict[str, tuple[Callable[[], tuple[Any, ...]], Any]] = {
    "resnet": (
        lambda: ((_images(8, 3, 16, 16), torch.arange(8)), {}),
        F.cross_entropy,
    ),
    "unet": (lambda: ((_images(8, 1, 16, 16), _images(8, 2, 32, 32)), {}), F.mse_loss),
    "tied_language_model": (lambda: ((_tokens(8, 7),), {}), None),
    "gpt2": (lambda: ((), {"input_ids": _tokens(8, 7), "labels": _tokens(8, 7)}), None),
    "dict_output": (
        lambda: ((_images(8, 6), _images(8, 2)), {}),
        lambda output, target: F.mse_loss(output["left"], target) + output["right"].abs().mean(),
    ),
    "dataclass_output": (
        lambda: ((_images(8, 6), _images(8, 2)), {}),
        lambda output, target: F.mse_loss(output.left, target) + output.right.abs().mean(),
    ),
    # Stages that read parameters in their backward only, whose gradients others compute.
    "custom_function": (lambda: ((_images(8, 6), _images(8, 2)), {}), F.mse_loss),
    "checkpointed": (lambda: ((_images(8, 8), _images(8, 2)), {}), F.mse_loss),
    # Buffers that are changed in place and assigned to attributes.
    "parametrised": (lambda: ((_images(8, 6), _images(8, 2)), {}), F.mse_loss),
}


def _corpus(rank: int, names: tuple[str, ...], stages: int) -> None:
    for name in names:
        model = without_dropout(CORPUS[name].make()[0])
        plain = copy.deepcopy(model)
        theirs, ours = _sgd(plain), _sgd(model)
        made, loss = CASES[name]
        batch, kwargs = made()
        graphopt.optimize(
            model,
            passes="partition{microbatches=4}",
            mesh=f"pp={stages}",
            loss=loss,
            optimizer=ours,
        )
        for _ in range(2):
            found = model.step(*batch, **kwargs)
            expected = accumulated(plain, loss, theirs, batch, 4, **kwargs)
            assert torch.allclose(found, expected, rtol=1e-6), (name, found, expected)
        tolerance = 1e-6 if name in ("tied_language_model", "gpt2") else 0.0
        assert not differing(model, plain, tolerance=tolerance), (
            name,
            differing(model, plain, tolerance=tolerance),
        )


def test_models_of_the_corpus(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _corpus, tuple(name for name in CASES if name != "gpt2"), 2)


@pytest.mark.corpus
def test_models_of_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    on_ranks(tmp_path, 2, _corpus, ("gpt2",), 2)


def _without_optimizer(rank: int) -> None:
    plain, model = _residual(), _residual()
    graphopt.optimize(model, passes="partition{microbatches=4}", mesh="pp=2", loss=F.cross_entropy)
    accumulated(plain, F.cross_entropy, None, data(0), 4)
    for times in (1, 2):  # gradients add up until the caller takes them
        model.step(*data(0))
        for name in model.own_state_dict():
            assert torch.equal(_grad(model, name), times * _grad(plain, name)), name
    own = {name for name, p in model.named_parameters() if p.grad is not None}
    assert own == set(model.own_state_dict())
    names = [set() for _ in range(2)]
    torch.distributed.all_gather_object(names, own)
    assert names[0] | names[1] == {n for n, _ in model.named_parameters()}
    assert not names[0] & names[1]


def _grad(model: nn.Module, name: str) -> Tensor:
    found = model.get_parameter(name).grad
    assert found is not None
    return found


def _scheduled_and_under_autocast(rank: int) -> None:
    plain, model = _residual(), _residual()
    theirs, ours = _sgd(plain), _sgd(model)
    graphopt.optimize(
        model,
        passes="partition{microbatches=4}",
        mesh="pp=2",
        loss=F.cross_entropy,
        optimizer=ours,
    )
    rates = [torch.optim.lr_scheduler.StepLR(o, 1, 0.5) for o in (theirs, ours)]
    for step in range(3):
        batch = data(step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.step(*batch)
            expected = accumulated(plain, F.cross_entropy, theirs, batch, 4)
        assert torch.equal(loss, expected)
        for rate in rates:
            rate.step()
        if step == 1:
            # Whole on every rank, and each stage's own: together they are the model.
            saved = ours.state_dict()
            assert str(saved) == str(theirs.state_dict())
            parts: list[Any] = [None, None]
            torch.distributed.all_gather_object(parts, model.own_state_dict())
            whole = {**parts[0], **parts[1]}
            assert whole.keys() == plain.state_dict().keys()
            assert all(torch.equal(whole[n], v) for n, v in plain.state_dict().items())
            assert str(model.state_dict()) == str(plain.state_dict())
            ours.load_state_dict(saved)
    assert not differing(model, plain)


def _callers_own(rank: int) -> None:
    _without_optimizer(rank)
    _scheduled_and_under_autocast(rank)


def test_optimizers_schedulers_and_states(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _callers_own)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def _run(model: nn.Module, optimizer: Any, stages: int, steps: range) -> None:
    mesh = {"mesh": f"pp={stages}"} if torch.distributed.is_initialized() else {}
    graphopt.optimize(
        model,
        passes=f"partition{{stages={max(2, stages)},microbatches=4}}",
        loss=F.cross_entropy,
        optimizer=optimizer,
        backend="eager",
        **mesh,
    )
    for step in steps:
        model.step(*data(step))


def _saving(rank: int, file: Path) -> None:
    model = _residual()
    optimizer = _adam(model)
    _run(model, optimizer, 2, range(2))
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if rank == 0:
        torch.save(saved, file)
    for step in range(2, 4):
        model.step(*data(step))
    plain = _residual()
    theirs = _adam(plain)
    for step in range(4):
        accumulated(plain, F.cross_entropy, theirs, data(step), 4)
    assert not differing(model, plain)


def _loading(rank: int, file: Path, stages: int) -> None:
    model = _residual()
    optimizer = _adam(model)
    saved = torch.load(file)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    _run(model, optimizer, stages, range(2, 4))
    plain = _residual()
    theirs = _adam(plain)
    for step in range(4):
        accumulated(plain, F.cross_entropy, theirs, data(step), 4)
    assert not differing(model, plain)
    assert str(optimizer.state_dict()) == str(theirs.state_dict())


def test_a_checkpoint_of_two_stages_under_three_and_in_one_process(tmp_path: Path) -> None:
    file = tmp_path / "saved.pt"
    on_ranks(tmp_path, 2, _saving, file)
    on_ranks(tmp_path, 3, _loading, file, 3)
    in_processes(1, _loading, file, 1)  # where sums have the threads that they have on ranks
