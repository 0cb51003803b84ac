"""Train one task by different methods: the same model, batches and schedule, another gradient.

K-FAC is an ordinary optimizer on a model whose gradients graphopt preconditions; see `optimizers`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import graphopt
from graphopt.optim import LARC, LARS, Muon, PolynomialDecay, groups
from graphopt.passes.kfac import Kfac
from graphopt.pipeline.spec import parse_spec

SGD_MOMENTUM, ADAMW, TORCH_MUON, MUON = "SGD, momentum", "AdamW", "torch Muon", "graphopt Muon"
LARC_SGD, LARS_SGD, KFAC = "LARC", "LARS", "K-FAC"
# One setting of each beside the learning rate, and its usual value.
USUAL: dict[str, tuple[str, float]] = {
    SGD_MOMENTUM: ("momentum", 0.9),
    ADAMW: ("second beta", 0.999),
    TORCH_MUON: ("momentum", 0.95),
    MUON: ("momentum", 0.95),
    LARC_SGD: ("trust", 0.002),
    LARS_SGD: ("trust", 0.001),
    KFAC: ("times the damping", 1.0),
}
METHODS = tuple(USUAL)
MOMENTUM = 0.9
DECAY = 0.01  # of AdamW, and of what is in one optimizer with it

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """What is trained, and when it counts as done.

    Attributes:
        name: for tables.
        model: makes a new model from PyTorch's global random state.
        batches: training batches in an order drawn from the seed; never ends.
        loss: mean loss of outputs and targets.
        evaluate: the measured value of a model in evaluation mode.
        target: the value to reach.
        rising: whether more is better.
        steps: length of one training, over which the learning rate decays linearly to 0.
        every: steps between two evaluations.
        kfac: the pass, with its options.
        rates: the tuned learning rate of each method.
        settings: the tuned setting, see `USUAL`, of those that take another than the usual one.
        decays: whether the learning rate decays; otherwise it is constant.
    """

    name: str
    model: Callable[[], nn.Module]
    batches: Callable[[int], Iterator[Batch]]
    loss: Callable[[Tensor, Tensor], Tensor]
    evaluate: Callable[[nn.Module], float]
    target: float
    rising: bool
    steps: int
    every: int
    kfac: str
    rates: Mapping[str, float]
    settings: Mapping[str, float] = field(default_factory=dict)
    decays: bool = True

    def reached(self, value: float) -> bool:
        """Whether `value` is at the target or better."""
        return value >= self.target if self.rising else value <= self.target


@dataclass
class Run:
    """What one training showed.

    Attributes:
        setup: seconds until the first step: for K-FAC, capturing the model and rewriting it.
        points: steps done, seconds they took without `setup` and evaluations, measured value.
        steps_to_target: steps after which the target was first seen; ``None`` for never.
        seconds_to_target: their seconds.
    """

    setup: float = 0.0
    points: list[tuple[int, float, float]] = field(default_factory=list)
    steps_to_target: int | None = None
    seconds_to_target: float | None = None

    def add(self, task: Task, step: int, seconds: float, value: float) -> None:
        """Note an evaluation."""
        self.points.append((step, seconds, value))
        if self.steps_to_target is None and task.reached(value):
            self.steps_to_target, self.seconds_to_target = step, seconds


def optimizers(
    method: str,
    model: nn.Module,
    example: Tensor,
    rate: float,
    kfac: str,
    setting: float | None = None,
) -> list[Optimizer]:
    """The optimizers of a method; for K-FAC, `model` is rewritten in place.

    All else is at the values of PyTorch, or of the papers.

    Args:
        method: one of `METHODS`.
        model: what is trained.
        example: an input of the model.
        rate: learning rate.
        kfac: the passes for K-FAC, as text.
        setting: of the method, see `USUAL`; ``None`` for its usual value.

    Raises:
        ValueError: the method is unknown.
    """
    if method not in USUAL:
        raise ValueError(f"{method!r} is none of {', '.join(METHODS)}")
    value = USUAL[method][1] if setting is None else setting
    if method == SGD_MOMENTUM:
        return [SGD(model.parameters(), lr=rate, momentum=value)]
    if method == ADAMW:
        return [AdamW(model.parameters(), lr=rate, betas=(0.9, value), weight_decay=DECAY)]
    if method == TORCH_MUON:
        return _torch_muon(model, rate, value)
    if method == MUON:
        return [Muon(model, example, lr=rate, momentum=value, weight_decay=DECAY)]
    if method == KFAC:
        passes = [
            replace(p, damping=p.damping * value) if isinstance(p, Kfac) else p
            for p in parse_spec(kfac)
        ]
        graphopt.optimize(model, (example,), passes=passes, backend="eager", verify="structure")
        return [SGD(model.parameters(), lr=rate, momentum=MOMENTUM)]
    decayed = groups(model, example, weight_decay=0.0)  # plain SGD has none here
    if method == LARS_SGD:
        return [LARS(decayed, rate, momentum=MOMENTUM, trust=value)]
    return [LARC(SGD(decayed, lr=rate, momentum=MOMENTUM), value)]


def _torch_muon(model: nn.Module, rate: float, momentum: float) -> list[Optimizer]:
    """For matrices between layers; the first and last layer and all else go to AdamW.

    It is scaled so that its updates are as large as AdamW's; thus one learning rate serves both.
    """
    inner = {id(p) for p in _inner_matrices(model)}
    rest = [p for p in model.parameters() if id(p) not in inner]
    matrices = [p for p in model.parameters() if id(p) in inner]
    return [
        torch.optim.Muon(
            matrices,
            lr=rate,
            weight_decay=DECAY,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        ),
        AdamW(rest, lr=rate, weight_decay=DECAY),
    ]


def _inner_matrices(model: nn.Module) -> list[nn.Parameter]:
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return linear[:-1]  # the last one computes the logits


def train(
    task: Task,
    method: str,
    rate: float,
    seed: int,
    steps: int | None = None,
    setting: float | None = None,
) -> Iterator[Run]:
    """Train, step by step, so that methods can take turns; yields after each evaluation.

    Args:
        task: what to train.
        method: one of `METHODS`.
        rate: its first learning rate.
        seed: of the weights and of the order of the batches.
        steps: stop after so many; the schedule stays that of the whole training.
        setting: of the method, see `USUAL`; ``None`` for its usual value.

    Yields:
        The same `Run`, growing.
    """
    torch.manual_seed(seed)
    model = task.model().train()
    batches = task.batches(seed)
    first = next(batches)
    run = Run()
    start = time.perf_counter()
    used = optimizers(method, model, first[0], rate, task.kfac, setting)
    run.setup = time.perf_counter() - start
    schedules = [
        PolynomialDecay(o, start=0, end=task.steps, power=1, steps_per_epoch=1, momentum=None)
        for o in used
        if task.decays
    ]
    seconds = 0.0
    batch = first
    for step in range(1, min(steps or task.steps, task.steps) + 1):
        start = time.perf_counter()
        for optimizer in used:
            optimizer.zero_grad()
        task.loss(model(batch[0]), batch[1]).backward()
        for optimizer in used:
            optimizer.step()
        for schedule in schedules:
            schedule.step()
        seconds += time.perf_counter() - start
        batch = next(batches)
        if step % task.every == 0:
            model.eval()
            with torch.no_grad():
                value = task.evaluate(model)
            model.train()
            run.add(task, step, seconds, value)
            yield run
