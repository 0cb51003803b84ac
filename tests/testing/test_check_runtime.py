"""`check_runtime` accepts what is right and says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError
from graphopt.testing import check_runtime
from graphopt.testing.runtime_obligations import OBLIGATIONS
from tests.support.methods import METHODS, write_methods
from tests.support.ranks import forked

KFAC = "kfac{damping=0.01,interval=1}"


@pytest.fixture(autouse=True)
def _methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forked(monkeypatch)
    monkeypatch.syspath_prepend(write_methods(tmp_path / "methods"))


def norm_and_dropout() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Forward mutations and random numbers; micro-batches equal no batch, in eager neither."""
    layers = [nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(48, 2)), (torch.randn(4, 2, 6, 6),)


def tokens() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(nn.Embedding(7, 4), nn.GELU(), nn.Linear(4, 2)), (
        torch.randint(0, 7, (4, 3)),
    )


def test_a_method_that_is_right() -> None:
    check_runtime("right", ranks=False)


@pytest.mark.parametrize("factory", [norm_and_dropout, tokens])
def test_the_model_can_be_given(factory: object) -> None:
    check_runtime(METHODS["right"]["pass"](), model=factory, ranks=False)  # type: ignore[arg-type]


def test_methods_compose() -> None:
    check_runtime(f"right,{KFAC}", ranks=False)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("spec", ["group_gradients{link=10gbe,wire=int32}", KFAC])
def test_methods_that_are_right_on_two_ranks(spec: str) -> None:
    check_runtime(spec)


WRONG = [
    (
        "changes_in_forward",
        "only-finish-changes-state",
        "StateError: the runtime part of 'changes_in_forward' changed its state "
        "'changes_in_forward/calls' outside of `finish`",
    ),
    ("changes_another", "only-finish-changes-state", "the runtime part of 'right' changed"),
    ("counts_trials", "trials-leave-no-trace", "after trials between its steps, training gave"),
    ("forgets_to_save", "resume-is-bit-equal", "a run that was saved and loaded has another"),
    (
        "shares_with_copies",
        "copies-are-independent",
        "steps of a copy changed state 'shares_with_copies/steps' of the original",
    ),
    (
        "divides_micro_batches",
        "no-sync-only-accumulates",
        "within no_sync the gradient of '0.weight' is off by 0.5 from what was accumulated",
    ),
    (
        "counts_micro_batches",
        "accumulation-equals-one-batch",
        "after steps of 2 micro-batches parameter",
    ),
]


@pytest.mark.parametrize(("name", "obligation", "sentence"), WRONG)
def test_methods_that_are_wrong(name: str, obligation: str, sentence: str) -> None:
    with pytest.raises(AssertionError) as failure:
        check_runtime(name, ranks=False)
    message = str(failure.value)
    assert message.startswith(f"{name!r} fails {obligation!r}: ")
    assert sentence in message
    assert "\n" not in message


@pytest.mark.slow
@pytest.mark.distributed
def test_a_method_that_is_only_wrong_on_several_ranks() -> None:
    with pytest.raises(AssertionError) as failure:
        check_runtime("is_alone")  # on one rank first
    message = str(failure.value)
    assert "'is_alone,group_gradients' fails 'ranks-stay-equal' on rank " in message
    assert "after 4 steps parameter '0.bias' of rank 1 is not rank 0's" in message


def test_every_obligation_has_a_method_that_violates_it() -> None:
    assert set(OBLIGATIONS) == {case[1] for case in WRONG} | {"ranks-stay-equal"}


def test_nothing_to_prove() -> None:
    with pytest.raises(AssertionError, match="no pass of 'cleanup' left a plan part, so nothing"):
        check_runtime("cleanup", ranks=False)


def test_a_model_that_other_processes_cannot_find() -> None:
    with pytest.raises(ArgumentError, match="cannot be sent to another process"):
        check_runtime("right", model=lambda: tokens())
