"""The messages of one backward: counted, watched for NaN, measured for noise, delayed if asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work

from graphopt.grouping.noise_scale import NoiseScale
from graphopt.notices import warn
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.group_gradients.delayed import History
from graphopt.runtime.group_gradients.stamp import Stamp, numbered
from graphopt.runtime.ranks.channel import Waiting
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.ranks.slips import slipped

# Steps between two measurements of gradient noise; each reads the gradients twice.
NOISE_INTERVAL = 8


class Joins(Protocol):
    """Is told of each step."""

    def announce(self, part: Reduction) -> None:
        """This rank makes a step."""


@dataclass(frozen=True)
class Means:
    """What gradients have to be, once they are reduced.

    Attributes:
        values: the means over ranks, by name.
        scales: the largest magnitude of each on any rank.
    """

    values: Mapping[str, Tensor]
    scales: Mapping[str, float]


class Messages:
    """Carries what the graphs of one model send.

    Args:
        ranks: over which gradients are reduced.
        state: where a loaded history of earlier messages is found.

    Attributes:
        step: number of reducing backward passes so far.
        passes: number of backward passes so far, with those that only accumulate; equal on all
            ranks, which a stamp in the messages shows.
        number: what this pass is stamped with.
        scale: what the loss of this step was multiplied with, as far as it is compared.
        noise: gradient noise scale; its batch is counted in examples.
        nonfinite: what was found in reduced gradients: step, group and parameter.
        waiting_examples: of the micro-batches that wait for the next reduction.
        history: messages of the step before, where the plan delays results.
        parameters: of the model, by name, once there was a step.
        joining: told of each step, while ranks may have unequally many batches.
        asked: about how many gradients ranks ask in a step whether any of them has it.
    """

    def __init__(self, ranks: Ranks, state: dict[str, Tensor]) -> None:
        self.ranks = ranks
        self.step = self.passes = self.number = 0
        self.scale = 1.0
        self.noise = NoiseScale()
        self.nonfinite: list[str] = []
        self._warned = False
        self.history = History(ranks.group.rank(), state)
        self._part: Reduction | None = None
        self._stamp: Stamp | None = None
        self.parameters: Mapping[str, Tensor] = {}
        self.waiting_examples = 0
        self._examples = 1
        self._sent = 0
        self.asked = 0
        self.joining: Joins | None = None
        self._expected: tuple[int, Means] | None = None
        self._forms: list[tuple[int, torch.dtype, Any]] = []
        self._waits: dict[int, Waiting] = {}
        self._local = self._reduced = 0.0
        ranks.group.carrier = self._carry

    def begin(
        self,
        part: Reduction,
        parameters: Mapping[str, Tensor],
        examples: int,
        stamp: Stamp | None = None,
        scale: Callable[[], float] | None = None,
    ) -> None:
        """Start the messages of one backward pass.

        Args:
            part: what to obey.
            parameters: of the model, by name.
            examples: of the batch.
            stamp: of one of the messages.
            scale: gives what the loss was multiplied with; ``None`` for 1.
        """
        self._part, self.parameters, self._stamp = part, parameters, stamp
        self._examples, self.waiting_examples = examples + self.waiting_examples, 0
        self.step += 1
        self.scale, self.number = 1.0, self.passes
        # A rank that has no batches left does not renew its scale.
        if scale is not None and self.joining is None and self._looks(self.ranks.device):
            self.scale = scale()
            self.number = numbered(self.passes, self.scale)
        self._sent = 0
        self._forms = []
        self._local = self._reduced = 0.0

    def end(self) -> None:
        """All messages of the step have arrived."""
        if not self._measures() or self._part is None:
            return
        size, scale = self.ranks.size, self._part.scale
        squares = torch.tensor([self._local / scale**2 / size])
        if scale * size != 1.0:  # messages carried gradients divided by nothing: no mean yet
            self._reduced /= size**2 * scale**2
        with self.waiting(-1):
            self.ranks.group.inner.allreduce([squares]).wait()
        self.noise.update(float(squares), self._reduced, size, self._examples)

    @property
    def expects(self) -> bool:
        """Whether it is known what the results of this step or the next one have to be."""
        return self._expected is not None

    def expect(self, means: Means) -> None:
        """Know what the next step has to return, where results are delayed by one."""
        self._expected = self.step + 1, means

    def take_expected(self) -> Means | None:
        """What this step has to return; ``None`` where that is not known."""
        found, self._expected = self._expected, None
        return found[1] if found is not None and found[0] == self.step else None

    def shadow(self) -> None:
        """Send what other ranks send in a step, with zeros, as this one has no batch.

        Raises:
            RankError: a rank does not answer.
        """
        self.step += 1
        device, stamp, sent = self.ranks.device, self._stamp, []
        if self.asked:
            bits = torch.zeros(self.asked, dtype=torch.uint8, device=device)
            options = dist.AllreduceOptions()
            options.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]
            sent.append(self.start(bits, -1, options))
        for index, (length, dtype, options) in enumerate(self._forms):
            zeros = torch.zeros(length, dtype=dtype, device=device)
            if stamp is not None and stamp.index == index:
                zeros[-stamp.length :] = stamp.of(self.passes, device)
            sent.append(self.start(zeros, index, options))
        for index, work in enumerate(sent):
            with self.waiting(index - bool(self.asked)):
                work.wait()
        if self._measures():
            with self.waiting():
                self.ranks.group.inner.allreduce([torch.zeros(1)]).wait()

    def start(self, tensor: Tensor, group: int, options: Any = None) -> Any:
        """Start to reduce a tensor in place; a failure names the group.

        Raises:
            RankError: the message cannot be sent.
        """
        if self.ranks.device.type != "cpu":  # the first one makes a communicator, and waits for it
            with self.waiting(group):
                return self.ranks.group.start(tensor, options)
        try:
            return self.ranks.group.start(tensor, options)
        except RuntimeError:
            with self.waiting(group):  # says who is missing
                raise

    def waiting(self, group: int = -1) -> Waiting:
        """Within, this group is waited for; without a number, what is no gradient.

        One that is lost is a `RankError` that says who is missing.
        """
        block = self._waits.get(group)
        if block is None:
            block = self._waits[group] = self.ranks.group.waiting(partial(self._lost, group))
        return block

    def _lost(self, group: int) -> str:
        step = self.step
        groups = self._part.grouping.groups if self._part else ()
        if not 0 <= group < len(groups):
            return f"what the ranks know of the gradients of step {step} was not shared"
        names = groups[group].names
        which = f"group {group} ({names[0]} … {names[-1]})"
        return f"the gradients of {which} were not reduced in step {step}"

    def warn_nonfinite(self, names: Sequence[str]) -> None:
        """Say once which gradients are not finite; an AMP scaler may mean to skip the step."""
        if names and not self._warned:
            self._warned = True
            warn(
                f"reduced gradients are not finite in {self.nonfinite[0]}: {', '.join(names[:4])}",
                RuntimeWarning,
            )

    def results(self, names: Sequence[str]) -> None:
        """Note gradients that are not finite, where messages do not show it."""
        if names:
            self.nonfinite.append(f"step {self.step}, {names[0]} … {names[-1]}")

    @property
    def shows_nonfinite(self) -> bool:
        """Whether `arrived` sees floating-point messages of this step."""
        part = self._part
        return part is not None and part.stale == "none" and part.wire != "int32"

    def _measures(self) -> bool:
        part = self._part
        fresh = part is not None and part.wire == "native" and part.stale == "none"
        return fresh and (self.step - 1) % NOISE_INTERVAL == 0

    def _carry(self, tensor: Tensor, options: Any) -> Work:
        index = self._sent
        self._sent += 1
        self._forms.append((tensor.numel(), tensor.dtype, options))
        part = self._part
        assert part is not None, "a graph sends without a backward that has begun"
        stamp = self._stamp if self._stamp and self._stamp.index == index else None
        if self._measures():
            body = tensor[: -stamp.length] if stamp else tensor
            self._local += float(torch.linalg.vector_norm(body)) ** 2
        if part.stale != "none":
            return self._delay(part, index, tensor)
        # Of the integer wire, every second message carries the exponents.
        group = index // 2 if part.wire == "int32" else index
        return _Message(self, self.start(tensor, group, options), tensor, group, stamp)

    def _delay(self, part: Reduction, index: int, fresh: Tensor) -> Work:
        names = part.grouping.groups[index].names
        return self.history.exchange(
            part.stale,
            {name: self.parameters[name].numel() for name in names},
            fresh,
            lambda tensor: self.start(tensor, index),
            lambda: self.waiting(index),
            Stamp(index, fresh.dtype, self.ranks.size, self.ranks.group.rank()),
            self,
        )

    def _looks(self, device: torch.device) -> bool:
        """Whether numbers are compared now: a slip lasts, and looking stops the stream of a GPU."""
        return device.type == "cpu" or (self.step - 1) % NOISE_INTERVAL == 0

    def check(self, stamp: Stamp, message: Tensor, number: int) -> Tensor:
        """A reduced message without its stamp.

        Raises:
            RankError: the ranks that have added it up were in different passes, or had different
                loss scales.
        """
        elements = message[-stamp.length :]
        if self._looks(message.device) and not stamp.agrees(elements, number):
            raise slipped(self.ranks, self.passes, self.scale)
        return message[: -stamp.length]

    def arrived(self, tensor: Tensor, group: int, stamp: Stamp | None) -> None:
        """Look at a reduced message before the optimizer does."""
        if stamp is not None:
            tensor = self.check(stamp, tensor, self.number)
        if not tensor.is_floating_point():
            return
        # A CPU has waited for the message anyway; asking a GPU would stop its stream.
        if tensor.device.type == "cpu" or self._measures():
            square = float(torch.linalg.vector_norm(tensor)) ** 2
            self._reduced += square
            if square != square or square == float("inf"):
                self._report(tensor, group)

    def _report(self, tensor: Tensor, group: int) -> None:
        if torch.isfinite(tensor).all():
            return  # only the square overflowed
        groups = self._part.grouping.groups if self._part else ()
        names = groups[group].names if group < len(groups) else ()
        place = f"group {group} ({names[0]} … {names[-1]})" if names else f"group {group}"
        self.nonfinite.append(f"step {self.step}, {place}")


class _Message(Work):
    """A message on its way."""

    def __init__(
        self, messages: Messages, inner: Any, tensor: Tensor, group: int, stamp: Stamp | None
    ) -> None:
        super().__init__()
        self._messages, self._inner, self._tensor = messages, inner, tensor
        self._group, self._stamp = group, stamp

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the sum over all ranks stands in the tensor."""
        with self._messages.waiting(self._group):
            self._inner.wait()
        self._messages.arrived(self._tensor, self._group, self._stamp)
        return True
