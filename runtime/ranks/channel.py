"""The way of one model's messages: a process group around the user's own.

The graph's collectives find it by name, whatever backend runs the graph. It counts the messages of
a step, says whose fault it is when one fails, watches reduced gradients for NaN, measures gradient
noise, and delays results where the plan says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work, _register_process_group
from torch.distributed.distributed_c10d import GroupName

from graphopt.errors import RankError
from graphopt.plan import Plan
from graphopt.plan.grouping import Group
from graphopt.runtime.group_gradients.delayed import History
from graphopt.runtime.group_gradients.noise_scale import NoiseScale
from graphopt.runtime.ranks.agreement import Agreement, ranks

# Steps between two measurements of gradient noise; each reads the gradients twice.
NOISE_INTERVAL = 8
# Seconds in which other ranks may report that they failed, too, before one counts as missing.
GRACE = 5.0


class Channel(dist.ProcessGroup):
    """Carries the messages of one plan.

    Args:
        inner: the group that does the work.
        agreement: how the ranks talk when messages do not arrive.
        name: what collectives of the graph call it.

    Attributes:
        step: number of reducing backward passes so far.
        noise: gradient noise scale; its batch is counted in examples.
        nonfinite: what was found in reduced gradients: step, group and parameter.
        history: messages of the step before, where the plan delays results.
    """

    def __init__(self, inner: dist.ProcessGroup, agreement: Agreement, name: str) -> None:
        super().__init__(inner.rank(), inner.size())  # type: ignore[call-arg]
        self.inner = inner
        self.agreement = agreement
        self.channel = name
        self.step = 0
        self.noise = NoiseScale()
        self.nonfinite: list[str] = []
        self.batch = 1
        self.groups: tuple[Group, ...] = ()
        self._plan: Plan | None = None
        self._sent = 0
        self._local = self._reduced = 0.0
        self._parameters: Mapping[str, Tensor] = {}
        self.history = History(inner.rank())
        _register_process_group(GroupName(name), self)

    def begin(self, plan: Plan, parameters: Mapping[str, Tensor]) -> None:
        """Start the messages of one backward pass of these parameters."""
        assert plan.grouping is not None
        self._plan = plan
        self._parameters = parameters
        self.groups = plan.grouping.groups
        self.step += 1
        self._sent = 0
        self._local = self._reduced = 0.0

    def end(self) -> None:
        """All messages of the step have arrived."""
        if not self._measures() or self._plan is None:
            return
        unscaled = self._plan.tangent_scale * self.size()
        squares = torch.tensor([self._local / self._plan.tangent_scale**2 / self.size()])
        if unscaled != 1.0:  # messages carried gradients divided by nothing: their sum is no mean
            self._reduced /= self.size() ** 2 * self._plan.tangent_scale**2
        self.inner.allreduce([squares]).wait()
        self.noise.update(float(squares), self._reduced, self.size(), self.batch)

    def _measures(self) -> bool:
        native = self._plan is not None and self._plan.wire == "native"
        fresh = self._plan is not None and self._plan.stale == "none"
        return native and fresh and (self.step - 1) % NOISE_INTERVAL == 0

    # -- the interface of a process group ----------------------------------------------------------

    def allreduce(  # type: ignore[override]
        self, tensors: Any, options: Any = None
    ) -> Work:
        """Start one message; called by the graph's collectives."""
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        index = self._sent
        self._sent += 1
        plan = self._plan
        # Of the integer wire, every second message carries the exponents.
        group = index // 2 if plan is not None and plan.wire == "int32" else index
        if self._measures():
            self._local += float(torch.linalg.vector_norm(tensors[0])) ** 2
        if plan is not None and plan.stale != "none":
            return self._delay(plan, index, tensors[0])
        inner = self.start(tensors[0], group, options)
        return _Message(self, inner, tensors[0], group)

    def start(self, tensor: Tensor, group: int, options: Any = None) -> Any:
        """Start to reduce a tensor in place; a failure names the group.

        Raises:
            RankError: the message cannot be sent.
        """
        try:
            return self.inner.allreduce([tensor], options or dist.AllreduceOptions())
        except RuntimeError as error:
            raise self.failure(group, error) from error

    def getBackendName(self) -> str:
        """The name that torch shows."""
        return "graphopt"

    # -- what may happen to a message --------------------------------------------------------------

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
        names = self.groups[group].names if group < len(self.groups) else ()
        place = f"group {group} ({names[0]} … {names[-1]})" if names else f"group {group}"
        self.nonfinite.append(f"step {self.step}, {place}")

    def failure(self, group: int, error: BaseException) -> RankError:
        """Who is missing, as far as the other ranks' reports tell."""
        what = "which gradients each rank has was not agreed on"
        if group < len(self.groups):
            about = self.groups[group].names
            which = f"group {group} ({about[0]} … {about[-1]})"
            what = f"the gradients of {which} were not reduced in step {self.step}"
        try:
            topic = f"failed/{self.step}"
            missing = self.agreement.missing(topic, str(group), GRACE)
            who = f"{ranks(missing)} did not answer" if missing else "no rank is missing"
        except RuntimeError:
            who = "the job's store is gone, and with it the process that holds it"
        return RankError(
            f"{what}: {who}",
            where=str(error).splitlines()[0],
            hint="look at the output of that rank; the gradients of this step are not usable",
        )

    # -- results of the step before ----------------------------------------------------------------

    def _delay(self, plan: Plan, index: int, fresh: Tensor) -> Work:
        return self.history.exchange(
            plan.stale,
            {name: self._parameters[name].numel() for name in self.groups[index].names},
            fresh,
            lambda tensor: self.start(tensor, index),
            lambda error: self.failure(index, error),
        )


class _Message(Work):
    """A message on its way."""

    def __init__(self, channel: Channel, inner: Any, tensor: Tensor, group: int) -> None:
        super().__init__()
        self._channel, self._inner, self._tensor, self._group = channel, inner, tensor, group

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Until the sum over all ranks stands in the tensor."""
        try:
            self._inner.wait()
        except RuntimeError as error:
            raise self._channel.failure(self._group, error) from error
        self._channel.arrived(self._tensor, self._group)
        return True


def warn_nonfinite(channel: Channel, names: Sequence[str]) -> None:
    """Say once which gradients are not finite; an AMP scaler may mean to skip the step."""
    if names and len(channel.nonfinite) == 1:
        warnings.warn(
            f"reduced gradients are not finite in {channel.nonfinite[0]}: {', '.join(names[:4])}",
            RuntimeWarning,
            stacklevel=2,
        )
