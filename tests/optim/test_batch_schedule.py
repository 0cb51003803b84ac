"""Batches that follow the noise scale or double by the clock; bounds, records, states."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.optim import BatchSchedule, Change
from graphopt.optim.batch_rules import Rounding, doubled, follow


class Gaussian(nn.Module):
    """The gradient of its loss on an example is that example: any noise can be given to it."""

    def __init__(self, size: int = 20) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, examples: Tensor) -> Tensor:
        return (examples @ self.weight).mean()


def loader(count: int, size: int = 4, mean: float = 0.1, seed: int = 0) -> list[Tensor]:
    """Micro-batches of normal examples with a noise scale of 1 / mean^2."""
    random = torch.Generator().manual_seed(seed)
    return [mean + torch.randn(size, 20, generator=random) for _ in range(count)]


def go(schedule: BatchSchedule, batches: Any) -> list[int]:
    """One epoch; micro-batches in each step."""
    model = schedule.model
    found = []
    for step in schedule.steps(batches):
        model.zero_grad()
        for examples in step:
            step.backward(model(examples))
        found.append(len(step))
    return found


def knows(values: list[float | None]) -> Callable[[], float | None]:
    """A noise scale that is told: one value per step, the last one for good."""
    rest = iter(values)
    last = [values[-1]]
    return lambda: next(rest, last[0])


# -- the rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "wanted", "rounding", "expected"),
    [
        (4, 4.0, "powers", 4),
        (4, 7.9, "powers", 4),  # twice the size is not reached
        (4, 8.0, "powers", 8),
        (4, 100.0, "powers", 64),
        (8, 5.4, "powers", 8),  # above 8 / 1.5
        (8, 5.3, "powers", 4),
        (8, 0.0, "powers", 1),
        (8, math.inf, "powers", 2**31),
        (5, 7.4, "whole", 5),
        (5, 7.5, "whole", 7),
        (7, 4.7, "whole", 7),
        (7, 4.6, "whole", 4),
        (3, 0.0, "whole", 1),
    ],
)
def test_the_size_follows_with_hysteresis(
    now: int, wanted: float, rounding: Rounding, expected: int
) -> None:
    assert follow(now, wanted, hysteresis=1.5, rounding=rounding) == expected


@pytest.mark.parametrize("rounding", ["powers", "whole"])
def test_a_noise_scale_that_fluctuates_does_not_make_the_size_flutter(rounding: Rounding) -> None:
    random = torch.Generator().manual_seed(0)
    for center in (3.0, 7.9, 8.0, 8.1, 11.3, 16.0):
        now, changes = 4, []
        for _ in range(500):
            wanted = center * (1 + 0.15 * (2 * torch.rand((), generator=random).item() - 1))
            after = follow(now, wanted, hysteresis=1.5, rounding=rounding)
            changes += [after] if after != now else []
            now = after
        assert len(changes) <= 2, (center, changes)


def test_doubling_by_the_clock() -> None:
    assert [doubled(2, epoch, 3) for epoch in range(9)] == [2, 2, 2, 4, 4, 4, 8, 8, 8]


# -- schedules -------------------------------------------------------------------------------------


def test_adabatch_doubles_between_its_bounds() -> None:
    schedule = BatchSchedule(Gaussian(), smallest=1, largest=4, double_every=2)
    sizes = [go(schedule, loader(9)) for _ in range(8)]
    assert sizes[:2] == [[1] * 9] * 2
    assert sizes[2:4] == [[2, 2, 2, 2, 1]] * 2  # the last step has what is left
    assert sizes[4:] == [[4, 4, 1]] * 4
    assert schedule.noise_scale is None
    assert [(c.before, c.after, c.epoch) for c in schedule.changes] == [
        (1, 2, 2),
        (2, 4, 4),
        (4, 4, 6),  # what kept it from more is said once
    ]
    lines = [str(change) for change in schedule.changes]
    assert lines[0] == "step 18 (epoch 2): 1 -> 2 micro-batches, doubled every 2 epochs"
    assert lines[2] == (
        "step 34 (epoch 6): 4 -> 4 micro-batches, doubled every 2 epochs; largest is 4"
    )


@pytest.mark.parametrize("mean", [0.5, 0.1])
def test_the_noise_scale_is_measured_from_micro_batches(mean: float) -> None:
    """True values: trace 20, squared gradient 20 mean^2."""
    schedule = BatchSchedule(Gaussian(), smallest=8, largest=8, decay=0.998)
    go(schedule, loader(8 * 1500, mean=mean))
    assert schedule.noise_scale == pytest.approx(1 / mean**2, rel=0.15)


def test_the_size_goes_to_the_noise_scale() -> None:
    """A noise scale of 100 examples is 25 micro-batches of 4; the largest power below is 16."""
    schedule = BatchSchedule(Gaussian(), largest=64, decay=0.98, hold=40)
    sizes = go(schedule, loader(8000))
    assert sizes[0] == 2
    assert set(sizes[-100:-1]) == {16}
    assert schedule.changes
    assert all("noise" in c.reason for c in schedule.changes)
    assert [c.after for c in schedule.changes][:-1] == [c.before for c in schedule.changes][1:]


def test_a_size_is_held_until_it_is_measured() -> None:
    schedule = BatchSchedule(Gaussian(), smallest=2, largest=64, hold=7, interval=3)
    go(schedule, loader(2000))
    steps = [change.step for change in schedule.changes]
    assert steps
    # Seven measurements, one in three steps, take at least 19 steps.
    assert all(b - a >= 19 for a, b in itertools.pairwise([0, *steps]))


def test_the_size_falls_as_well() -> None:
    told = knows([1200.0] * 5 + [20.0])
    schedule = BatchSchedule(Gaussian(), smallest=1, largest=64, noise=told, hold=1)
    go(schedule, loader(600))
    assert [(c.before, c.after) for c in schedule.changes] == [(1, 64), (64, 4)]
    assert str(schedule.changes[1]).endswith("64 -> 4 micro-batches, noise scale 20 examples")
    assert "largest is 64" in str(schedule.changes[0])


def test_noise_that_is_not_known_changes_nothing() -> None:
    schedule = BatchSchedule(Gaussian(), smallest=1, noise=lambda: None, hold=1)
    assert set(go(schedule, loader(50))) == {1}
    assert not schedule.changes


def test_a_gradient_that_the_noise_hides_lets_the_size_grow() -> None:
    schedule = BatchSchedule(Gaussian(), largest=4, decay=0.0, hold=1)
    # Opposite micro-batches: the mean is 0, and the estimate of |G|^2 negative.
    go(schedule, [torch.ones(4, 20), -torch.ones(4, 20)] * 2)
    assert schedule.noise_scale is None
    assert schedule.changes[0].reason == "noise hides the gradient"
    assert schedule.micro_batches == 4


# -- bounds of the data ----------------------------------------------------------------------------


def test_no_step_has_more_than_the_data() -> None:
    schedule = BatchSchedule(Gaussian(), smallest=1, largest=64, double_every=1)
    sizes = [go(schedule, loader(6)) for _ in range(6)]
    assert sizes == [[1] * 6, [2] * 3, [4, 2], [6], [6], [6]]
    assert str(schedule.changes[-1]) == (
        "step 11 (epoch 3): 4 -> 6 micro-batches, doubled every 1 epochs; the data has 6"
    )


def test_smaller_data_later_on() -> None:
    schedule = BatchSchedule(Gaussian(), smallest=1, largest=8, noise=lambda: 1e9, hold=1)
    assert go(schedule, loader(20)) == [1, 8, 8, 3]
    assert go(schedule, loader(5)) == [5]
    assert [(c.before, c.after) for c in schedule.changes] == [(1, 8), (8, 5)]
    assert schedule.changes[-1].limit == "the data has 5"


def test_a_stream_without_a_length() -> None:
    def stream() -> Iterator[Tensor]:
        yield from loader(11)

    schedule = BatchSchedule(Gaussian(), smallest=4, largest=4)
    assert go(schedule, stream()) == [4, 4, 3]
    assert (schedule.epochs_done, schedule.steps_done) == (1, 3)


def test_data_smaller_than_a_step_is_refused() -> None:
    schedule = BatchSchedule(Gaussian(), smallest=8, largest=16)
    with pytest.raises(ArgumentError, match="at least 8 micro-batches, and the data has 5") as e:
        go(schedule, loader(5))
    assert e.value.hint


@pytest.mark.parametrize("empty", [[], iter(())])
def test_an_empty_loader_is_refused(empty: Any) -> None:
    with pytest.raises(ArgumentError, match="yields nothing"):
        go(BatchSchedule(Gaussian()), empty)


# -- states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"double_every": 1, "smallest": 1}], ids=["noise", "ada"])
def test_a_resumed_schedule_goes_on_as_if_never_stopped(options: dict[str, Any]) -> None:
    def trained(resume: bool) -> tuple[list[list[int]], dict[str, Any]]:
        schedule = BatchSchedule(Gaussian(), largest=16, hold=5, **options)
        sizes = []
        for epoch in range(4):
            if resume and epoch == 2:
                # Text: only numbers, texts, lists and dicts are in it.
                state = json.loads(json.dumps(schedule.state_dict()))
                schedule = BatchSchedule(Gaussian(), largest=16, hold=5, **options)
                schedule.load_state_dict(state)
            sizes.append(go(schedule, loader(100, seed=epoch)))
        return sizes, schedule.state_dict()

    straight, resumed = trained(False), trained(True)
    assert straight == resumed
    assert len(straight[1]["changes"]) >= 2


def test_a_state_within_an_epoch() -> None:
    """It holds the step whose gradient is complete, before or after the optimizer's."""
    schedule, batches = BatchSchedule(Gaussian(), hold=5), loader(100)
    for step in schedule.steps(batches):
        for examples in step:
            step.backward(schedule.model(examples))
        if schedule.steps_done == 12:
            break
    other = BatchSchedule(Gaussian(), hold=5)
    other.load_state_dict(copy.deepcopy(schedule.state_dict()))
    assert other.steps_done == 12
    assert other.epochs_done == 0
    assert other.micro_batches == schedule.micro_batches
    assert other.changes == schedule.changes
    assert all(isinstance(change, Change) for change in other.changes)
    assert other.noise_scale == schedule.noise_scale


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("noise"),
        lambda state: state.update(changes=[{"wrong": 1}]),
        lambda state: state.update(micro_batches="many"),
        lambda state: state.update(micro_batches=128),
        lambda state: state.update(micro_batches=0),
    ],
)
def test_a_bad_state_changes_nothing(spoil: Callable[[dict[str, Any]], Any]) -> None:
    schedule = BatchSchedule(Gaussian())
    state = BatchSchedule(Gaussian()).state_dict() | {"steps_done": 5}
    spoil(state)
    with pytest.raises(StateError) as caught:
        schedule.load_state_dict(state)
    assert caught.value.hint
    assert schedule.state_dict() == BatchSchedule(Gaussian()).state_dict()


# -- bad arguments ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"smallest": 0}, "smallest=0"),
        ({"smallest": 2.0}, "smallest=2.0"),
        ({"largest": -4}, "largest=-4"),
        ({"smallest": 3}, "no power of two"),
        ({"largest": 48}, "no power of two"),
        ({"smallest": 16, "largest": 8}, "above largest=8"),
        ({"smallest": 1}, "takes 2 micro-batches"),
        ({"double_every": 0}, "double_every=0"),
        ({"double_every": 1.5}, "double_every=1.5"),
        ({"double_every": 2, "noise": lambda: 1.0}, "two rules"),
        ({"hold": 0}, "hold=0"),
        ({"interval": 0}, "interval=0"),
        ({"hysteresis": 1.0}, "hysteresis=1.0"),
        ({"hysteresis": math.nan}, "hysteresis=nan"),
        ({"rounding": "up"}, "rounding='up'"),
        ({"decay": 1.0}, "decay=1.0"),
    ],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        BatchSchedule(Gaussian(), **options)
    assert caught.value.hint
