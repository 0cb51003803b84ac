"""The first step in stages is compared with the whole graph; a fault is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import MismatchError
from graphopt.model.surface import report
from graphopt.runtime.partition import flushed, messages, stage
from graphopt.runtime.partition.engine import PipelineEngine
from graphopt.runtime.partition.stream import Stream
from tests.support.pipelines import Residual, data
from tests.support.ranks import on_ranks

pytestmark = [pytest.mark.distributed]


class Norms(nn.Module):
    """Batch norms and dropout in each half."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU())
        self.b = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU())
        self.c = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of three classes for rows of eight numbers."""
        scores: Tensor = self.c(self.b(self.a(x)))
        return scores


def _model(kind: type[nn.Module] = Residual, schedule: str = "1f1b", **options: Any) -> Any:
    torch.manual_seed(0)
    model = kind()
    options = {"backend": "eager", "mesh": "pp=2"} | options
    before = options.pop("before", "")
    return graphopt.optimize(
        model,
        passes=f"{before}partition{{schedule={schedule},microbatches=4}}",
        loss=F.cross_entropy,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        **options,
    )


def _forms(model: nn.Module) -> dict[str, Any]:
    return {form.name: form for form in report(model).forms if form.part == "partition"}


def _right(rank: int) -> None:
    for schedule in ("1f1b", "zero_bubble", "interleaved"):
        torch.manual_seed(rank)
        model = _model(Norms, schedule)
        model.step(*data(0))
        form = _forms(model)[f"steps in stages, {schedule}"]
        assert form.result in ("bit-equal", "within tolerance"), form
        assert form.times == 1
        model.step(*data(1))
        assert _forms(model)[f"steps in stages, {schedule}"].times == 1
    model.step(*data(2, 18))  # micro-batches of two sizes: a new kind of call
    assert _forms(model)[f"steps in stages, {schedule}"].times == 2
    model = _model(before="cleanup,kfac{damping=0.02},", verify="sample{every=2}")
    for number in range(5):
        model.step(*data(number))
    assert _forms(model)["steps in stages, 1f1b"].times == 3  # the first, the third, the fifth


def test_right_steps(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _right)


def _training_is_as_without(rank: int) -> None:
    found = []
    for verify in ("eager", "structure"):
        model = _model(Norms, verify=verify)
        torch.manual_seed(rank)
        losses = [model.step(*data(number)) for number in range(3)]
        found.append((losses, {n: t.clone() for n, t in model.state_dict().items()}))
    assert not _forms(model)
    (losses, state), (others, same) = found
    assert all(torch.equal(a, b) for a, b in zip(losses, others, strict=True))
    assert all(torch.equal(value, same[name]) for name, value in state.items())


def test_training_has_the_same_bits_without(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _training_is_as_without)


# -- a pipeline that is not drained ----------------------------------------------------------------


def _late(**options: Any) -> Any:
    every = options.pop("every", 1)
    return _model(Norms, f"no_flush,accumulate={every}", **options)


def _right_updates(rank: int) -> None:
    for every in (1, 3):
        torch.manual_seed(rank)
        model = _late(every=every)
        model.step(*data(0, 12))
        model.step(*data(1, 18))  # micro-batches of two sizes
        assert _forms(model)["stages in flight, no_flush"].result != "not run yet"
        assert _forms(model)["a drained pipeline, no_flush"].result == "not run yet"
        model.state_dict()
        model.step(*data(2))
        model.state_dict()
        forms = _forms(model).values()
        assert all(form.times == 1 for form in forms), forms
        assert {form.result for form in forms} <= {"bit-equal", "within tolerance"}, forms
    other = _model(Residual, "no_flush,weights=inconsistent")
    other.step(*data(0))
    other.state_dict()
    assert {form.result for form in _forms(other).values()} == {"not compared"}


def test_right_updates_of_a_pipeline_that_is_not_drained(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _right_updates)


def _steps_and_state(model: Any) -> None:
    model.step(*data(0))
    model.step(*data(1))
    model.state_dict()


def _wrong_drain(rank: int) -> None:
    for name, wrong in (("stages in flight", "_backward"), ("a drained pipeline", "drain")):
        model = _late()
        inside, end, drain = [wrong == "_backward"], Stream._end, Stream.drain

        def more(self: Stream, engine: Any, step: Any, optimizer: Any) -> None:
            if self.stage == 0 and inside[0]:  # noqa: B023
                self._gathered.set({n: g * 1.01 for n, g in self._gathered.take().items()})
            end(self, engine, step, optimizer)  # noqa: B023

        def drained(self: Stream, optimizer: Any) -> Any:
            inside[0] = True  # noqa: B023
            return drain(self, optimizer)  # noqa: B023

        Stream._end, Stream.drain = more, drained  # type: ignore[method-assign]
        try:
            said = f"computes stage 0, on rank 0, wrongly in step .* \\({name}, no_flush\\)"
            with pytest.raises(MismatchError, match=said) as caught:
                _steps_and_state(model)
        finally:
            Stream._end, Stream.drain = end, drain  # type: ignore[method-assign]
        assert caught.value.guilty == "part partition"
        dist.barrier()


def test_faults_of_a_pipeline_that_is_not_drained(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _wrong_drain)


# -- faults ----------------------------------------------------------------------------------------


def _backward_of(number: int) -> Callable[[], Callable[[], None]]:
    """The gradients of the parameters of one stage are a little too large."""

    def put() -> Callable[[], None]:
        made, run = PipelineEngine.stage, stage.Stage.backward
        wrong: list[stage.Stage] = []

        def remember(self: PipelineEngine, which: int) -> stage.Stage:
            found = made(self, which)
            if which == number and found not in wrong:
                wrong.append(found)
            return found

        def backward(self: stage.Stage, *args: Any, **kwargs: Any) -> Any:
            sent, shares, results = run(self, *args, **kwargs)
            if self in wrong:
                results = {s: v * 1.01 if v is not None else v for s, v in results.items()}
            return sent, shares, results

        PipelineEngine.stage, stage.Stage.backward = remember, backward  # type: ignore

        def undo() -> None:
            PipelineEngine.stage, stage.Stage.backward = made, run  # type: ignore

        return undo

    return put


def _a_micro_batch_counts_twice() -> Callable[[], None]:
    """What a drained pipeline has gathered over micro-batches is no mean."""
    run = flushed.run

    def wrong(work: Any, line: Any, tasks: Any) -> Any:
        ending = run(work, line, tasks)
        more = 1 + 1 / len(tasks)
        ending.gradients = {n: g * more for n, g in ending.gradients.items()}
        return ending

    flushed.run = wrong

    def undo() -> None:
        flushed.run = run

    return undo


def _messages_in_another_order() -> Callable[[], None]:
    """Received activations are those of a neighbouring element."""
    arrived = messages.Messages.arrived

    def shifted(self: Any, message: Any) -> dict[str, Tensor]:
        found = arrived(self, message)
        moved = {n for n, v in found.items() if v.dim() > 1 and v.is_floating_point()}
        return {n: v.roll(1, 0) if n in moved else v for n, v in found.items()}

    messages.Messages.arrived = shifted  # type: ignore[method-assign]

    def undo() -> None:
        messages.Messages.arrived = arrived  # type: ignore[method-assign]

    return undo


FAULTS: dict[str, tuple[Callable[[], Callable[[], None]], str]] = {
    "the backward of stage 0": (_backward_of(0), "computes stage 0, on rank 0, wrongly"),
    "the backward of stage 1": (_backward_of(1), "computes stage 1, on rank 1, wrongly"),
    "the drained form": (_a_micro_batch_counts_twice, "computes stage 1, on rank 1, wrongly"),
    "messages": (_messages_in_another_order, "computes stage 1, on rank 1, wrongly"),
}


def _wrong(rank: int) -> None:
    for name, (put, said) in FAULTS.items():
        for schedule in ("zero_bubble",) if name == "messages" else ("1f1b",):
            model = _model(Norms, schedule)
            before = copy.deepcopy(dict(model.named_parameters()) | dict(model.named_buffers()))
            undo = put()
            try:
                with pytest.raises(MismatchError, match=said) as caught:
                    model.step(*data(0))
            finally:
                undo()
            assert caught.value.guilty == "part partition", name
            assert f"in step 1 (steps in stages, {schedule})" in str(caught.value)
            after = dict(model.named_parameters()) | dict(model.named_buffers())
            assert all(torch.equal(before[n], t) for n, t in after.items()), name
            dist.barrier()


def test_faults_of_stages_are_found_and_named(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _wrong)


def _wrong_code(rank: int) -> None:
    """What compiles the stages makes something else of them than eager's kernels."""
    made = PipelineEngine.__init__

    def init(self: Any, module: Any, plan: Any, *args: Any) -> None:
        session, part, whole, compile, visit = args

        def wrong(half: Any) -> Any:
            run = compile(half)
            return lambda given: [_larger(value) for value in run(given)]

        other = replace(plan, backend="other")
        made(self, module, other, session, part, whole, wrong, visit)

    model = _model()
    PipelineEngine.__init__ = init  # type: ignore[method-assign]
    try:
        with pytest.raises(MismatchError, match="backend 'other' computes stage 1") as caught:
            model.step(*data(0))
    finally:
        PipelineEngine.__init__ = made  # type: ignore[method-assign]
    assert caught.value.guilty == "backend other"
    dist.barrier()


def _larger(value: Any) -> Any:
    return value * 1.01 if isinstance(value, Tensor) and value.is_floating_point() else value


def test_a_backend_that_is_wrong_in_stages_is_named(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _wrong_code)
