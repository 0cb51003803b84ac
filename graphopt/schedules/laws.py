"""Closed forms of pipeline schedules: micro-batches in flight, delays and bubbles.

Stages are counted from 0 here, so the last of S stages is S - 1.
"""

from __future__ import annotations

from graphopt.errors import ArgumentError

SYNCHRONOUS = ("gpipe", "1f1b", "zero_bubble")
NO_FLUSH = ("no_flush", "no_flush_1f1b")
KINDS = (*SYNCHRONOUS, *NO_FLUSH)
"""Schedules with one stage per rank; see `graphopt.schedules.generate`."""


def in_flight(kind: str, stages: int, stage: int, micro_batches: int) -> int:
    """Micro-batches whose activations `stage` holds at most at once.

    Args:
        kind: one of `KINDS`.
        stages: how many stages there are.
        stage: counted from 0.
        micro_batches: of one step; of the whole run where nothing is flushed.
    """
    _check(stages, stage)
    if micro_batches < 1:
        raise ArgumentError(f"there cannot be {micro_batches} micro-batches", where="micro_batches")
    most = {
        "gpipe": micro_batches,
        "1f1b": stages - stage,
        "zero_bubble": stages,
        "no_flush": concurrent_delay(stages, stage) + 1,
        "no_flush_1f1b": alternating_delay(stages, stage) + 1,
    }
    return min(known(kind, most), micro_batches)


def concurrent_delay(stages: int, stage: int) -> int:
    """Updates between a forward and its own update where forwards and backwards run side by side.

    Every stage does one forward and one backward of different samples in each time step, and
    updates (pipelined backpropagation, Kosson et al. 2021): ``D = 2 (S - 1 - s)``.
    """
    _check(stages, stage)
    return 2 * (stages - 1 - stage)


def alternating_delay(stages: int, stage: int) -> int:
    """The same where one worker alternates forwards and backwards: ``D = S - 1 - s``.

    This is 1F1B without a flush (PipeDream, Narayanan et al. 2019). Only the depth counts.
    """
    _check(stages, stage)
    return stages - 1 - stage


def delay(kind: str, stages: int, stage: int, *, every: int = 1) -> int:
    """Updates by which the gradients of a stage are late; 0 where each step flushes.

    Args:
        kind: one of `KINDS`.
        stages: how many stages there are.
        stage: counted from 0.
        every: micro-batches per update; several of them shorten the delay to ``ceil(D / every)``.
    """
    if every < 1:
        raise ArgumentError(f"an update cannot take {every} micro-batches", where="every")
    laws = {"no_flush": concurrent_delay, "no_flush_1f1b": alternating_delay}
    if known(kind, dict.fromkeys(KINDS, 0)) == 0 and kind not in laws:
        _check(stages, stage)
        return 0
    return -(-laws[kind](stages, stage) // every)


def weight_versions(kind: str, stages: int, stage: int, *, every: int = 1) -> int:
    """Versions of the weights that a stage keeps if each backward reads those of its forward."""
    return delay(kind, stages, stage, every=every) + 1


def interleaved_in_flight(ranks: int, chunks: int, rank: int) -> float:
    """Micro-batches in flight on a rank with `chunks` stages, in units of a whole rank.

    One chunk holds a ``1 / chunks`` share of a rank's activations: on rank 0 this is
    ``(2 (p - 1) + (v - 1) p + 1) / v``, if there are enough micro-batches.
    """
    _check(ranks, rank)
    return (2 * (ranks - 1 - rank) + (chunks - 1) * ranks + 1) / chunks


def bubble_overhead(kind: str, stages: int, micro_batches: int, *, chunks: int = 1) -> float:
    """Idle time over useful time of a step with equal stages and free communication.

    ``(p - 1) / (v m)`` with flushes and whole backwards. For ``"zero_bubble"`` it depends on the
    times, see `zero_bubble_overhead`. Without flushes the bubble occurs once per run.
    """
    if kind == "zero_bubble":
        return zero_bubble_overhead(stages, micro_batches, 1.0, 1.0, 1.0)
    known(kind, dict.fromkeys((*KINDS, "interleaved"), 0))
    return (stages - 1) / (chunks * micro_batches)


def zero_bubble_overhead(
    stages: int, micro_batches: int, forward: float, input_grad: float, weight_grad: float
) -> float:
    """Idle over useful time of ZB-H1 (Qi et al. 2024): ``(p-1)(F+I-W) / (m (F+I+W))``.

    Holds where ``W <= F + I`` does not leave the weight gradients over at the end.
    """
    whole = forward + input_grad + weight_grad
    idle = (stages - 1) * (forward + input_grad - weight_grad)
    return idle / (micro_batches * whole)


def known(kind: str, table: dict[str, int]) -> int:
    """The entry of a schedule; refuses one that is not in the table."""
    if kind not in table:
        raise ArgumentError(
            f"there is no schedule {kind!r}", where="schedule", hint=f"one of {', '.join(table)}"
        )
    return table[kind]


def _check(stages: int, stage: int) -> None:
    if not 0 <= stage < stages:
        raise ArgumentError(
            f"there is no stage {stage} among {stages}",
            where="stage",
            hint="stages are counted from 0",
        )
