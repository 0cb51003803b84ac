"""Schedules run, hold what their laws say, delay as their laws say, and survive printing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import TRANSFERS, Action, Kind, Schedule, parse_schedule
from graphopt.schedules.check import check
from graphopt.schedules.generate import generate, interleaved, scheduled
from graphopt.schedules.laws import (
    KINDS,
    NO_FLUSH,
    SYNCHRONOUS,
    alternating_delay,
    concurrent_delay,
    delay,
    in_flight,
    interleaved_in_flight,
)
from graphopt.schedules.table import from_csv, to_csv
from graphopt.schedules.transfers import with_transfers, without_transfers

SIZES = (st.integers(1, 7), st.integers(1, 12))


@given(st.sampled_from(KINDS), *SIZES)
def test_generated_schedules_keep_their_laws(kind: str, stages: int, micro_batches: int) -> None:
    schedule = generate(kind, stages, micro_batches)
    checked = check(schedule)
    laws = [in_flight(kind, stages, s, micro_batches) for s in range(stages)]
    assert list(checked.in_flight) == laws
    late = [min(delay(kind, stages, s), micro_batches - 1) for s in range(stages)]
    assert list(checked.delays) == late
    with_sends = with_transfers(schedule)
    for blocking in (True, False):
        assert check(with_sends, blocking=blocking) == checked
    assert without_transfers(with_sends) == schedule
    assert parse_schedule(str(with_sends)) == with_sends


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_interleaved_schedules(ranks: int, chunks: int, rounds: int) -> None:
    schedule = interleaved(ranks, chunks, ranks * rounds)
    checked = check(schedule)
    assert check(with_transfers(schedule)) == checked
    if rounds > 1:
        for rank, held in enumerate(checked.rank_in_flight):
            assert held / chunks == interleaved_in_flight(ranks, chunks, rank)


def test_published_numbers_of_micro_batches_in_flight() -> None:
    assert interleaved_in_flight(4, 2, 0) == 5.5
    assert interleaved_in_flight(4, 4, 0) == 4.75
    assert interleaved_in_flight(8, 2, 0) == 11.5
    assert [in_flight("1f1b", 4, s, 8) for s in range(4)] == [4, 3, 2, 1]
    assert [in_flight("no_flush", 4, s, 8) for s in range(4)] == [7, 5, 3, 1]
    assert in_flight("gpipe", 4, 0, 8) == 8


def test_the_two_laws_of_delay_are_not_the_same() -> None:
    assert [concurrent_delay(4, s) for s in range(4)] == [6, 4, 2, 0]
    assert [alternating_delay(4, s) for s in range(4)] == [3, 2, 1, 0]
    assert [delay("1f1b", 4, s) for s in range(4)] == [0, 0, 0, 0]


@given(st.sampled_from(NO_FLUSH), st.integers(1, 6), st.integers(1, 5))
def test_accumulated_gradients_are_less_late(kind: str, stages: int, every: int) -> None:
    checked = check(generate(kind, stages, 12 * every, every=every))
    for stage, late in enumerate(checked.delays):
        law = delay(kind, stages, stage, every=every)
        assert late == min(law, 11) if law <= 10 else late >= 10
        assert law == -(-delay(kind, stages, stage) // every)


def test_one_forward_one_backward_begins_with_the_first_micro_batch_on_every_rank() -> None:
    schedule = generate("1f1b", 3, 4)
    assert str(schedule) == (
        "schedule 1f1b\n"
        "stages on ranks 0 1 2\n"
        "micro-batches 4\n"
        "rank 0: 0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3\n"
        "rank 1: 1F0 1F1 1B0 1F2 1B1 1F3 1B2 1B3\n"
        "rank 2: 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3\n"
    )


@given(st.sampled_from(SYNCHRONOUS), *SIZES)
def test_csv(kind: str, stages: int, micro_batches: int) -> None:
    schedule = with_transfers(generate(kind, stages, micro_batches))
    assert from_csv(to_csv(schedule), kind) == schedule


@given(
    st.sampled_from(KINDS), st.integers(2, 4), st.integers(2, 5), st.integers(0, 999), st.booleans()
)
def test_a_broken_schedule_is_refused(
    kind: str, stages: int, micro_batches: int, place: int, twice: bool
) -> None:
    """Whatever computation or transfer is left out, or done twice."""
    schedule = with_transfers(generate(kind, stages, micro_batches))
    rank = place % stages
    line = list(schedule.ranks[rank])
    chosen = place % len(line)
    if line[chosen].kind is Kind.UPDATE and not twice:
        return
    broken = [*line, line[chosen]] if twice else line[:chosen] + line[chosen + 1 :]
    ranks = (*schedule.ranks[:rank], tuple(broken), *schedule.ranks[rank + 1 :])
    with pytest.raises(ArgumentError):
        check(replace(schedule, ranks=ranks))


def test_blocking_sends_that_face_each_other() -> None:
    """Each rank sends before it receives: fine with buffers, and a deadlock without."""
    text = (
        "schedule facing\nstages on ranks 0 1\nmicro-batches 2\n"
        "rank 0: 0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1\n"
        "rank 1: 1RECV_F0 1F0 1B0 1SEND_B0 1RECV_F1 1F1 1B1 1SEND_B1\n"
    )
    schedule = parse_schedule(text)
    check(schedule, blocking=False)
    with pytest.raises(ArgumentError) as caught:
        check(schedule)
    assert caught.value.message == "the ranks wait for each other"
    assert caught.value.where == "rank 0 at 0SEND_F1, rank 1 at 1SEND_B0"


def _two(first: str, second: str, batches: int = 1) -> Schedule:
    header = f"schedule x\nstages on ranks 0 1\nmicro-batches {batches}\n"
    return parse_schedule(f"{header}rank 0: {first}\nrank 1: {second}\n")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("0B0 0F0", "1F0 1B0", "the ranks wait for each other"),
        ("0F0", "1F0 1B0", "stage 0 does F of micro-batch 0"),
        ("0F0 0I0", "1F0 1B0", "stage 0 does F, I of micro-batch 0"),
        ("0F0 0B0 0F0", "1F0 1B0", "0F0 is done twice"),
        ("0F0 0B0 1F0", "1B0", "stage 1 is on rank 1"),
        ("0F0 0B0", "1F0 1B0 1F1", "there are 2 stages, 1 micro-batches"),
        ("0F0 0SEND_F0 0B0", "1RECV_F0 1F0 1B0", "0RECV_B0 is missing"),
        (
            "0F0 0SEND_F0 0RECV_B0 0B0 0SEND_B0",
            "1RECV_F0 1F0 1B0 1SEND_B0",
            "0SEND_B0 has no purpose",
        ),
    ],
)
def test_what_is_wrong_is_named(first: str, second: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        check(_two(first, second))
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("text", "message", "where"),
    [
        ("schedule x", "the text of a schedule ends too early", "line 1"),
        (
            "schedule x\nstages 0 1\nmicro-batches 1\n",
            "'stages 0 1' is not the header of a schedule",
            "line 2",
        ),
        (
            "schedule x\nstages on ranks 0\nmicro-batches 1\nrank 0: 0F0 0X0",
            "'0X0' is not an action",
            "line 4, action 2",
        ),
        (
            "schedule x\nstages on ranks 0\nmicro-batches 1\n0F0 0B0",
            "'0F0 0B0' is not the line of rank 0",
            "line 4",
        ),
    ],
)
def test_unreadable_texts(text: str, message: str, where: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_schedule(text)
    assert (caught.value.message, caught.value.where) == (message, where)


def test_bad_requests() -> None:
    cases = {
        "there is no schedule 'x'": lambda: generate("x", 2, 2),
        "a schedule cannot have 0 stages": lambda: generate("1f1b", 0, 2),
        "a schedule cannot have 0 micro_batches": lambda: generate("1f1b", 2, 0),
        "5 micro-batches are not a multiple of 2 ranks": lambda: interleaved(2, 2, 5),
        "there is no stage 2 among 2": lambda: delay("1f1b", 2, 2),
        "there cannot be 0 micro-batches": lambda: in_flight("1f1b", 2, 0, 0),
        "schedule 'no_flush' updates as it goes": lambda: to_csv(generate("no_flush", 2, 2)),
        "stage 0 is on ranks 0 and 1": lambda: from_csv("0F0\n0B0\n"),
        "stage 0 is on no rank": lambda: from_csv("1F0\n"),
    }
    for message, make in cases.items():
        with pytest.raises(ArgumentError) as caught:
            make()
        assert caught.value.message == message


def test_partners_meet() -> None:
    for kind in TRANSFERS:
        action = Action(2, kind, 5)
        assert action.partner != action
        assert action.partner.partner == action


@pytest.mark.parametrize(
    ("kind", "stages", "ranks", "hint"),
    [
        ("1f1b", 4, 2, "ask for 2 stages, or for the schedule interleaved"),
        ("interleaved", 5, 2, "ask for a multiple of 2 stages"),
    ],
)
def test_stages_that_do_not_fit_the_ranks(kind: str, stages: int, ranks: int, hint: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        scheduled(kind, stages, ranks, 4)
    assert caught.value.message == (
        f"{stages} stages do not fit {ranks} ranks under the schedule {kind!r}"
    )
    assert caught.value.hint == hint


def test_any_kind_by_its_name() -> None:
    assert scheduled("interleaved", 4, 2, 4) == interleaved(2, 2, 4)
    for kind in KINDS:
        assert scheduled(kind, 3, 3, 4) == generate(kind, 3, 4)
