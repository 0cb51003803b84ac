"""Trainers of other packages come to the same with graphopt as without it, to the last bit."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import ArgumentError
from graphopt.examples.trainers import (
    accelerate_loop,
    hf_trainer,
    lightning_trainer,
    peft_lora,
)
from graphopt.examples.trainers.beside import Run
from graphopt.model.surface import report
from tests.support.ranks import on_ranks


def equal(plain: Run, ours: Run) -> None:
    """All of it, by graphs: no call has run plain, and nothing else was said."""
    assert len(plain.losses) > 1
    assert plain.losses == ours.losses
    assert plain.weights == ours.weights
    assert plain.beside == ours.beside
    found = report(ours.model)
    assert found.specialisations
    assert not found.plain


@pytest.mark.parametrize("case", hf_trainer.CASES)
def test_hugging_face(case: str, tmp_path: Path) -> None:
    options = hf_trainer.CASES[case]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(graphopt|captured|plain PyTorch).*")
        runs = [hf_trainer.train(own, tmp_path / str(own), **options) for own in (False, True)]
    equal(*runs)
    if options.get("sample"):
        _, ours = runs
        # Steps of training; two sizes of batches; prompts of two lengths and steps with two caches.
        assert len(report(ours.model).specialisations) <= 7
        assert not report(ours.model).notes
    if case.startswith("checkpointing"):
        assert runs[0].losses == hf_trainer.train(False, tmp_path / "kept").losses


def test_hugging_face_resumes(tmp_path: Path) -> None:
    whole = hf_trainer.train(True, tmp_path)
    again = hf_trainer.resumed(True, tmp_path)
    equal(whole, again)


@pytest.mark.parametrize("case", lightning_trainer.CASES)
def test_lightning(case: str, tmp_path: Path) -> None:
    options = lightning_trainer.CASES[case]
    runs = [lightning_trainer.train(own, tmp_path / str(own), **options) for own in (False, True)]
    equal(*runs)


def test_lightning_resumes(tmp_path: Path) -> None:
    runs = [lightning_trainer.resumed(own, tmp_path / str(own)) for own in (False, True)]
    equal(*runs)


def _rank(rank: int, folder: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "GROUP_RANK")
    os.environ |= {**dict.fromkeys(names, str(rank)), "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(DistributedDataParallel|reduced).*")
        none, inside, instead = (
            lightning_trainer.rank(how, folder / how) for how in ("none", "inside", "instead")
        )
    equal(none, inside)
    equal(none, instead)  # of two ranks: a + b is b + a
    assert report(inside.model).notes == (
        "gradients are reduced by DistributedDataParallel, which is around the model",
    )
    assert report(instead.model).spec == "cleanup,schedule,group_gradients"
    assert not [note for note in report(instead.model).notes if "Distributed" in note]


@pytest.mark.distributed
def test_lightning_on_two_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _rank, tmp_path)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("case", accelerate_loop.CASES)
def test_accelerate(case: str, when: Any, tmp_path: Path) -> None:
    options = accelerate_loop.CASES[case]
    runs = [
        accelerate_loop.train(own, tmp_path / str(own), when=when, **options)
        for own in (False, True)
    ]
    equal(*runs)
    assert [run.beside for run in runs] == [(True,), (True,)]  # the state brought it back


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when: Any) -> None:
    plain, ours = (peft_lora.train(own, when=when) for own in (False, True))
    equal(plain, ours)
    *_, on, off, again, merged = plain.losses
    assert on == again != off
    assert merged == pytest.approx(on, abs=1e-6)


# -- misuse ----------------------------------------------------------------------------------------


def _accelerated(model: nn.Module) -> nn.Module:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(model)


def test_before_and_after_prepare_is_refused() -> None:
    model = _accelerated(graphopt.optimize(accelerate_loop.net(), backend="eager"))
    with pytest.raises(ArgumentError) as caught:
        graphopt.optimize(model, backend="eager")
    assert caught.value.message == (
        "the forward of this optimized model was replaced on the instance, so it cannot be "
        "optimized again"
    )
    assert caught.value.hint == "optimize first and wrap forward afterwards, or remove the wrapper"
    assert model(torch.randn(2, 64)).dtype is torch.float32  # as it was


def test_optimized_twice_is_optimized_once() -> None:
    model = accelerate_loop.net()
    for _ in range(2):
        graphopt.optimize(model, backend="eager")
    model(torch.randn(2, 64)).sum().backward()
    assert len(report(model).specialisations) == 1


def test_a_lightning_module_without_forward_is_refused() -> None:
    with pytest.raises(ArgumentError) as caught:
        graphopt.optimize(lightning_trainer.Digits())
    assert caught.value.message == "Digits has no forward, so there is nothing to optimize"
    assert caught.value.hint == "optimize the networks in it: graphopt.optimize(model.net)"


def test_taking_off_the_precision_of_accelerate() -> None:
    from accelerate.utils import extract_model_from_parallel

    model = _accelerated(accelerate_loop.net().eval())
    graphopt.optimize(model, backend="eager")
    model(torch.randn(2, 64))
    bare = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    x = torch.randn(2, 64)
    assert torch.equal(bare(x), nn.Sequential(*bare)(x))
