"""A way on after a refusal: plain PyTorch per kind of call, said once."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
import graphopt.compiler.making
import graphopt.model.surface
from graphopt.errors import ArgumentError, CaptureError, MismatchError, RankError
from graphopt.model import kinds
from graphopt.model.controller import controller_of
from tests.support.ranks import on_ranks


class Picky(nn.Module):
    """Cannot be captured in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.tried = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        if not self.training and h.sum() > 1e6:
            return -h
        return h


X = torch.randn(2, 4)


def _said(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "plain PyTorch" in str(w.message)]


def test_error_is_the_default_of_a_first_call() -> None:
    model = graphopt.optimize(Picky(), backend="eager").eval()
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"(?s)h\.sum\(\) > 1e6.*fallback='eager'"):
            model(X)
    model.train()(X)
    assert controller_of(model).made == 1


def test_a_run_that_has_trained_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphopt.optimize(Picky(), backend="eager")
    plain = copy.deepcopy(model)
    graphopt.model.surface.restore(plain)
    model(X).sum().backward()
    plain(X).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(model.eval()(X), plain.eval()(X))
        monkeypatch.setattr(graphopt.compiler.making, "capture", None)  # no second attempt
        assert torch.equal(model(X), plain(X))
    (said,) = _said(caught)
    assert "float32[2, 4] (eval)" in said
    assert "h.sum() > 1e6" in said
    assert caught[0].filename == __file__
    text = model.explain()
    assert "plain PyTorch: x: float32[2, 4] (eval)" in text
    assert "test_fallback.py" in text
    assert "plain PyTorch" in graphopt.Report._repr_html_(controller_of(model).report(model))
    model.train()(X)
    assert controller_of(model).made == 1


def test_a_copy_of_a_trained_model_goes_on_too() -> None:
    """As `update_bn` calls the copy that an `AveragedModel` makes."""
    model = graphopt.optimize(Picky(), backend="eager")
    model(X)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        copy.deepcopy(model).eval()(X)


def test_fallback_eager_from_the_first_call() -> None:
    model = graphopt.optimize(Picky(), backend="eager", fallback="eager").eval()
    with pytest.warns(UserWarning, match="plain PyTorch"):
        model(X).sum().backward()
    assert model.lin.weight.grad is not None


def test_fallback_error_also_later() -> None:
    model = graphopt.optimize(Picky(), backend="eager", fallback="error")
    model(X)
    with pytest.raises(CaptureError):
        model.eval()(X)


def test_a_call_that_raises_in_eager_too_is_not_remembered() -> None:
    model = graphopt.optimize(Picky(), backend="eager", fallback="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            model(torch.randn(2, 5))
    assert "plain PyTorch" not in model.explain()


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MAX_REFUSALS", 3)
    model = graphopt.optimize(Picky(), backend="eager", fallback="eager").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in range(1, 8):
            model(torch.randn(batch, 4))
    assert len(_said(caught)) == 3
    assert "all later calls in this mode" in _said(caught)[-1]
    assert "all later calls in this mode" in model.explain()
    model.train()(X)
    assert controller_of(model).made == 1


@pytest.mark.parametrize("what", ["fallback", "on_mismatch"])
def test_other_values(what: str) -> None:
    with pytest.raises(ArgumentError, match="maybe"):
        graphopt.optimize(nn.Linear(2, 2), **{what: "maybe"})  # type: ignore[call-overload]


# -- a graph that computes something else ----------------------------------------------------------


def _wrong(on_mismatch: str) -> nn.Module:
    from tests.support.stateful_pass import SlightlyWrong

    torch.manual_seed(0)
    return graphopt.optimize(
        Picky(), passes=[SlightlyWrong()], backend="eager", on_mismatch=on_mismatch
    )  # type: ignore[call-overload, no-any-return]


def test_on_mismatch_raise() -> None:
    model = _wrong("raise")
    for _ in range(2):
        with pytest.raises(MismatchError):
            model(X)


def test_on_mismatch_warn_runs_what_is_left() -> None:
    model = _wrong("warn")
    with pytest.warns(
        UserWarning, match=r"(?s)without.*on_mismatch='warn'.*slightly_wrong"
    ) as told:
        model(X)
    assert [one.filename for one in told] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)
    assert controller_of(model).made == 1
    assert "fell back  the graph without pass 'slightly_wrong' runs" in model.explain()


def test_on_mismatch_eager_runs_plain() -> None:
    model = _wrong("eager")
    plain = copy.deepcopy(model)
    graphopt.model.surface.restore(plain)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        assert torch.equal(model(X), plain(X))
    assert "plain PyTorch" in model.explain()


# -- in a job --------------------------------------------------------------------------------------


def _in_a_job(rank: int) -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lin(x)
            return -h if h.sum() > 1e6 else h

    model = graphopt.optimize(Never(), backend="eager", fallback="eager")
    for _ in range(2):
        with pytest.raises(CaptureError, match="unreduced"):
            model(X)
    with torch.no_grad(), pytest.warns(UserWarning, match="plain PyTorch"):
        model(X)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        y = model.eval()(X)
    with pytest.raises(RankError, match="reduced"):
        y.sum().backward()
    model = graphopt.optimize(Never(), passes="cleanup", backend="eager", fallback="eager")
    wrapped = DistributedDataParallel(model)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        wrapped(X * (rank + 1)).sum().backward()  # which reduces them
    both = [torch.zeros(4, 4) for _ in range(2)]
    dist.all_gather(both, model.lin.weight.grad)
    assert torch.equal(*both)


@pytest.mark.distributed
def test_a_plain_training_call_never_leaves_gradients_unreduced(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _in_a_job)
