"""`serve`: an inference model behind a queue."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from graphopt.errors import ArgumentError, ServingError
from graphopt.model.controller import controller_of
from graphopt.model.sites import MAX_SPECIALISATIONS
from graphopt.plan import Role

if TYPE_CHECKING:
    from graphopt.runtime.serving import Dispatcher

SIZES = (1, 2, 4, 8, 16, 32)


def serve(
    model: nn.Module,
    example: object,
    *,
    sizes: Sequence[int] = SIZES,
    capacity: int | None = None,
) -> Dispatcher:
    """Serve a model to concurrent callers, in batches.

    Each size is captured and run before this returns, so no request waits for a capture. See
    `graphopt.runtime.serving.Dispatcher` for what is promised.

    Args:
        model: in evaluation mode; usually optimized.
        example: one request without a batch dimension: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments. All requests have its shapes and dtypes.
        sizes: of the batches that are run; each is one captured graph.
        capacity: how many requests may be queued; by default eight largest batches.

    Returns:
        The dispatcher, which runs until it is closed.

    Raises:
        ArgumentError: an argument cannot be used.
        ServingError: answers would depend on what else is in their batch.
    """
    from graphopt.runtime.serving import Dispatcher
    from graphopt.runtime.serving.runner import checked_sizes

    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"serve needs an nn.Module, and got a {type(model).__name__}",
            hint="pass the model object itself",
        )
    training = next((name for name, m in model.named_modules() if m.training), None)
    if training is not None:
        raise ArgumentError(
            f"{type(model).__name__} is in training mode, where the requests of a batch may change "
            "each other's answers",
            where=f"module {training!r}" if training else "",
            hint="call model.eval() first",
        )
    sizes = checked_sizes(sizes)
    controller = controller_of(model)
    if controller is not None and len(sizes) > MAX_SPECIALISATIONS:
        raise ArgumentError(
            f"{len(sizes)} sizes need as many captures, and {MAX_SPECIALISATIONS} are kept",
            hint=f"{MAX_SPECIALISATIONS} sizes or fewer, such as {SIZES}",
        )

    def run(*args: object, **kwargs: object) -> object:
        if model.training:
            raise ServingError(
                f"{type(model).__name__} was put into training mode while it is served",
                hint="call model.eval(), or serve a copy of the model",
            )
        return model(*args, **kwargs)

    device = next((p.device for p in model.parameters()), None)
    dispatcher = Dispatcher(run, example, sizes=sizes, capacity=capacity, device=device)
    variants = controller.variants if controller is not None else ()
    written = {
        slot.name
        for variant in variants
        if variant.entry.level == "inference"
        for slot in variant.entry.plan.signature.outputs
        if slot.role is Role.MUTATION
    }
    if written:
        dispatcher.close()
        raise ArgumentError(
            f"forward writes to {', '.join(map(repr, sorted(written)))}, so that each request "
            "would find what others have left",
            hint="make it an input and an output of the model",
        )
    return dispatcher
