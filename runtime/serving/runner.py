"""A model that computes requests in batches of few sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import ArgumentError, ServingError
from graphopt.notices import warn
from graphopt.runtime.serving.batches import Form, split


def checked_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of batches, ascending and each once; raises ``ArgumentError`` for anything else."""
    good = isinstance(sizes, Sequence) and all(isinstance(s, int) and s > 0 for s in sizes)
    if not good or not sizes:
        raise ArgumentError(f"sizes={sizes!r} are not batch sizes", hint="sizes=(1, 2, 4, 8)")
    return tuple(sorted(set(sizes)))


class Runner:
    """Computes up to as many requests as the largest size, in one call.

    Args:
        run: the model; takes stacked arguments.
        form: of the requests.
        sizes: of batches, ascending.
        device: where batches are computed.
    """

    def __init__(
        self,
        run: Callable[..., object],
        form: Form,
        sizes: Sequence[int],
        device: torch.device,
    ) -> None:
        self._run = run
        self._form = form
        self._sizes = sizes
        self._device = device

    def size(self, requests: int) -> int:
        """The size of the batch for so many requests."""
        return next(size for size in self._sizes if size >= requests)

    def __call__(self, rows: Sequence[Sequence[Tensor]]) -> list[object]:
        """The answers to requests, in one batch; raises what the model raises."""
        return self._call(rows, self.size(len(rows)), len(rows))

    def _call(self, rows: Sequence[Sequence[Tensor]], size: int, count: int) -> list[object]:
        args, kwargs = self._form.batch(rows, size, self._device)
        return split(self._run(*args, **kwargs), size, count, self._form.device)

    def rehearse(self, example: Sequence[Tensor]) -> None:
        """Run each size, and see that the answer to one request is its own.

        Its neighbours are copies of it once, and once the example with its values in reverse order,
        which is nothing that a model could not be given; then the same with both exchanged.

        Raises:
            ServingError: an answer depends on other rows, or on chance.
        """
        reverse = [row.flip(tuple(range(row.dim()))) for row in example]
        for size in self._sizes:
            self._alone(example, size)
            if size == 1:
                continue
            try:
                for first, others in ((example, reverse), (reverse, example)):
                    (found,) = self._call([first, *[others] * (size - 1)], size, 1)
                    _same(self._alone(first, size), found, size)
            except ServingError:
                raise
            except Exception as error:
                warn(
                    f"whether answers depend on other requests could not be tried at batch size "
                    f"{size}, as the model raises for the reversed example: {error!r}",
                )

    def _alone(self, request: Sequence[Tensor], size: int) -> object:
        return self._call([request] * size, size, 1)[0]


def _same(expected: object, found: object, size: int) -> None:
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    for i, (a, b) in enumerate(pairs):
        if isinstance(a, Tensor) and not torch.all((a == b) | ((a != a) & (b != b))):
            raise ServingError(
                f"at batch size {size}, output {i} of a request depends on the other requests of "
                "its batch, or on chance",
                hint="take out what mixes rows (statistics or scales over the batch) or draws "
                "random numbers, or serve with sizes=(1,)",
            )
