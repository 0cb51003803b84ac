"""Keep the exponents of flex tensors, and predict those of the next step."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.errors import StateError
from graphopt.ops.flex import UNKNOWN
from graphopt.plan import Plan
from graphopt.plan.flexpoint import FlexTensors
from graphopt.runtime import kernels
from graphopt.runtime.engine.step import Backward, Forward, Half, MakeBackward, MakeForward, Step
from graphopt.runtime.flexpoint import counters
from graphopt.runtime.flexpoint.autoflex import RULES, Limits, Memory, mantissas, renew
from graphopt.runtime.flexpoint.statistics import (
    AMAX,
    TakingBackward,
    TakingForward,
    merged,
    over_ranks,
    taken,
)
from graphopt.runtime.flexpoint.weights import Weights
from graphopt.runtime.part import RuntimePart, check_dtype
from graphopt.runtime.session import Session


class Flexpoint(RuntimePart[FlexTensors]):
    """Renews the exponents of a model once per step, on their device.

    The state has, for each set of n tensors (``<key>`` of the plan part), ``exponents/<key>`` int32
    [n], ``queue/<key>``, ``lengths/<key>``, ``seen/<key>`` and ``renewals/<key>`` (see
    `autoflex.Memory`), ``counters/<key>`` and ``bits/<key>`` (see `counters.count`), and within a
    step of several micro-batches ``waiting/<key>``, int64 [n, 4]; with stochastic rounding
    ``seed``, int64 [2], whose second number grows with every micro-batch and is the same on all
    ranks when a step ends.
    """

    name: ClassVar[str] = "flexpoint"
    methods: ClassVar[tuple[str, ...]] = ("no_sync",)
    accepts_early: ClassVar[bool] = True

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._weights = Weights()
        self._watch = counters.Watch()
        self._steps = 0

    def forward(self, part: FlexTensors, plan: Plan, below: MakeForward) -> MakeForward:
        """Take the statistics off; before, round the weights where they are flex tensors."""
        kernels.register_flex()

        def begin(step: Step) -> None:
            if part.weights:
                exponents = self.state[f"exponents/{part.key}"]
                self._weights.round(part, step, exponents, self.state.get("seed"))

        def make(half: Half) -> Forward:
            return TakingForward(below(half), begin)

        return make

    def backward(self, part: FlexTensors, plan: Plan, below: MakeBackward) -> MakeBackward:
        """Take the statistics off."""

        def make(half: Half) -> Backward:
            return TakingBackward(below(half))

        return make

    def unstaged(self, part: FlexTensors, per_rank: int) -> str:
        """Statistics of all tensors are renewed together."""
        return "its statistics belong to whole steps"

    def uncompared(self, part: FlexTensors) -> Mapping[str, str]:
        """What eager has nothing like."""
        return {"exponents predicted for later steps": "they change the training method by design"}

    def finish(self, part: FlexTensors, step: Step, gradients: dict[str, Tensor]) -> None:
        """Add statistics up; where the step ends, predict the exponents of the next.

        Raises:
            RankError: a rank does not answer.
        """
        rows = taken(part, step)
        waiting = self.state.pop(f"waiting/{part.key}", None)
        self.state[f"waiting/{part.key}"] = rows if waiting is None else merged(rows, waiting)
        if part.stochastic:
            _advance(self.state["seed"], step.ends)
        if not step.ends:
            return
        keys = sorted(k.removeprefix("waiting/") for k in self.state if k.startswith("waiting/"))
        everything = {key: self.state.pop(f"waiting/{key}") for key in keys}
        ranks = self.session.ranks.get("dp")
        if ranks is not None and ranks.size > 1:
            self._steps += 1
            everything = over_ranks(ranks, everything, self._steps, partial(self._checksum, keys))
        for key, found in everything.items():
            self._renew(part, key, found)
        self._watch.look(everything[part.key], part.names)

    def _renew(self, part: FlexTensors, key: str, rows: Tensor) -> None:
        """The exponents of one set of tensors; all sets of a model have the same options."""
        rule, limits = RULES[part.autoflex], Limits(part.mantissa, part.least, part.most)
        tables = {
            table: self._table(table, key, shape, dtype, rows.device)
            for table, (shape, dtype) in _tables(len(rows), part.autoflex).items()
        }
        memory = Memory(*(tables[n] for n in ("exponents", *_MEMORY)))
        amax = rows[:, AMAX].to(torch.int32)
        gamma, _ = mantissas(amax, memory.exponents, limits)
        counters.count(tables["counters"], tables["bits"], rows, gamma)
        renew(rule, memory, amax, limits)

    def _checksum(self, keys: Sequence[str]) -> int:
        """Of what new exponents are made of beside the statistics."""
        found = 0
        for key in keys:
            for table in _REMEMBERED:
                value = self.state.get(f"{table}/{key}")
                if value is not None:
                    found = zlib.crc32(value.cpu().numpy().tobytes(), found)
        return found

    def _table(
        self, table: str, key: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        found = self.state.get(f"{table}/{key}")
        if found is None or found.device != device:
            start = torch.zeros(shape, dtype=dtype, device=device)
            self.state[f"{table}/{key}"] = start if found is None else found.to(device)
        return self.state[f"{table}/{key}"]

    # -- saving and reporting ----------------------------------------------------------------------

    def accepts(self, parts: Sequence[FlexTensors], saved: Mapping[str, Tensor]) -> None:
        """Whether saved exponents are those of the tensors of these.

        Another kind of call may have other tensors; theirs may be there, too, or not yet.

        Raises:
            StateError: they are not, naming the first difference.
        """
        hint = "load the state of this model, saved with the same options of flexpoint"
        for key in saved:
            table, _, name = key.partition("/")
            if not (table in (*_TABLES, "waiting") if name else key == "seed"):
                raise StateError(
                    f"the saved state has 'flexpoint/{key}', which is not flexpoint's", hint=hint
                )
        for part in parts:
            count = len(part.names)
            expected = _tables(count, part.autoflex) | {"waiting": ((count, 4), torch.int64)}
            for table, (shape, dtype) in expected.items():
                found = saved.get(f"{table}/{part.key}")
                if found is not None and found.shape != shape:
                    raise StateError(
                        f"'flexpoint/{table}/{part.key}' has shape {tuple(found.shape)} in the "
                        f"saved state and {shape} here",
                        hint=hint,
                    )
                if found is not None:
                    check_dtype(f"flexpoint/{table}/{part.key}", found, dtype)
        for key, value in saved.items():
            _check_values(key, value, hint)
        known = {f"exponents/{part.key}" for part in parts}
        if parts and any(key.startswith("exponents/") for key in saved) and not known & set(saved):
            raise StateError(f"the saved state lacks 'flexpoint/{min(known)}'", hint=hint)

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from a saved state; tensors that it does not know begin anew."""
        fresh = {
            key: torch.full_like(value, UNKNOWN)
            for key, value in self.state.items()
            if key.startswith("exponents/")
        }
        if "seed" in self.state:
            fresh["seed"] = torch.zeros_like(self.state["seed"])
        super().load({**fresh, **saved})

    def notes(self) -> tuple[str, ...]:
        """How many bits are in use, what saturated, and what was NaN."""
        found = [
            {k: v for k, v in self.state.items() if k.startswith(f"{table}/")}
            for table in ("counters", "bits")
        ]
        return counters.note(*found)


# How many micro-batches of one step have random numbers of their own.
_MICRO_BATCHES = 2**20


@torch.no_grad()
def _advance(seed: Tensor, ends: bool) -> None:
    """To the next micro-batch of a step, or to the next step."""
    number = seed[1]
    if ends:
        number.copy_((number // _MICRO_BATCHES + 1) * _MICRO_BATCHES)
    else:
        number.add_(1)


_MEMORY = ("queue", "lengths", "seen", "renewals")
# Of which equal ones on all ranks stay equal.
_REMEMBERED = ("exponents", "queue", "lengths")
_TABLES = ("exponents", *_MEMORY, "counters", "bits")


def _check_values(key: str, value: Tensor, hint: str) -> None:
    """Whether a saved tensor can be one of its table, whatever tensors it is of.

    Raises:
        StateError: it cannot.
    """
    table = key.partition("/")[0]
    if key == "seed" and (value.dtype != torch.int64 or value.shape != (2,)):
        raise StateError("'flexpoint/seed' should be two whole numbers", hint=hint)
    counts = table in ("lengths", "seen", "renewals", "counters", "waiting")
    if (counts and bool((value < 0).any())) or not bool(torch.isfinite(value).all()):
        raise StateError(f"'flexpoint/{key}' has a number that is none of it", hint=hint)


def _tables(count: int, autoflex: str) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each tensor that is kept for so many tensors."""
    return {
        "exponents": ((count,), torch.int32),
        "queue": ((count, RULES[autoflex].length), torch.float32),
        "lengths": ((count,), torch.int64),
        "seen": ((count,), torch.int64),
        "renewals": ((), torch.int64),
        "counters": ((count, counters.COLUMNS), torch.int64),
        "bits": ((count,), torch.float64),
    }
