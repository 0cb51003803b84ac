"""Running mixup: mix every batch with the result of the previous mix.

Osawa et al., arXiv 2002.06015: ``x~_t = lam * x_t + (1 - lam) * x~_{t-1}``, labels the same, with
one ``lam ~ Beta(alpha, alpha)`` per sample. Plain mixup (Zhang et al., arXiv 1710.09412) mixes two
samples; here a virtual sample holds a part of every batch so far, less and less of older ones.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from graphopt.errors import ArgumentError, StateError


class RunningMixup:
    """Mixes batches of inputs and soft labels with the virtual samples of the previous batch.

    Row i of a batch is mixed with virtual sample i. Batch sizes may vary: a smaller batch
    mixes with and replaces the first virtual samples and leaves the others for the next one; rows
    beyond the largest batch so far have no partner and stay unmixed, like the whole first batch.

    Use one object per training data set, and leave evaluation batches alone. Loss: cross entropy
    with the soft labels, as `torch.nn.functional.cross_entropy` takes them.

    Args:
        alpha: both parameters of the Beta distribution, above 0; small values mix little.
        own_majority: replace lam by ``max(lam, 1 - lam)``, as the authors' code does, so that at
            least half of a virtual sample is the new one.
        generator: a CPU generator for lam; without it, PyTorch's global one.

    Raises:
        ArgumentError: `alpha` is not a positive number.
    """

    def __init__(
        self, alpha: float, *, own_majority: bool = True, generator: Generator | None = None
    ) -> None:
        if not (alpha > 0 and math.isfinite(alpha)):
            raise ArgumentError(f"alpha={alpha} is not a positive number", hint="use 0.4 to 1.0")
        self.alpha = alpha
        self.own_majority = own_majority
        self.generator = generator
        self._inputs: Tensor | None = None
        self._labels: Tensor | None = None

    def __call__(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix one batch.

        Args:
            inputs: floating-point, [n, ...].
            labels: one-hot or soft labels, floating-point, [n, classes].

        Returns:
            Mixed inputs and labels, new tensors of the same shapes and dtypes.

        Raises:
            ArgumentError: the batch is empty, inputs and labels differ in length, one of them is
                not floating-point, or a sample has another shape than those before.
        """
        self._check(inputs, labels)
        # On the CPU, so that the draw is the same whatever the data's device.
        weights = self._draw(inputs.shape[0])
        mixed_inputs, self._inputs = _mix(inputs, self._inputs, weights)
        mixed_labels, self._labels = _mix(labels, self._labels, weights)
        return mixed_inputs, mixed_labels

    def state_dict(self) -> dict[str, Any]:
        """Copies of the virtual samples and of the generator's state, for `torch.save`."""
        return {
            "inputs": None if self._inputs is None else self._inputs.clone(),
            "labels": None if self._labels is None else self._labels.clone(),
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Raises:
            StateError: only one of the two sides has its own generator.
        """
        if (state["generator"] is None) != (self.generator is None):
            raise StateError(
                "the saved mixup and this one differ in having a generator of their own",
                hint="construct RunningMixup with generator= as in the run that saved it",
            )
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())
        self._inputs = None if state["inputs"] is None else state["inputs"].clone()
        self._labels = None if state["labels"] is None else state["labels"].clone()

    def _check(self, inputs: Tensor, labels: Tensor) -> None:
        if inputs.dim() == 0 or inputs.shape[0] == 0:
            raise ArgumentError("the batch is empty", hint="skip empty batches")
        if labels.dim() == 0 or labels.shape[0] != inputs.shape[0]:
            raise ArgumentError(
                f"inputs {tuple(inputs.shape)} and labels {tuple(labels.shape)} differ in length",
                hint="pass one row of labels per input",
            )
        for name, batch, virtual in (
            ("inputs", inputs, self._inputs),
            ("labels", labels, self._labels),
        ):
            if not batch.is_floating_point():
                raise ArgumentError(
                    f"{name} of {batch.dtype} cannot be mixed",
                    hint="convert images with .float(), class numbers with "
                    "torch.nn.functional.one_hot(labels, classes).float()",
                )
            if virtual is not None and virtual.shape[1:] != batch.shape[1:]:
                raise ArgumentError(
                    f"{name} of shape {tuple(batch.shape[1:])} per sample follow "
                    f"those of {tuple(virtual.shape[1:])}",
                    hint="use one RunningMixup for each shape of data",
                )

    def _draw(self, count: int) -> Tensor:
        """One lam per sample, float64 [count].

        Gamma(alpha) is Gamma(alpha + 1) * U^(1 / alpha) (Marsaglia and Tsang, 2000); its logarithm
        does not underflow, so the quotient is right even for the smallest alpha.
        """
        shape = torch.full((2, count), self.alpha + 1.0, dtype=torch.float64)
        gamma = torch._standard_gamma(shape, generator=self.generator)
        uniform = 1.0 - torch.rand((2, count), dtype=torch.float64, generator=self.generator)
        logarithm = gamma.log() + uniform.log() / self.alpha
        weights = torch.sigmoid(logarithm[0] - logarithm[1])
        return torch.maximum(weights, 1.0 - weights) if self.own_majority else weights


def _mix(batch: Tensor, virtual: Tensor | None, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The mixed batch, and the virtual samples that it leaves, which share no memory with it."""
    mixed = batch.clone()
    if virtual is None:
        return mixed, batch.detach().clone()
    virtual = virtual.to(batch.device, batch.dtype)
    paired = min(len(batch), len(virtual))
    own = weights[:paired].to(batch.device, batch.dtype)
    own = own.view(paired, *[1] * (batch.dim() - 1))
    mixed[:paired] = own * batch[:paired] + (1.0 - own) * virtual[:paired]
    return mixed, torch.cat([mixed.detach(), virtual[len(batch) :]])
