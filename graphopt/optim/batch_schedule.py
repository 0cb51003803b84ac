"""Batches that grow while training: by the measured noise scale, or doubled every few epochs.

The gradient noise scale B = tr(S) / |G|^2 (McCandlish et al., arXiv 1812.06162) is the batch size
beyond which more examples stop paying for themselves. It grows while a model learns, so a batch
that suits the end is wasteful at the start. A step that accumulates several micro-batches can
measure it, since it sees gradients of two batch sizes, and can follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict
from itertools import islice
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from graphopt.errors import ArgumentError, StateError
from graphopt.grouping.noise_scale import NoiseScale
from graphopt.optim.batch_rules import Change, Rounding, doubled, follow
from graphopt.optim.micro_batches import Measured, MicroBatches

T = TypeVar("T")
_END = object()


class BatchSchedule:
    """Says how many micro-batches each optimizer step accumulates.

    ::

        schedule = BatchSchedule(model, largest=32)
        for step in schedule.steps(loader):  # the loader yields micro-batches
            optimizer.zero_grad()
            for images, labels in step:
                step.backward(F.cross_entropy(model(images), labels))
            optimizer.step()

    The gradient of a step is the mean over all of its examples. A model with ``no_sync()``, be it
    of graphopt or of ``DistributedDataParallel``, sends and preconditions once per step. By
    default, a step has as many examples, over all ranks, as the noise scale; with `double_every` it
    doubles by the clock (AdaBatch).

    The noise scale is measured from the gradients of a step's micro-batches. This takes a copy of
    the gradients, two micro-batches of the same size, and one more where the model has
    ``no_sync()``: what is left by the backward that ends a step is no gradient of this rank alone.
    Steps with fewer are not measured. Learning rates are left alone.

    Args:
        model: what is trained; optimized or not.
        smallest: micro-batches in a step, at least and at first; by default as few as can be
            measured. If it is also the largest, the size is fixed.
        largest: at most. A step never has more than one pass over the data, if the loader has a
            length; `changes` says where that was the limit.
        double_every: epochs after which the size doubles; None to follow the noise scale.
        noise: gives the noise scale in examples, or None if it does not know, the same on all
            ranks, such as ``model.noise_scale`` in a job; by default it is measured here.
        rounding: sizes are ``"powers"`` of two, or any ``"whole"`` number of micro-batches.
        hysteresis: factor between the size and the noise scale, in micro-batches, from which on the
            size changes; above 1.
        hold: steps that a size is kept at least, and first measured; at least 1.
        interval: steps from one measurement to the next, at least 1.
        decay: see `NoiseScale`.

    Attributes:
        micro_batches: in the next step.
        changes: every change so far, in order; each prints as a line.
        steps_done: optimizer steps.
        epochs_done: whole passes over the data.

    Raises:
        ArgumentError: an argument is out of range, or nothing could be measured at `smallest`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        smallest: int | None = None,
        largest: int = 64,
        double_every: int | None = None,
        noise: Callable[[], float | None] | None = None,
        rounding: Rounding = "powers",
        hysteresis: float = 1.5,
        hold: int = 10,
        interval: int = 1,
        decay: float = 0.95,
    ) -> None:
        self._measures = double_every is None and noise is None
        needed = (3 if hasattr(model, "no_sync") else 2) if self._measures else 1
        if smallest is None:
            smallest = needed + (needed == 3 and rounding == "powers")
        _check_sizes(smallest, largest, rounding)
        if smallest < needed and smallest < largest:
            raise ArgumentError(
                f"smallest={smallest} leaves nothing to measure the noise scale by: it takes "
                f"{needed} micro-batches with this model",
                hint="make micro-batches smaller, or pass noise= or double_every=",
            )
        if double_every is not None and noise is not None:
            raise ArgumentError(
                "double_every and noise are two rules for one size", hint="pass one of them"
            )
        for name, value in (("double_every", double_every), ("hold", hold), ("interval", interval)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ArgumentError(f"{name}={value} is no number above 0", hint="pass 1 or more")
        if not 1 < hysteresis < math.inf:
            raise ArgumentError(
                f"hysteresis={hysteresis} would let the size flutter", hint="use 1.5"
            )
        self.model = model
        self.smallest, self.largest, self.double_every = smallest, largest, double_every
        self.rounding, self.hysteresis, self.hold = rounding, hysteresis, hold
        self.interval = interval
        self.micro_batches = smallest
        self.changes: list[Change] = []
        self.steps_done = self.epochs_done = 0
        self._noise, self._scale = noise, NoiseScale(decay)
        self._since = 0  # steps, and measurements among them, of this size
        self._measured = 0
        self._in_epoch: int | None = None  # micro-batches, if the loader tells

    @property
    def noise_scale(self) -> float | None:
        """In examples, as measured or as `noise` says; None while there is no estimate."""
        return self._scale.value if self._noise is None else self._noise()

    def steps(self, loader: Iterable[T]) -> Iterator[MicroBatches[T]]:
        """One pass over the data, cut into optimizer steps.

        The last step has what is left. The micro-batches of a step are taken from the loader
        before it begins, and one of the next.

        Args:
            loader: yields micro-batches.

        Raises:
            ArgumentError: it yields none, or fewer than `smallest`; or a step was not gone through
                to its end.
        """
        self._in_epoch = len(loader) if isinstance(loader, Sized) else None
        if self._in_epoch is not None and 0 < self._in_epoch < self.smallest:
            raise ArgumentError(
                f"a step has at least {self.smallest} micro-batches, and the data has "
                f"{self._in_epoch}",
                hint="make micro-batches smaller, or lower smallest",
            )
        if self.double_every is not None:
            wanted = doubled(self.smallest, self.epochs_done, self.double_every)
            self._change(wanted, f"doubled every {self.double_every} epochs")
        self._change(self.micro_batches, "another loader")
        rest = iter(loader)
        ahead: Any = next(rest, _END)
        if ahead is _END:
            raise ArgumentError(
                "the loader yields nothing",
                hint="pass a loader that can be gone through once per epoch",
            )
        while ahead is not _END:
            batches = [ahead, *islice(rest, self.micro_batches - 1)]
            ahead = next(rest, _END)
            ends = ahead is _END

            def done(step: MicroBatches[T], found: Measured | None, ends: bool = ends) -> None:
                self._finish(step, found, ends)

            measure = self._measures and self.steps_done % self.interval == 0
            step = MicroBatches(self.model, batches, measure, done)
            yield step
            if not step.complete:
                raise ArgumentError(
                    f"the step of {len(step)} micro-batches was not gone through to its end",
                    hint="loop over all micro-batches of a step, and call step.backward(loss)",
                )

    def state_dict(self) -> dict[str, Any]:
        """Sizes, record and averages, as numbers and texts; between two steps of the optimizer."""
        return {
            "micro_batches": self.micro_batches,
            "steps_done": self.steps_done,
            "epochs_done": self.epochs_done,
            "since": self._since,
            "measured": self._measured,
            "noise": self._scale.state_dict(),
            "changes": [asdict(change) for change in self.changes],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. The loader is yours to bring to the same place.

        Raises:
            StateError: it is no state of a `BatchSchedule`, or its size is out of these bounds.
        """
        try:
            size = int(state["micro_batches"])
            counts = [int(state[n]) for n in ("steps_done", "epochs_done", "since", "measured")]
            changes = [Change(**change) for change in state["changes"]]
            noise = NoiseScale(self._scale.decay)
            noise.load_state_dict(state["noise"])
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"this is no state of a BatchSchedule ({type(error).__name__}: {error})",
                hint="pass what state_dict() gave",
            ) from error
        if not 1 <= size <= self.largest:
            raise StateError(
                f"the state has {size} micro-batches in a step, and largest is {self.largest}",
                hint="make the schedule with the bounds it was saved with",
            )
        self.micro_batches, self.changes, self._scale = size, changes, noise
        self.steps_done, self.epochs_done, self._since, self._measured = counts

    def _finish(self, step: MicroBatches[Any], found: Measured | None, ends: bool) -> None:
        """Count a step, and decide on the next one."""
        self.steps_done += 1
        self.epochs_done += ends
        self._since += 1
        if found is not None:
            self._scale.update(*found)
            self._measured += 1
        if self.double_every is not None or self._since < self.hold:
            return
        if self._measures and (found is None or self._measured < self.hold):
            return
        micro = step.examples / len(step) * _ranks()
        scale = self.noise_scale
        if scale is not None:
            reason = f"noise scale {scale:.4g} examples"
            wanted = follow(
                self.micro_batches,
                scale / micro,
                hysteresis=self.hysteresis,
                rounding=self.rounding,
            )
            self._change(wanted, reason)
        elif self._measures:
            # The mean of |G|^2 is not positive: the noise is more than such steps average out.
            self._change(2 * self.micro_batches, "noise hides the gradient")

    def _change(self, wanted: int, reason: str) -> None:
        """Have steps of that size, within the bounds."""
        after, limit = max(self.smallest, wanted), ""
        if after > self.largest:
            after, limit = self.largest, f"largest is {self.largest}"
        if self._in_epoch and after > self._in_epoch:
            after, limit = self._in_epoch, f"the data has {self._in_epoch}"
        before, known = self.micro_batches, self.changes[-1].limit if self.changes else ""
        if after == before and limit in ("", known):
            return
        self.changes.append(Change(self.steps_done, self.epochs_done, before, after, reason, limit))
        if after != before:
            self.micro_batches, self._since, self._measured = after, 0, 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _check_sizes(smallest: int, largest: int, rounding: Rounding) -> None:
    if rounding not in ("powers", "whole"):
        raise ArgumentError(f"rounding={rounding!r} is unknown", hint="use 'powers' or 'whole'")
    for name, size in (("smallest", smallest), ("largest", largest)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ArgumentError(
                f"{name}={size!r} is no number of micro-batches", hint="pass 1 or more"
            )
        if rounding == "powers" and size & (size - 1):
            raise ArgumentError(
                f"{name}={size} is no power of two",
                hint="pass one, or rounding='whole'",
            )
    if smallest > largest:
        raise ArgumentError(f"smallest={smallest} is above largest={largest}", hint="exchange them")
