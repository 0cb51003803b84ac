"""Smoothing the loss: gradients averaged over perturbed weights, and averaged weights.

Inspired by, and not a reproduction of, Naganuma's smoothing of the objective function for
large-batch natural gradient training (Tokyo Institute of Technology, 2018 and 2019), whose exact
formulas were not available. This is the plain reading of that idea: descend on
``E[L(w + eps)]`` for normal eps of mean 0 and covariance Sigma, in place of L(w).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.optim.weight_noise import Deviation, check_deviation, draw_noise


class Smoother:
    """Averages gradients over antithetic weight noise, and weights over steps.

    Inspired by, not a reproduction of, Naganuma's smoothing (see the module).

    Noise comes in pairs ``w + eps`` and ``w - eps``: whatever is odd in eps cancels. So on a
    quadratic loss with Hessian H the gradient is the plain one, whatever the draw, and the mean
    loss is ``L + tr(H Sigma) / 2`` in expectation; on other losses the gradient also leads away
    from where curvature grows. All this up to rounding: noise near the resolution of a
    low-precision weight is lost.

    Each pair costs two forward and backward passes, each with its own dropout and its own update
    of BatchNorm's running statistics. Running mixup, the third part of the recipe, acts on data:
    mix a batch once, and let the closure use it.

    Args:
        model: its parameters that are trainable at the time are perturbed and averaged.
        std: standard deviation of the noise. A number is isotropic noise; a mapping by parameter
            name, or a function of name and parameter, gives tensors that broadcast to the
            parameter, such as ``scale / (diagonal curvature).sqrt()``. A function is called for
            every draw, and its result is used as it is.
        pairs: antithetic pairs per gradient, at least 1.
        generator: for the noise, on any device; without it, PyTorch's global ones. Ranks of a job
            may draw different noise: their weights are the same again afterwards.

    Raises:
        ArgumentError: a deviation is negative or not finite, a trainable parameter has none, or
            `pairs` is not positive.
    """

    def __init__(
        self,
        model: nn.Module,
        std: Deviation,
        *,
        pairs: int = 1,
        generator: Generator | None = None,
    ) -> None:
        if pairs < 1:
            raise ArgumentError(f"pairs={pairs} is not positive", hint="use 1")
        self.model = model
        self.std = std
        self.pairs = pairs
        self.generator = generator
        self._averages: dict[str, Tensor] = {}
        self._count = 0
        check_deviation(std, self._parameters())

    def backward(self, closure: Callable[[], Tensor]) -> Tensor:
        """Add the smoothed gradient to the ``grad`` of each parameter, in place of `backward()`.

        Args:
            closure: runs the model and returns the loss, a tensor of one element. It is called
                ``2 * pairs`` times and must not call `backward` itself.

        Returns:
            The mean loss over all draws, without a graph.

        Raises:
            ArgumentError: the closure returns something else. Weights and gradients are left
                untouched whatever is raised.
        """
        parameters = self._parameters().values()
        # Earlier gradients are set aside: only what is added here is divided. (Scaling the loss
        # instead would also scale the curvature that K-FAC reads from the backward pass.)
        earlier = [parameter.grad for parameter in parameters]
        losses = []
        try:
            for parameter in parameters:
                parameter.grad = None
            for _ in range(self.pairs):
                noise = self.draw()
                for sign in (1, -1):
                    with self.perturbed(noise, sign):
                        loss = closure()
                        _check_loss(loss)
                        loss.backward()  # type: ignore[no-untyped-call]
                    losses.append(loss.detach())
        except BaseException:
            for parameter, before in zip(parameters, earlier, strict=True):
                parameter.grad = before
            raise
        for parameter, before in zip(parameters, earlier, strict=True):
            if parameter.grad is not None:
                parameter.grad.div_(len(losses))
            if before is not None:
                parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        return torch.stack(losses).mean()

    def draw(self) -> dict[str, Tensor]:
        """One draw of eps by parameter name, in at least float32.

        Raises:
            ArgumentError: a deviation does not broadcast to its parameter.
        """
        return {
            name: draw_noise(name, parameter, self.std, self.generator)
            for name, parameter in self._parameters().items()
        }

    @contextmanager
    def perturbed(self, noise: Mapping[str, Tensor], sign: int = 1) -> Iterator[None]:
        """Within the block, weights are ``w + sign * noise``; after it, w to the last bit.

        Args:
            noise: by parameter name, as `draw` gives it.
            sign: 1, or -1 for the other one of the pair.
        """
        with self._kept() as parameters:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.add_(noise[name], alpha=sign)
            yield

    def update_average(self) -> None:
        """Add the current weights to the uniform average of all weights added so far.

        Izmailov et al., arXiv 1803.05407. Call it after an update, towards the end of training.
        """
        self._count += 1
        for name, parameter in self._parameters().items():
            value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
            if name in self._averages:
                self._averages[name].lerp_(value, 1 / self._count)
            else:
                self._averages[name] = value.clone()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the block, the model has its average weights; after it, its own again.

        The running statistics of BatchNorm are not averaged: refresh them within the block by
        `torch.optim.swa_utils.update_bn`.

        Raises:
            ArgumentError: there is no average, or a parameter has none.
        """
        missing = [name for name in self._parameters() if name not in self._averages]
        if missing:
            raise ArgumentError(
                f"there is no average of parameter {missing[0]!r}",
                hint="call update_average() after optimizer steps",
            )
        with self._kept() as parameters:
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(self._averages[name])
            yield

    def state_dict(self) -> dict[str, Any]:
        """Copies of the average, how many weights are in it, and the generator's state."""
        return {
            "averages": {name: average.clone() for name, average in self._averages.items()},
            "count": self._count,
            "generator": None if self.generator is None else self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was saved.

        Raises:
            StateError: it belongs to another model, or only one of the two sides has a generator
                of its own.
        """
        if (state["generator"] is None) != (self.generator is None):
            raise StateError(
                "the saved smoother and this one differ in having a generator of their own",
                hint="construct Smoother with generator= as in the run that saved it",
            )
        parameters = dict(self.model.named_parameters())
        for name, average in state["averages"].items():
            if name not in parameters or parameters[name].shape != average.shape:
                raise StateError(
                    f"the saved average of {name!r}, {tuple(average.shape)}, fits no parameter",
                    where=name,
                    hint="load the state into a smoother of the model that it was saved with",
                )
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())
        self._count = state["count"]
        self._averages = {
            name: average.to(parameters[name].device, copy=True)
            for name, average in state["averages"].items()
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @contextmanager
    def _kept(self) -> Iterator[dict[str, nn.Parameter]]:
        parameters = self._parameters()
        weights = [parameter.detach().clone() for parameter in parameters.values()]
        try:
            yield parameters
        finally:
            with torch.no_grad():
                for parameter, weight in zip(parameters.values(), weights, strict=True):
                    parameter.copy_(weight)


def _check_loss(loss: object) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ArgumentError(
            "the closure returned no loss that can be differentiated",
            hint="return the loss, a tensor of one element, and leave backward() to the smoother",
        )
