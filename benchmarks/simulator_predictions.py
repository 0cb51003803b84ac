"""Published figures at scale that nothing was fitted to, with bands over the inputs assumed.

The runs themselves cannot be modelled from what is published: step time, gradient bytes, jitter and
the cost of negotiation are not stated. So each prediction is one value on the middle of the assumed
inputs and a band over all of them; a published figure within its band is explained, not reproduced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain, pairwise, product
from typing import Any, NamedTuple

from benchmarks.simulator_profiles import resnet
from graphopt.network.clusters import CLUSTERS
from graphopt.network.negotiation import Negotiator
from graphopt.network.straggler import delay
from graphopt.plan.grouping import Group, Ready
from graphopt.simulate import Timeline, scaling

BACKWARD = 2 / 3
LAANAIT = {"step, s": (0.3, 0.6, 1.2), "gradient, bytes": (5e7, 2e8, 8e8)}
RESNET_50 = float(resnet((3, 4, 6, 3)).parameters)
ASSUMED = {
    "SC'18 and Laanait": (
        "100 layers of equal bytes and equal time, a message per layer",
        "the 'summit' profile, whose latencies and bandwidths are assumed",
        "step time, gradient bytes and jitter of a step, as listed with each band",
    ),
    "Sony": (
        "the 'abci' profile, whose latencies and bandwidths are assumed, as a 32 x 34 torus",
        "messages of equal bytes, at equal distances in backward",
        "efficiency relative to one GPU",
    ),
    "2x at 6,000": (
        "it is the step with a coordinator over the one with a bit vector, all else equal",
        "groups of equal bytes, at equal distances in backward; 200 MB of gradients",
        "what rank 0 spends on a message and on a tensor, as listed with the band",
    ),
}


class Case(NamedTuple):
    """A published figure and what its prediction takes.

    Attributes:
        name: who, and of what.
        world: number of GPUs.
        figure: what the number is.
        published: its value.
        bands: low, middle and high of each assumed input.
        model: the figure, from one value of each input in that order.
    """

    name: str
    world: int
    figure: str
    published: float
    bands: dict[str, tuple[float, float, float]]
    model: Callable[..., float]


@cache
def costs(machine: str, world: int, algorithm: str = "auto") -> Callable[[float], float]:
    """Seconds of one all-reduce there by its bytes."""
    return CLUSTERS[machine].all_reduce(world, algorithm)


def efficiency(
    cost: Callable[[float], float],
    world: int,
    step: float,
    size: float,
    messages: float,
    jitter: float,
    *,
    lag: bool = False,
) -> float:
    """Efficiency relative to one GPU.

    Args:
        cost: seconds of an all-reduce by its bytes.
        world: number of GPUs.
        step: seconds on one GPU.
        size: bytes of all gradients.
        messages: into how many equal ones they are divided.
        jitter: standard deviation of one rank's step, as a share of it.
        lag: whether all communication hides behind the next step.
    """
    backward, free = BACKWARD * step, 0.0
    for number in range(1, int(messages) + 1):
        free = max(free, backward * number / messages) + cost(size / messages)
    late = 0.0 if lag else free - backward
    return step / (step + late + delay(world, jitter * step))


def coordinated(
    world: int, step: float, tensors: float, messages: float, message: float, tensor: float
) -> float:
    """The step with a coordinator over the same step with a bit vector.

    Args:
        world: number of GPUs.
        step: seconds on one GPU.
        tensors: number of gradients.
        messages: into how many groups they are divided.
        message: seconds that rank 0 spends on the message of one rank.
        tensor: seconds that it spends on one tensor of one rank.
    """
    backward, machine, size = BACKWARD * step, CLUSTERS["summit"], int(2e8 / tensors)
    ready = tuple(Ready(str(k), size, backward * (k + 1) / tensors) for k in range(int(tensors)))
    groups = divided(ready, int(messages))
    timeline = Timeline(step - backward, max(backward, ready[-1].seconds), ready)
    times = []
    for name in ("coordinator", "bit_vector"):
        negotiator = Negotiator(name, message, tensor)

        def negotiation(
            ranks: int, negotiator: Negotiator = negotiator
        ) -> Callable[[Group], float]:
            link = machine.hop(ranks)
            return lambda g: negotiator.seconds(ranks, len(g.names), len(ready), link)

        (point,) = scaling(
            timeline,
            lambda *_: groups,
            partial(costs, "summit"),
            [world],
            negotiation=negotiation,
        )
        times.append(point.step)
    return times[0] / times[1]


def divided(ready: Sequence[Ready], count: int) -> list[Group]:
    """Consecutive groups of nearly as many gradients each."""
    edges = [round(len(ready) * k / count) for k in range(count + 1)]
    parts = [ready[a:b] for a, b in pairwise(edges)]
    return [
        Group(tuple(r.name for r in part), sum(r.bytes for r in part), "float32") for part in parts
    ]


def cases(jitter: float) -> list[Case]:
    """All of them; `jitter` is the upper end of that band."""
    jitters = {"jitter / step": (0.005, 0.015, jitter)}
    deeplab = {"step, s": (0.5, 1.0, 2.0), "gradient, bytes": (9e7, 1.75e8, 3.5e8), **jitters}

    def summit(world: int, step: float, size: float, spread: float, lag: bool = False) -> float:
        return efficiency(costs("summit", world), world, step, size, 100, spread, lag=lag)

    def sony(step: float, bytes_: float, messages: float, spread: float) -> float:
        cost = costs("abci", 1088, "torus")
        return efficiency(cost, 1088, step, bytes_ * RESNET_50, messages, spread)

    name = "SC'18 DeepLabv3+, FP32, lag"
    return [
        Case(f"{name} 0", 27_360, "efficiency", 0.907, deeplab, partial(summit, 27_360)),
        Case(f"{name} 1", 27_360, "efficiency", 0.907, deeplab, partial(summit, 27_360, lag=True)),
        Case(
            "Laanait FC-DenseNet",
            27_600,
            "efficiency",
            0.93,
            LAANAIT | jitters,
            partial(summit, 27_600),
        ),
        Case(
            "Sony ResNet-50, 2-D torus",
            1_088,
            "efficiency",
            0.9162,
            {
                "step, s": (0.05, 0.1, 0.2),
                "bytes per parameter": (2.0, 2.0, 4.0),
                "messages": (1, 8, 50),
                **jitters,
            },
            sony,
        ),
        Case(
            "Laanait, bit vector over coordinator",
            6_000,
            "times as fast",
            2.0,
            {
                "step, s": LAANAIT["step, s"],
                "tensors": (100, 300, 600),
                "messages": (10, 30, 100),
                "message at rank 0, s": (5e-7, 1e-6, 5e-6),
                "tensor at rank 0, s": (1e-7, 1e-6, 3e-6),
            },
            partial(coordinated, 6_000),
        ),
    ]


def predictions(jitter: float) -> list[dict[str, Any]]:
    """Each figure on the middle of its inputs, its band, and what one input alone does to it.

    Args:
        jitter: that of the Cori fit, the upper end of the band.
    """
    result = []
    for case in cases(jitter):
        central = [middle for _, middle, _ in case.bands.values()]
        predicted = case.model(*central)
        alone = {
            label: [case.model(*central[:k], value, *central[k + 1 :]) for value in band]
            for k, (label, band) in enumerate(case.bands.items())
        }
        corners = product(*((low, high) for low, _, high in case.bands.values()))
        values = [*(case.model(*inputs) for inputs in corners), *chain(*alone.values())]
        result.append(
            {
                "case": case.name,
                "world": case.world,
                "figure": case.figure,
                "published": case.published,
                "predicted": predicted,
                "error": predicted - case.published,
                "band": (min(values), max(values)),
                "assumed": case.bands,
                "sensitivity": alone,
            }
        )
    return result


def tensor_cost_of(published: float, world: int = 6_000) -> float:
    """Seconds per tensor and rank at a coordinator that would explain a published ratio.

    The other inputs are in the middle of their bands.
    """
    bands = cases(0.0)[-1].bands
    central = [middle for _, middle, _ in bands.values()][:-1]
    low, high = 0.0, 1e-4
    for _ in range(30):
        middle = (low + high) / 2
        below = coordinated(world, *central, middle) < published
        low, high = (middle, high) if below else (low, middle)
    return high
