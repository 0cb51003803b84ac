"""Pipelined backpropagation with all stages in one process.

A pipeline that is never drained (Kosson et al., arXiv 2003.11666): every stage takes turns between
the forward of a new sample and the backward of an older one, and updates its weights after each
backward. What a stage computes depends only on the order of its own forwards and backwards and on
what its neighbours sent. So stages may run here one after the other, round by round. In round r,
stage s runs

1. the forward of sample ``r + delays[s]``,
2. the backward of sample ``r``,
3. an update.

Before the first round it runs the forwards of samples 0 to ``delays[s] - 1``. With the delays of
`pipelined_delay` these are the time steps of the paper (round r of a stage is its time step
``r + delays[s]`` after its first), with those of `alternating_delay` 1F1B without a flush.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from graphopt.errors import ArgumentError
from graphopt.optim import DelayedSGD, accumulated_delay
from graphopt.study.constant_delay import check_delay


@dataclass
class _InFlight:
    """A sample between its forward and its backward in one stage.

    Attributes:
        received: the stage's input; a leaf.
        weights: leaves that the forward used, by name. They are not the parameters: some operators
            save a leaf and read at their backward what it has become.
        result: the stage's output, or the loss of the last stage.
    """

    received: Tensor
    weights: dict[str, Tensor]
    result: Tensor


class _Stage:
    def __init__(self, module: nn.Module, delay: int) -> None:
        self.module = module
        self.delay = delay
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.inbox: deque[Tensor] = deque()
        self.forwards = 0
        self.in_flight: deque[_InFlight] = deque()


class PipelinedBackpropagation:
    """Trains a list of stages, each with its own delay, one sample or micro-batch at a time.

    Which weights a backward sees, with the forward D updates ago:

    * ``"stash"``: those of its forward, predicted ones included. Updates give the parameters new
      memory, and what is in flight keeps the old one.
    * ``"inconsistent"``: the current ones. Only the activations are from D updates ago.

    If the optimizer is a `DelayedSGD` with a prediction, forwards use the predicted weights; the
    paper's combination is that with ``"inconsistent"``. The delays of its parameter groups, one per
    stage, must be those of the stages.

    Without delays, this is training on one sample after the other, bit for bit.

    Args:
        stages: modules that take one tensor and return one.
        optimizer: of all stages' parameters.
        loss: of the last stage's output and the target; one element.
        delays: updates between forward and backward for each stage; they do not increase from stage
            to stage, and the last is 0. See `pipelined_delay` and `alternating_delay`.
        weights: what a backward sees.
        accumulate: samples per update, whose gradients are averaged. `delays` stay in samples; the
            optimizer's are in updates, `accumulated_delay`.

    Raises:
        ArgumentError: delays do not fit together or to the optimizer, stages share a parameter, an
            argument is unknown, or the optimizer gives parameters new memory although backwards
            shall see the current weights.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        optimizer: Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor],
        delays: Sequence[int],
        *,
        weights: Literal["stash", "inconsistent"] = "stash",
        accumulate: int = 1,
    ) -> None:
        _check(stages, delays, weights, accumulate)
        if weights == "inconsistent" and getattr(optimizer, "rebind", False):
            raise ArgumentError(
                "an optimizer with rebind=True leaves old weights to the backwards",
                hint="make it without rebind, or use weights='stash'",
            )
        for stage, delay in zip(stages, delays, strict=True):
            check_delay(optimizer, accumulated_delay(delay, accumulate), list(stage.parameters()))
        self.optimizer = optimizer
        self.loss = loss
        self.weights = weights
        self.accumulate = accumulate
        self._stages = [_Stage(m, d) for m, d in zip(stages, delays, strict=True)]
        self._targets: deque[Tensor] = deque()
        self._rounds = 0
        self._fed = 0

    def step(self, inputs: Tensor, target: Tensor) -> Tensor | None:
        """Feed one sample or micro-batch, and run the round that it makes possible.

        Returns:
            The loss of the sample that reaches the last stage, fed ``delays[0]`` calls ago and
            without a graph; ``None`` while the pipeline fills.
        """
        self._stages[0].inbox.append(inputs.detach())
        self._targets.append(target)
        self._fed += 1
        if self._fed <= self._stages[0].delay:
            predicted = self._predict()
            for stage in range(len(self._stages)):
                # Further stages get what they have to do before their first update.
                if self._stages[stage].forwards < self._stages[stage].delay:
                    self._forward(stage, predicted)
            return None
        return self._round()

    def drain(self) -> list[Tensor]:
        """Finish all samples in flight; the next sample meets an empty pipeline.

        Returns:
            Their losses, in order.
        """
        losses = []
        while self._rounds < self._fed:
            losses.append(self._round())
        if self._rounds % self.accumulate:
            self._update(self._rounds % self.accumulate)
        for stage in self._stages:
            stage.forwards = 0
        self._rounds = self._fed = 0
        return losses

    def _round(self) -> Tensor:
        predicted = self._predict()
        for index in range(len(self._stages)):
            if self._stages[index].inbox:
                self._forward(index, predicted)
        loss = self._stages[-1].in_flight[0].result.detach()
        gradient: Tensor | None = None
        for stage in reversed(self._stages):
            gradient = self._backward(stage, gradient)
        self._rounds += 1
        if self._rounds % self.accumulate == 0:
            self._update(self.accumulate)
        return loss

    def _predict(self) -> dict[Tensor, Tensor]:
        return self.optimizer.predict() if isinstance(self.optimizer, DelayedSGD) else {}

    def _forward(self, index: int, predicted: dict[Tensor, Tensor]) -> None:
        stage = self._stages[index]
        received = stage.inbox.popleft()
        if index > 0 and received.is_floating_point():
            received.requires_grad_()
        # `data` shares memory with the parameter, but not the count of changes.
        weights = {
            name: predicted.get(parameter, parameter.data).requires_grad_()
            for name, parameter in stage.parameters.items()
        }
        with torch.enable_grad():
            result = functional_call(stage.module, weights, (received,))
            if index + 1 < len(self._stages):
                self._stages[index + 1].inbox.append(result.detach())
            else:
                result = self.loss(result, self._targets.popleft())
        stage.in_flight.append(_InFlight(received, weights, result))
        stage.forwards += 1

    def _backward(self, stage: _Stage, gradient: Tensor | None) -> Tensor | None:
        """Add to the parameters' ``grad``; the gradient of what the stage received."""
        sample = stage.in_flight.popleft()
        if self.weights == "inconsistent":
            for name, parameter in stage.parameters.items():
                used = sample.weights[name].data
                if used.data_ptr() != parameter.data_ptr():  # it was a prediction
                    used.copy_(parameter.data)
        leaves = list(sample.weights.values())
        if sample.received.requires_grad:
            leaves.append(sample.received)
        if not leaves:
            return None
        if not sample.result.requires_grad:
            found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        else:
            found = torch.autograd.grad(sample.result, leaves, gradient, allow_unused=True)
        for parameter, own in zip(stage.parameters.values(), found, strict=False):
            if own is not None:
                parameter.grad = own if parameter.grad is None else parameter.grad.add_(own)
        return found[-1] if sample.received.requires_grad else None

    def _update(self, samples: int) -> None:
        parameters = [p for stage in self._stages for p in stage.parameters.values()]
        if samples > 1:
            torch._foreach_div_([p.grad for p in parameters if p.grad is not None], samples)
        if self.weights == "stash" and not getattr(self.optimizer, "rebind", False):
            for parameter in parameters:
                parameter.data = parameter.data.clone()
        self.optimizer.step()
        for parameter in parameters:
            parameter.grad = None


def _check(
    stages: Sequence[nn.Module], delays: Sequence[int], weights: str, accumulate: int
) -> None:
    if not stages or len(delays) != len(stages):
        raise ArgumentError(
            f"{len(delays)} delays were given for {len(stages)} stages",
            hint="pass [pipelined_delay(s, len(stages)) for s in range(len(stages))]",
        )
    for index, (here, following) in enumerate(pairwise([*delays, 0])):
        if here < following or (index + 1 == len(stages) and here != 0):
            raise ArgumentError(
                f"the delays {list(delays)} are those of no pipeline",
                where=f"stage {index}",
                hint="delays never rise from stage to stage, and the last one is 0",
            )
    if weights not in ("stash", "inconsistent"):
        raise ArgumentError(f"weights={weights!r} is unknown", hint="use 'stash' or 'inconsistent'")
    if accumulate < 1:
        raise ArgumentError(f"accumulate={accumulate} is not positive", hint="use 1")
    owner: dict[Tensor, int] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            if owner.setdefault(parameter, index) != index:
                raise ArgumentError(
                    f"parameter {name!r} of stage {index} is in stage {owner[parameter]}, too",
                    where=name,
                    hint="give stages parameters of their own; a shared one has no single delay",
                )
