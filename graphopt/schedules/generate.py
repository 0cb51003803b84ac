"""Generators of schedules, computation only; `graphopt.schedules.transfers` adds sends."""

from __future__ import annotations

from collections.abc import Iterator

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import Action, Kind, Schedule
from graphopt.schedules.laws import KINDS, concurrent_delay


def generate(kind: str, stages: int, micro_batches: int, *, every: int = 1) -> Schedule:
    """A schedule with one stage per rank.

    ``"gpipe"``: all forwards, then all backwards (Huang et al. 2019). ``"1f1b"``: after as many
    forwards as there are stages behind, one of each in turn (Narayanan et al. 2019).
    ``"zero_bubble"``: 1F1B whose parameter gradients are delayed by as many micro-batches as there
    are stages before, so that they fill the bubble while every stage holds the same number of
    micro-batches (ZB-H1 of Qi et al. 2024). ``"no_flush"``: pipelined backpropagation, a forward
    and a backward of different micro-batches in every time step (Kosson et al. 2021).
    ``"no_flush_1f1b"``: 1F1B that updates as it goes.

    Args:
        kind: one of `graphopt.schedules.laws.KINDS`.
        stages: how many, each on its own rank.
        micro_batches: of one step; of the whole run where nothing is flushed.
        every: micro-batches per update where nothing is flushed.

    Raises:
        ArgumentError: there is no such schedule, or a number is not positive.
    """
    for what, number in (("stages", stages), ("micro_batches", micro_batches), ("every", every)):
        if number < 1:
            raise ArgumentError(f"a schedule cannot have {number} {what}", where=what)
    makers = {
        "gpipe": lambda s: _gpipe(s, micro_batches),
        "1f1b": lambda s: _one_by_one(s, stages, micro_batches),
        "zero_bubble": lambda s: _zero_bubble(s, stages, micro_batches),
        "no_flush": lambda s: _concurrent(s, stages, micro_batches, every),
        "no_flush_1f1b": lambda s: _updated(
            _one_by_one(s, stages, micro_batches), micro_batches, every
        ),
    }
    if kind not in makers:
        raise ArgumentError(
            f"there is no schedule {kind!r}", where="schedule", hint=f"one of {', '.join(KINDS)}"
        )
    ranks = tuple(tuple(makers[kind](stage)) for stage in range(stages))
    return Schedule(kind, tuple(range(stages)), micro_batches, ranks)


def interleaved(ranks: int, chunks: int, micro_batches: int) -> Schedule:
    """1F1B with several stages per rank, which are dealt out in turn (Narayanan et al. 2021).

    Micro-batches go through a rank's stages in rounds of as many as there are ranks.

    Raises:
        ArgumentError: a number is not positive, or the micro-batches are no multiple of the ranks.
    """
    if ranks < 1 or chunks < 1:
        raise ArgumentError(f"there cannot be {ranks} ranks with {chunks} stages each")
    if micro_batches < 1 or micro_batches % ranks:
        raise ArgumentError(
            f"{micro_batches} micro-batches are not a multiple of {ranks} ranks",
            where="micro_batches",
            hint=f"take {max(1, round(micro_batches / ranks)) * ranks}",
        )
    total = micro_batches * chunks
    lines = []
    for rank in range(ranks):
        warm = min(total, 2 * (ranks - 1 - rank) + (chunks - 1) * ranks)

        def forward(index: int, rank: int = rank) -> Action:
            chunk = index // ranks % chunks
            return Action(chunk * ranks + rank, Kind.F, _batch(index, ranks, chunks))

        def backward(index: int, rank: int = rank) -> Action:
            chunk = chunks - 1 - index // ranks % chunks
            return Action(chunk * ranks + rank, Kind.B, _batch(index, ranks, chunks))

        line = [forward(i) for i in range(warm)]
        for i in range(total - warm):
            line += [forward(warm + i), backward(i)]
        line += [backward(i) for i in range(total - warm, total)]
        lines.append(tuple(line))
    placement = tuple(range(ranks)) * chunks
    return Schedule("interleaved", placement, micro_batches, tuple(lines))


def scheduled(kind: str, stages: int, ranks: int, micro_batches: int) -> Schedule:
    """A schedule of any kind; stages are dealt out to ranks in turn.

    Args:
        kind: one of `graphopt.schedules.laws.KINDS`, or ``"interleaved"``.
        stages: how many; as many as ranks unless the kind is ``"interleaved"``, then a multiple.
        ranks: along the pipeline.
        micro_batches: of one step, or of the run.

    Raises:
        ArgumentError: the numbers do not fit.
    """
    chunks, rest = divmod(stages, max(1, ranks))
    if rest or (kind != "interleaved" and chunks != 1) or not chunks:
        wanted = f"a multiple of {ranks}" if kind == "interleaved" else f"{ranks}"
        raise ArgumentError(
            f"{stages} stages do not fit {ranks} ranks under the schedule {kind!r}",
            where="stages",
            hint=f"ask for {wanted} stages"
            + ("" if kind == "interleaved" else ", or for the schedule interleaved"),
        )
    if kind == "interleaved":
        return interleaved(ranks, chunks, micro_batches)
    return generate(kind, stages, micro_batches)


def _batch(index: int, ranks: int, chunks: int) -> int:
    return index // (ranks * chunks) * ranks + index % ranks


def _gpipe(stage: int, micro_batches: int) -> Iterator[Action]:
    for kind in (Kind.F, Kind.B):
        yield from (Action(stage, kind, m) for m in range(micro_batches))


def _one_by_one(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    warm = min(stages - 1 - stage, micro_batches)
    yield from (Action(stage, Kind.F, m) for m in range(warm))
    for m in range(micro_batches - warm):
        yield Action(stage, Kind.F, warm + m)
        yield Action(stage, Kind.B, m)
    yield from (Action(stage, Kind.B, m) for m in range(micro_batches - warm, micro_batches))


def _zero_bubble(stage: int, stages: int, micro_batches: int) -> Iterator[Action]:
    for action in _one_by_one(stage, stages, micro_batches):
        if action.kind is not Kind.B:
            yield action
            continue
        yield Action(stage, Kind.I, action.micro_batch)
        late = action.micro_batch - stage
        if late >= 0:
            yield Action(stage, Kind.W, late)
    left = range(max(0, micro_batches - stage), micro_batches)
    yield from (Action(stage, Kind.W, m) for m in left)


def _concurrent(stage: int, stages: int, micro_batches: int, every: int) -> Iterator[Action]:
    """In each time step the next forward, and the backward of what came 2 (S - 1 - s) before."""
    behind = concurrent_delay(stages, stage)

    def computed() -> Iterator[Action]:
        for m in range(micro_batches + behind):
            if m < micro_batches:
                yield Action(stage, Kind.F, m)
            if m >= behind:
                yield Action(stage, Kind.B, m - behind)

    return _updated(computed(), micro_batches, every)


def _updated(actions: Iterator[Action], micro_batches: int, every: int) -> Iterator[Action]:
    """With an update behind every so many backwards, and behind the last."""
    for action in actions:
        yield action
        number = action.micro_batch + 1
        if action.kind is Kind.B and (number % every == 0 or number == micro_batches):
            yield Action(action.stage, Kind.UPDATE, action.micro_batch)
