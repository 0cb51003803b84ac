"""One optimizer step on several micro-batches, whose gradients are compared on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphopt.errors import ArgumentError

T = TypeVar("T")
# Mean squared norm of gradients of micro-batches, that of their mean, how many, examples in each.
Measured = tuple[float, float, int, int]


def count_examples(micro: object) -> int:
    """Leading dimension of the first tensor in a micro-batch.

    Raises:
        ArgumentError: there is no tensor that has one, or it is empty.
    """
    for leaf in tree_leaves(micro):
        if isinstance(leaf, Tensor) and leaf.dim():
            if not len(leaf):
                raise ArgumentError(
                    f"a micro-batch is empty: its first tensor is {list(leaf.shape)}",
                    hint="leave empty batches out of the loader",
                )
            return len(leaf)
    raise ArgumentError(
        f"a micro-batch of type {type(micro).__name__} holds no tensor, so its examples cannot be "
        "counted",
        hint="let the loader yield tensors, alone or in tuples, lists or dicts",
    )


class MicroBatches(Generic[T]):
    """The micro-batches of one optimizer step; iterating yields them in order.

    Gradients are accumulated in ``.grad`` as a mean over all examples. All micro-batches but the
    last are yielded within the model's ``no_sync()``, if it has one.

    Args:
        model: whose parameters get gradients.
        batches: what the loader gave, at least one.
        measure: compare the gradients of the micro-batches.
        done: is told what was measured, or None, once the last one has had its backward.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[T],
        measure: bool,
        done: Callable[[MicroBatches[T], Measured | None], None],
    ) -> None:
        self._batches = batches
        self._sizes = [count_examples(batch) for batch in batches]
        self._no_sync: Callable[[], AbstractContextManager[Any]] | None = getattr(
            model, "no_sync", None
        )
        self._done = done
        self._current: int | None = None
        self._backwards = 0
        self.complete = False
        # What the last backward leaves may be reduced or preconditioned where there is `no_sync`.
        compared = len(batches) - (self._no_sync is not None)
        self._norms = _Norms(model, compared) if measure and compared > 1 else None

    def __len__(self) -> int:
        """How many there are."""
        return len(self._batches)

    @property
    def examples(self) -> int:
        """In all of them, on this rank."""
        return sum(self._sizes)

    def __iter__(self) -> Iterator[T]:
        if self._backwards:
            raise ArgumentError(
                "the micro-batches of a step are gone through twice",
                hint="make one pass over them per step",
            )
        for index, batch in enumerate(self._batches):
            self._current = index
            last = index == len(self._batches) - 1
            quiet = self._no_sync is not None and not last
            with self._no_sync() if quiet and self._no_sync is not None else nullcontext():
                yield batch
            self._check(index + 1)
        self._current = None
        self.complete = True
        self._done(self, None if self._norms is None else self._norms.result(self._sizes))

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the current micro-batch.

        Args:
            loss: a mean over its examples; may have been multiplied by a gradient scaler.

        Raises:
            ArgumentError: no micro-batch is being worked on, or it had its backward.
        """
        if self._current is None or self._backwards != self._current:
            raise ArgumentError(
                "there is no micro-batch whose backward is due",
                hint="call backward once in each turn of the loop over the micro-batches",
            )
        share = self._sizes[self._current] / self.examples
        (loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]
        self._backwards += 1
        if self._norms is not None:
            self._norms.look(len(self._batches))

    def _check(self, due: int) -> None:
        if self._backwards != due:
            raise ArgumentError(
                f"micro-batch {due} of {len(self._batches)} had no backward of its step",
                hint="call step.backward(loss) in each turn, instead of loss.backward()",
            )


class _Norms:
    """Squared norms of the gradients of single micro-batches, and of their mean.

    ``.grad`` holds a growing sum, so a copy of it is kept from one micro-batch to the next.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._count = count
        self._before: dict[int, Tensor] = {}
        self._single: list[Tensor] = []
        self._whole: Tensor | None = None

    def look(self, parts: int) -> None:
        """Behind a backward whose loss was divided by `parts`."""
        if len(self._single) == self._count:
            return
        last = len(self._single) + 1 == self._count
        own, whole = [], []
        for index, parameter in enumerate(self._parameters):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise ArgumentError(
                    "the noise of a sparse gradient cannot be measured",
                    hint="pass noise= or double_every= to BatchSchedule",
                )
            before = self._before.get(index)
            own.append(_norm(gradient if before is None else gradient - before))
            if last:
                whole.append(_norm(gradient))
            elif before is None:
                self._before[index] = gradient.detach().clone()
            else:
                before.copy_(gradient)
        self._single.append(_sum_of_squares(own) * parts**2)
        if last:
            self._whole = _sum_of_squares(whole) * (parts / self._count) ** 2
            self._before.clear()

    def result(self, sizes: Sequence[int]) -> Measured | None:
        """The same on all ranks of a job; None where micro-batches differ in size on any of them.

        Args:
            sizes: examples in each micro-batch, on this rank.
        """
        if self._whole is None:
            return None
        mixed = torch.full_like(self._whole, len(set(sizes)) - 1)
        values = torch.stack([torch.stack(self._single).mean(), self._whole, mixed])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        local, whole, differ = values.tolist()
        return None if differ else (local, whole, self._count, sizes[0])


def _norm(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def _sum_of_squares(norms: Sequence[Tensor]) -> Tensor:
    if not norms:
        return torch.zeros(())
    device, dtype = norms[0].device, max((n.dtype for n in norms), key=lambda d: d.itemsize)
    return torch.stack([n.to(device, dtype) for n in norms]).square().sum()
