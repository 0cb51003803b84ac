"""The messages of one backward: counted, watched for NaN, measured for noise, delayed if asked."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Work

from graphopt.errors import RankError
from graphopt.grouping.noise_scale import NoiseScale
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.group_gradients.delayed import History
from graphopt.runtime.ranks.ranks import Ranks

# Steps between two measurements of gradient noise; each reads the gradients twice.
NOISE_INTERVAL = 8


class Messages:
    """Carries what the graphs of one model send.

    Args:
        ranks: over which gradients are reduced.
        state: where a loaded history of earlier messages is found.

    Attributes:
        step: number of reducing backward passes so far.
        noise: gradient noise scale; its batch is counted in examples.
        nonfinite: what was found in reduced gradients: step, group and parameter.
        waiting_examples: of the micro-batches that wait for the next reduction.
        history: messages of the step before, where the plan delays results.
    """

    def __init__(self, ranks: Ranks, state: dict[str, Tensor]) -> None:
        self.ranks = ranks
        self.step = 0
        self.noise = NoiseScale()
        self.nonfinite: list[str] = []
        self._warned = False
        self.history = History(ranks.group.rank(), state)
        self._part: Reduction | None = None
        self._parameters: Mapping[str, Tensor] = {}
        self.waiting_examples = 0
        self._examples = 1
        self._sent = 0
        self._local = self._reduced = 0.0
        ranks.group.carrier = self._carry

    def begin(self, part: Reduction, parameters: Mapping[str, Tensor], examples: int) -> None:
        """Start the messages of one backward pass of these parameters."""
        self._part, self._parameters = part, parameters
        self._examples, self.waiting_examples = examples + self.waiting_examples, 0
        self.step += 1
        self._sent = 0
        self._local = self._reduced = 0.0

    def end(self) -> None:
        """All messages of the step have arrived."""
        if not self._measures() or self._part is None:
            return
        size, scale = self.ranks.size, self._part.scale
        squares = torch.tensor([self._local / scale**2 / size])
        if scale * size != 1.0:  # messages carried gradients divided by nothing: no mean yet
            self._reduced /= size**2 * scale**2
        self.ranks.group.inner.allreduce([squares]).wait()
        self.noise.update(float(squares), self._reduced, size, self._examples)

    def start(self, tensor: Tensor, group: int, options: Any = None) -> Any:
        """Start to reduce a tensor in place; a failure names the group.

        Raises:
            RankError: the message cannot be sent.
        """
        try:
            return self.ranks.group.start(tensor, options)
        except RuntimeError as error:
            raise self.failure(group, error) from error

    def failure(self, group: int, error: BaseException) -> RankError:
        """What was lost, and who is missing."""
        what = "which gradients each rank has was not agreed on"
        groups = self._part.grouping.groups if self._part else ()
        if 0 <= group < len(groups):
            names = groups[group].names
            which = f"group {group} ({names[0]} … {names[-1]})"
            what = f"the gradients of {which} were not reduced in step {self.step}"
        return self.ranks.group.failure(what, str(self.step), error)

    def lost_question(self, error: BaseException) -> RankError:
        """Who is missing where ranks could not agree on absent gradients."""
        return self.failure(-1, error)

    def warn_nonfinite(self, names: Sequence[str]) -> None:
        """Say once which gradients are not finite; an AMP scaler may mean to skip the step."""
        if names and not self._warned:
            self._warned = True
            warnings.warn(
                f"reduced gradients are not finite in {self.nonfinite[0]}: {', '.join(names[:4])}",
                RuntimeWarning,
                stacklevel=2,
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
        part = self._part
        assert part is not None, "a graph sends without a backward that has begun"
        if self._measures():
            self._local += float(torch.linalg.vector_norm(tensor)) ** 2
        if part.stale != "none":
            return self._delay(part, index, tensor)
        # Of the integer wire, every second message carries the exponents.
        group = index // 2 if part.wire == "int32" else index
        return _Message(self, self.start(tensor, group, options), tensor, group)

    def _delay(self, part: Reduction, index: int, fresh: Tensor) -> Work:
        names = part.grouping.groups[index].names
        return self.history.exchange(
            part.stale,
            {name: self._parameters[name].numel() for name in names},
            fresh,
            lambda tensor: self.start(tensor, index),
            lambda error: self.failure(index, error),
        )

    def arrived(self, tensor: Tensor, group: int) -> None:
        """Look at a reduced message before the optimizer does."""
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

    def __init__(self, messages: Messages, inner: Any, tensor: Tensor, group: int) -> None:
        super().__init__()
        self._messages, self._inner, self._tensor, self._group = messages, inner, tensor, group

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the sum over all ranks stands in the tensor."""
        try:
            self._inner.wait()
        except RuntimeError as error:
            raise self._messages.failure(self._group, error) from error
        self._messages.arrived(self._tensor, self._group)
        return True
