"""How a training loop calls a model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import backward
from torch.utils.checkpoint import checkpoint

from graphopt.testing.fuzz.layers import WIDTH

Batches = Callable[[], Tensor]
Use = Callable[[nn.Module, Batches], Any]


def floats_of(output: Any) -> Iterator[Tensor]:
    """The tensors in what a model returned, in order."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from floats_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from floats_of(value)


def loss_of(output: Any) -> Tensor:
    """A scalar that depends on everything that has a gradient."""
    parts = [t.float().square().mean() for t in floats_of(output) if t.requires_grad]
    return torch.stack(parts).sum() if parts else torch.zeros((), requires_grad=True)


def once(model: nn.Module, batch: Batches) -> Any:
    """The ordinary step."""
    output = model(batch())
    backward(loss_of(output))
    return output


def two_calls(model: nn.Module, batch: Batches) -> Any:
    """Two calls, one backward."""
    outputs = model(batch()), model(batch())
    backward(loss_of(outputs))
    return outputs


def itself(model: nn.Module, batch: Batches) -> Any:
    """Fed with its own output."""
    x = batch()
    output = model(x)
    first = next(floats_of(output))
    again = model(first if first.shape == x.shape else x)
    backward(loss_of(again))
    return again


def two_backwards(model: nn.Module, batch: Batches) -> Any:
    """Two calls, then their backwards, the first first."""
    outputs = model(batch()), model(batch())
    for output in outputs:
        backward(loss_of(output))
    return outputs


def detached(model: nn.Module, batch: Batches) -> Any:
    """As a GAN does: through the model once with and once without a gradient to the input."""
    x = batch().requires_grad_()
    real = model(x.detach())
    fake = model(x * 1)
    backward(loss_of(fake))
    backward(loss_of(real))
    return real, fake, x.grad


def retained(model: nn.Module, batch: Batches) -> Any:
    """The same graph backward twice."""
    output = model(batch())
    loss = loss_of(output)
    backward(loss, retain_graph=True)
    backward(loss)
    return output


def accumulated(model: nn.Module, batch: Batches) -> Any:
    """Three small batches added up."""
    outputs = []
    for _ in range(3):
        outputs.append(model(batch()))
        backward(loss_of(outputs[-1]) / 3)
    return outputs


def gradients_asked(model: nn.Module, batch: Batches) -> Any:
    """Gradients of inputs and parameters by `autograd.grad`."""
    x = batch().requires_grad_()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    output = model(x * 1)
    return output, torch.autograd.grad(loss_of(output), wanted, allow_unused=True)


def first_output_only(model: nn.Module, batch: Batches) -> Any:
    """A loss that leaves the other outputs alone."""
    output = model(batch())
    backward(loss_of(next(floats_of(output))))
    return output


def without_gradients(model: nn.Module, batch: Batches) -> Any:
    """A validation."""
    with torch.no_grad():
        return model(batch())


def inference_mode(model: nn.Module, batch: Batches) -> Any:
    """A stricter validation."""
    with torch.inference_mode():
        return model(batch())


def without_backward(model: nn.Module, batch: Batches) -> Any:
    """A forward whose graph is thrown away."""
    return model(batch())


def autocast(model: nn.Module, batch: Batches) -> Any:
    """The whole call in lower precision."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(batch())
    backward(loss_of(output))
    return output


def checkpointed(model: nn.Module, batch: Batches) -> Any:
    """The whole call computed again in backward."""
    x = batch().requires_grad_()
    output = checkpoint(model, x * 1, use_reentrant=False)
    backward(loss_of(output))
    return output, x.grad


def saved_elsewhere(model: nn.Module, batch: Batches) -> Any:
    """With hooks on what is saved for backward."""
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        output = model(batch())
    backward(loss_of(output))
    return output


def a_bad_batch(model: nn.Module, batch: Batches) -> Any:
    """A call that fails, and the loop goes on."""
    with contextlib.suppress(RuntimeError, ValueError):
        model(torch.zeros(2, WIDTH + 1))
    return once(model, batch)


USES: dict[str, Use] = {
    use.__name__: use
    for use in (
        *(once, two_calls, itself, two_backwards, detached, retained, accumulated),
        *(gradients_asked, first_output_only, without_gradients, inference_mode),
        *(without_backward, autocast, checkpointed, saved_elsewhere, a_bad_batch),
    )
}
"""By name; the ordinary step comes first, because failures shrink towards it."""
