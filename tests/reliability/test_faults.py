"""Faults in passes, backends and runtime parts are found and named, at once or by sampling."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt.errors import MismatchError
from graphopt.model.surface import report
from tests.support import faults
from tests.support.faults import Faulty, Net, place
from tests.support.ranks import on_ranks

LINK = "group_gradients{link=10gbe%s}"
# Where faults are put in.
PLACES = (
    *("group_gradients.exact", "group_gradients.messages", "group_gradients.reducing"),
    *("kfac.statistics", "ranks.channel.Channel"),
)


def _model(passes: Any, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return graphopt.optimize(Net(), passes=passes, **{"backend": "eager", **options})


def _train(model: nn.Module, steps: int = 1, micro_batches: int = 1) -> None:
    for _ in range(steps):
        model.zero_grad()
        for _ in range(micro_batches - 1):
            with model.no_sync():  # type: ignore[operator]
                model(torch.randn(16, 8)).square().mean().backward()
        model(torch.randn(16, 8)).square().mean().backward()


def _train_and_evaluate(model: nn.Module) -> None:
    _train(model)
    with torch.no_grad():
        model.eval()(torch.randn(16, 8))


# -- one process -----------------------------------------------------------------------------------


# Whatever is wrong on the first batch, and for exact passes whatever is wrong on large values.
@pytest.mark.parametrize(
    ("fault", "level"),
    [
        *((name, "joint") for name in faults.FAULTS if name != "late"),
        *((name, "inference") for name in ("wrong_output", "large_values")),
    ],
)
def test_a_wrong_pass_is_named_at_the_first_call(fault: str, level: str) -> None:
    model = _model([*graphopt.Pipeline.parse("cleanup").passes, Faulty(fault, level)])
    with pytest.raises(MismatchError, match="pass 'faulty'") as told:
        _train_and_evaluate(model)
    assert told.value.guilty == "pass faulty"
    assert model.training is (level == "joint")


@pytest.mark.parametrize("backend", ["wrong_forward", "wrong_backward"])
def test_a_wrong_backend_is_named_at_the_first_call(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults.with_backends(monkeypatch.setattr)
    with pytest.raises(MismatchError, match=f"backend {backend!r} computes") as told:
        _train(_model("cleanup", backend=backend))
    assert told.value.guilty == f"backend {backend}"


def test_a_wrong_form_without_statistics_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = place("kfac.statistics")
    # Only the form without statistics lacks outputs.
    monkeypatch.setattr(statistics, "keeping", faults.swap_in(statistics.keeping))
    model = _model("cleanup,kfac{interval=2}")
    _train(model)
    with pytest.raises(MismatchError, match="runtime part 'kfac' differ in step 2") as told:
        _train(model)
    assert told.value.guilty == "part kfac"


def test_a_wrong_form_without_statistics_runs_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = place("kfac.statistics")
    right = _model("cleanup,kfac{interval=2}")
    monkeypatch.setattr(statistics, "keeping", faults.swap_in(statistics.keeping))
    model = _model("cleanup,kfac{interval=2}", on_mismatch="warn")
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="the form of kfac that computes more runs") as told:
        _train(model, 4)
    assert {one.filename for one in told} == {__file__}
    monkeypatch.undo()
    torch.manual_seed(1)
    _train(right, 4)
    for mine, theirs in zip(model.parameters(), right.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    assert "MISMATCH   kfac" in model.explain()


# What is wrong only after a while: on large values, where a pass may round, and after many calls.
@pytest.mark.parametrize("fault", ["large_values", "late"])
def test_a_pass_that_is_wrong_later_is_found_by_sampling(fault: str) -> None:
    faults.CALLS[0] = 0
    model = _model([Faulty(fault, promise="lowered")], verify="sample{every=4}")
    _train(model, 4)
    if fault == "large_values":
        model.bn.weight.data.fill_(500.0)  # type: ignore[union-attr]
    with pytest.raises(MismatchError, match=r"pass 'faulty' .*, in step \d+") as told:
        _train(model, 24)
    assert told.value.guilty == "pass faulty"


def test_what_is_found_later_runs_no_more() -> None:
    faults.CALLS[0] = 0
    model = _model(
        [Faulty("late", promise="lowered")], verify="sample{every=4}", on_mismatch="warn"
    )
    with pytest.warns(UserWarning, match="without pass 'faulty' runs from now on") as told:
        _train(model, 24)
    assert [one.filename for one in told] == [__file__]
    torch.manual_seed(3)
    x = torch.randn(16, 8)
    model.zero_grad()
    model(x).square().mean().backward()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    plain(x).square().mean().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)  # type: ignore[arg-type]
    (entry,) = report(model).specialisations
    assert not entry.plan.spec
    assert "fell back  the graph without pass 'faulty'" in model.explain()


# -- ranks -----------------------------------------------------------------------------------------


def _patched(what: str) -> None:
    """Break one thing of the runtime in this process, for good."""
    exact, messages, reducing, statistics, Channel = map(place, PLACES)
    if what == "buckets":  # two gradients come out of their message at each other's places
        reducing.reducing = faults.swap_in(reducing.reducing)
    elif what == "accumulating":
        made = reducing.accumulating
        reducing.accumulating = lambda half, scale, key: made(half, 2 * scale, key)
    elif what == "integers":
        reduce = exact.reduce
        exact.reduce = lambda m, g, b: {n: 1.01 * t for n, t in reduce(m, g, b).items()}
    elif what == "statistics":
        statistics.keeping = faults.swap_in(statistics.keeping)
    elif what == "delayed":
        history = messages.History.exchange
        messages.History.exchange = lambda self, mode, sizes, fresh, *rest: history(
            self, mode, sizes, 1.01 * fresh, *rest
        )
    elif what in ("transport", "transport on rank 1", "transport, later"):
        start = Channel.start
        sent = [0]

        def wrong(self: Any, tensor: Any, options: Any = None) -> Any:
            sent[0] += 1
            work = start(self, tensor, options)
            work.wait()
            here = what != "transport on rank 1" or dist.get_rank() == 1
            late = what == "transport, later" and sent[0] <= 7
            if here and not late:
                tensor[: tensor.numel() // 2] *= 1.1
            return work

        Channel.start = wrong  # type: ignore[method-assign]


# fault, passes, options, steps, micro-batches, what the error says
JOBS: dict[str, tuple[str, dict[str, Any], int, int, str]] = {
    "buckets": (LINK % "", {}, 1, 1, "part group_gradients"),
    "accumulating": (LINK % "", {}, 1, 2, "part group_gradients"),
    "integers": (LINK % ",wire=int32", {}, 1, 2, "part group_gradients"),
    "statistics": (f"kfac{{interval=2}},{LINK % ''}", {}, 2, 1, "part kfac"),
    "delayed": (LINK % ",stale=lag", {}, 3, 1, "part group_gradients"),
    "transport": (LINK % ",wire=bf16", {}, 1, 1, "part group_gradients"),
    "transport on rank 1": (LINK % "", {}, 1, 1, "part group_gradients"),
    "transport, later": (LINK % "", {"verify": "sample{every=4}"}, 16, 1, "part group_gradients"),
    "backend": (LINK % "", {"backend": "wrong_reducing"}, 1, 1, "backend wrong_reducing"),
}


def _job(rank: int) -> None:
    """All faults, one after the other, in one process: each is undone before the next."""
    faults.with_backends(setattr)
    for name, (passes, options, steps, micro_batches, guilty) in JOBS.items():
        with _undone():
            _patched(name)
            model = _model(passes, **options)
            torch.manual_seed(1 + rank)
            with pytest.raises(MismatchError) as told:
                _train(model, steps, micro_batches=micro_batches)
            assert told.value.guilty == guilty, (name, told.value)
            if name == "transport on rank 1":
                assert "on rank 1 " in told.value.message
        dist.barrier()


class _undone:
    """Within, modules may be patched."""

    def __enter__(self) -> None:
        places = [*map(place, PLACES), place("group_gradients.messages.History")]
        self._before = [(one, dict(vars(one))) for one in places]

    def __exit__(self, *_: object) -> None:
        for one, before in self._before:
            for name, value in before.items():
                if vars(one).get(name) is not value:
                    setattr(one, name, value)


@pytest.mark.distributed
def test_faults_of_the_runtime_are_named_on_all_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _job)


def _one_wrong_rank(rank: int) -> None:
    passes = graphopt.Pipeline.parse(LINK % "").passes
    model = _model([Faulty("scaled_gradient", only=1), *passes])
    with pytest.raises(MismatchError, match="pass 'faulty'") as told:
        _train(model)
    assert told.value.message.startswith("on rank 1, ")
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.distributed
def test_a_pass_that_is_wrong_on_one_rank_ends_all(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _one_wrong_rank)


def _falls_back(rank: int) -> None:
    right = _model(LINK % "")
    with _undone():
        _patched("buckets")
        model = _model(LINK % "", on_mismatch="warn")
        torch.manual_seed(1 + rank)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            _train(model, 3)
        assert len([w for w in told if "reduced on its own" in str(w.message)]) == 1
    torch.manual_seed(1 + rank)
    _train(right, 3)
    for mine, theirs in zip(model.parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert "MISMATCH   group_gradients, reducing" in model.explain()


def _falls_back_together(rank: int) -> None:
    """One rank's fault, found in step 5, takes the pass from both."""
    faults.CALLS[0] = 0 if rank else -1000
    passes = [Faulty("late", promise="lowered"), *graphopt.Pipeline.parse(LINK % "").passes]
    model = _model(passes, verify="sample{every=4}", on_mismatch="warn")
    torch.manual_seed(1 + rank)
    with pytest.warns(UserWarning, match="without pass 'faulty'"):
        _train(model, 20)
    (entry,) = report(model).specialisations
    assert "faulty" not in entry.plan.spec
    assert "group_gradients" in entry.plan.spec


def _fallbacks(rank: int) -> None:
    _falls_back(rank)
    _falls_back_together(rank)


@pytest.mark.distributed
def test_ranks_fall_back_together(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _fallbacks)
