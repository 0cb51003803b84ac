"""All stages in one process against a reference that keeps every version of every weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import vjp
from torch.func import functional_call

from graphopt.errors import ArgumentError
from graphopt.optim import (
    DelayedSGD,
    accumulated_delay,
    alternating_delay,
    pipelined_delay,
)
from graphopt.study import PipelinedBackpropagation

LAWS = {"pipelined": pipelined_delay, "alternating": alternating_delay}
SAMPLES = 13


class Scale(nn.Module):
    """Multiplies by a parameter that is saved as it is, unlike the transposed one of a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3, 1, 1, dtype=torch.float64) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def stages(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Tanh()).double(),
        Scale(),
        nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.Softplus()).double(),
        nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).double(),
    ][4 - count :]


def data(count: int) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=random),
            torch.randint(4, (2,), generator=random),
        )
        for _ in range(count)
    ]


def groups(modules: Sequence[nn.Module], delays: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"params": list(module.parameters()), "delay": delay}
        for module, delay in zip(modules, delays, strict=True)
    ]


Weights = dict[str, Tensor]


def reference(
    modules: Sequence[nn.Module],
    delays: Sequence[int],
    *,
    consistent: bool,
    lr: float = 0.05,
    momentum: float = 0.0,
    compensated: bool = False,
    predicted: bool = False,
    accumulate: int = 1,
) -> tuple[list[Weights], list[float]]:
    """Weights after all samples, and losses; sample by sample, from stored versions.

    Update u of a stage uses samples ``u * accumulate`` onwards. A stage has seen
    ``(i - delay) // accumulate`` updates when sample i goes forward.
    """
    versions = [[{n: p.detach().clone() for n, p in m.named_parameters()}] for m in modules]
    velocity = [{n: torch.zeros_like(p) for n, p in m.named_parameters()} for m in modules]
    # Of each version: the velocity it was left with.
    velocities = [[dict(v)] for v in velocity]
    sums = [{n: torch.zeros_like(p) for n, p in m.named_parameters()} for m in modules]
    losses = []
    for sample, (x, target) in enumerate(data(SAMPLES)):
        received, used = [x], []
        for index, module in enumerate(modules):
            version = max(0, sample - delays[index]) // accumulate
            forward = dict(versions[index][version])
            if predicted:
                horizon = -(-delays[index] // accumulate)
                for name in forward:
                    ahead = lr * horizon * velocities[index][version][name]
                    forward[name] = forward[name] - ahead
            used.append(forward)
            received.append(functional_call(module, forward, (received[-1],)))
        wanted = received[-1].detach().requires_grad_()
        loss = F.cross_entropy(wanted, target)
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, wanted)
        for index in reversed(range(len(modules))):
            module, names = modules[index], list(versions[index][0])
            weights = used[index] if consistent else versions[index][sample // accumulate]

            def run(
                inputs: Tensor, *values: Tensor, module: nn.Module = module, names: Any = names
            ) -> Tensor:
                return functional_call(module, dict(zip(names, values, strict=True)), (inputs,))

            arguments = (received[index], *(weights[n] for n in names))
            _, found = vjp(run, arguments, gradient)
            gradient = found[0]
            for name, own in zip(names, found[1:], strict=True):
                sums[index][name] += own
            if (sample + 1) % accumulate and sample + 1 < SAMPLES:
                continue
            a, b = 1.0, 0.0
            if compensated:
                missed = -(-delays[index] // accumulate)
                a, b = momentum**missed, sum(momentum**i for i in range(missed))
            following = {}
            for name in names:
                mean = sums[index][name] / (sample % accumulate + 1)
                velocity[index][name] = momentum * velocity[index][name] + mean
                step = a * velocity[index][name] + b * mean
                following[name] = versions[index][-1][name] - lr * step
                sums[index][name] = torch.zeros_like(mean)
            versions[index].append(following)
            velocities[index].append(dict(velocity[index]))
    return [v[-1] for v in versions], losses


def trained(
    modules: list[nn.Module], training: PipelinedBackpropagation, samples: int = SAMPLES
) -> tuple[list[Weights], list[float]]:
    losses = [training.step(x, target) for x, target in data(samples)]
    found = [loss.item() for loss in losses if loss is not None]
    found += [loss.item() for loss in training.drain()]
    return [{n: p.detach() for n, p in m.named_parameters()} for m in modules], found


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-12)
    assert found[1] == pytest.approx(expected[1], rel=1e-11)


@pytest.mark.parametrize("weights", ["stash", "inconsistent"])
def test_one_stage_is_sequential_training_bit_for_bit(weights: Any) -> None:
    ours, theirs = nn.Sequential(*stages(4)), nn.Sequential(*stages(4))
    training = PipelinedBackpropagation(
        [ours], DelayedSGD(ours.parameters(), lr=0.05), F.cross_entropy, [0], weights=weights
    )
    found, losses = trained([ours], training)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.9)
    for (x, target), loss in zip(data(SAMPLES), losses, strict=True):
        optimizer.zero_grad()
        expected = F.cross_entropy(theirs(x), target)
        expected.backward()
        optimizer.step()
        assert loss == expected.item()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(found[0][name], parameter)


@pytest.mark.parametrize("rebind", [False, True])
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_stash_is_the_reference(count: int, law: str, rebind: bool) -> None:
    modules = stages(count)
    delays = [LAWS[law](s, count) for s in range(count)]
    expected = reference(modules, delays, consistent=True, momentum=0.9, compensated=True)
    optimizer = DelayedSGD(groups(modules, delays), lr=0.05, momentum=0.9, rebind=rebind)
    training = PipelinedBackpropagation(modules, optimizer, F.cross_entropy, delays)
    close(trained(modules, training), expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_inconsistent_is_the_reference_with_activations_of_then(count: int, law: str) -> None:
    """What a stage received, and the weights of now."""
    modules = [first_order(m) for m in stages(count)]
    delays = [LAWS[law](s, count) for s in range(count)]
    expected = reference(modules, delays, consistent=False, momentum=0.9)
    optimizer = DelayedSGD(groups(modules, delays), lr=0.05, compensation="none")
    training = PipelinedBackpropagation(
        modules, optimizer, F.cross_entropy, delays, weights="inconsistent"
    )
    found = trained(modules, training)
    close(found, expected)
    if count > 2:  # nobody reads the gradient of the first stage's input
        fresh = [first_order(m) for m in stages(count)]
        stashed = reference(fresh, delays, consistent=True, momentum=0.9)
        assert found[1][-1] != pytest.approx(stashed[1][-1], rel=1e-6)


def first_order(module: nn.Module) -> nn.Module:
    """The same without activation functions and norms.

    Saved activations are of the forward's weights, which the reference, computing anew from what
    the stage received, would not know. Those of bilinear operators are what was received.
    """
    if not isinstance(module, nn.Sequential):
        return module
    kept = [m for m in module if isinstance(m, nn.Conv2d | nn.Linear | nn.Flatten)]
    return nn.Sequential(*kept)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("weights", ["stash", "inconsistent"])
def test_predicted_forwards_are_the_reference(weights: Any, count: int) -> None:
    modules = [first_order(m) for m in stages(count)]
    delays = [pipelined_delay(s, count) for s in range(count)]
    expected = reference(
        modules,
        delays,
        consistent=weights == "stash",
        momentum=0.9,
        compensated=True,
        predicted=True,
    )
    optimizer = DelayedSGD(groups(modules, delays), lr=0.05, prediction="velocity")
    training = PipelinedBackpropagation(
        modules, optimizer, F.cross_entropy, delays, weights=weights
    )
    close(trained(modules, training), expected)


def test_other_optimizers_are_stashed_by_copies() -> None:
    modules = stages(3)
    expected = reference(modules, [4, 2, 0], consistent=True)
    optimizer = torch.optim.SGD([p for m in modules for p in m.parameters()], lr=0.05)
    training = PipelinedBackpropagation(modules, optimizer, F.cross_entropy, [4, 2, 0])
    close(trained(modules, training), expected)


def test_micro_batches_accumulate_to_the_mean() -> None:
    modules = stages(3)
    delays = [4, 2, 0]
    updates = [accumulated_delay(d, 3) for d in delays]
    options = {"momentum": 0.9, "compensated": True, "accumulate": 3}
    expected = reference(modules, delays, consistent=True, **options)
    optimizer = DelayedSGD(groups(modules, updates), lr=0.05)
    training = PipelinedBackpropagation(modules, optimizer, F.cross_entropy, delays, accumulate=3)
    close(trained(modules, training), expected)


@pytest.mark.parametrize("samples", [1, 3, 7])
def test_a_drained_pipeline_starts_anew(samples: int) -> None:
    """Streams shorter than the pipeline, too: each is trained on once, in order."""
    ours, theirs = stages(4), stages(4)
    delays = [6, 4, 2, 0]
    first = PipelinedBackpropagation(
        ours, DelayedSGD(groups(ours, delays), lr=0.05), F.cross_entropy, delays
    )
    _, losses = trained(ours, first, samples)
    assert len(losses) == samples
    again = PipelinedBackpropagation(
        theirs, DelayedSGD(groups(theirs, delays), lr=0.05), F.cross_entropy, delays
    )
    assert trained(theirs, again, samples)[1] == losses
    # Another stream through the same pipeline, and through a new one with the same optimizer.
    renewed = PipelinedBackpropagation(theirs, again.optimizer, F.cross_entropy, delays)
    assert trained(ours, first)[1] == trained(theirs, renewed)[1]


def test_bad_pipelines_are_refused() -> None:
    def made(modules: list[nn.Module], delays: list[int], **options: Any) -> None:
        optimizer = options.pop("optimizer", None) or torch.optim.SGD(
            [p for m in modules for p in m.parameters()]
        )
        PipelinedBackpropagation(modules, optimizer, F.cross_entropy, delays, **options)

    three = stages(3)
    for delays, message in (
        ([2, 0], "2 delays were given for 3 stages"),
        ([4, 2, 1], "are those of no pipeline"),
        ([2, 4, 0], "are those of no pipeline"),
    ):
        with pytest.raises(ArgumentError, match=message):
            made(three, delays)
    with pytest.raises(ArgumentError, match="weights='copy' is unknown"):
        made(three, [4, 2, 0], weights="copy")
    with pytest.raises(ArgumentError, match="accumulate=0 is not positive"):
        made(three, [4, 2, 0], accumulate=0)
    layer = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"'0.weight' of stage 1 is in stage 0, too"):
        made(
            [nn.Sequential(layer), nn.Sequential(layer)],
            [2, 0],
            optimizer=torch.optim.SGD(layer.parameters()),
        )
    mixed = DelayedSGD(groups(three, [2, 1, 0]))  # the other law
    with pytest.raises(ArgumentError, match="expects a delay of 2 where it is 4"):
        made(three, [4, 2, 0], optimizer=mixed)
    rebinding = DelayedSGD(groups(three, [4, 2, 0]), rebind=True)
    with pytest.raises(ArgumentError, match="rebind=True leaves old weights"):
        made(three, [4, 2, 0], optimizer=rebinding, weights="inconsistent")
