"""Muon for a whole model: matrices and convolutions orthogonalised, everything else by AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.errors import StateError
from graphopt.optim.muon_groups import (
    Group,
    View,
    adamw_step,
    as_matrices,
    as_parameter,
    check_numbers,
    made_groups,
    stored,
)
from graphopt.optim.orthogonal import (
    COEFFICIENTS,
    Coefficients,
    orthogonalised_by_shape,
    rate_factor,
)
from graphopt.optim.roles import ParameterRoles, roles_of
from graphopt.optim.shares import check_group, shared
from graphopt.optim.tensors import begin_step


class Muon(Optimizer):
    """One optimizer for all parameters of a model, each by what the joint graph does with it.

    Matrices and convolutions get the updates of `torch.optim.Muon`, whose arguments have the same
    names here; a matrix that is the only one of its shape gets the same bits. A convolution is the
    matrix from all points that a kernel sees to one output; of a grouped one, each group is a
    matrix. Matrices of one shape are orthogonalised together. Embeddings, heads, norms, biases,
    weights of recurrent layers and all others are trained by AdamW, without weight decay where
    they are norms, biases or other vectors.

    The groups are ``"muon"``, ``"adamw"`` with and ``"adamw"`` without weight decay, as their
    ``"method"`` says; they have a learning rate each and can be scheduled. A group that is added
    later is trained by AdamW. Parameters without a gradient are left alone.

    Args:
        model: the model, before or after `graphopt.optimize`; or its roles.
        inputs: of an example call, as in ``graphopt.optimize(model, inputs)``, or the model's
            roles; a model that was captured needs none.
        lr: learning rate.
        weight_decay: decoupled, multiplied with the learning rate.
        momentum: of the orthogonalised updates.
        nesterov: whether it is Nesterov's.
        ns_coefficients: of the Newton-Schulz iterations.
        eps: what the norm of an update is at least.
        ns_steps: number of iterations.
        adjust_lr_fn: ``"match_rms_adamw"``, so that one learning rate fits all parameters, or
            ``"original"``; see `rate_factor`. A weight that is stored as inputs by outputs counts
            by what it does, while torch takes its first dimension for the outputs.
        adamw_lr: learning rate of AdamW; `lr` by default.
        betas: of AdamW.
        adamw_eps: of AdamW.
        process_group: ranks that hold the same gradients; each orthogonalises its share, and
            gathers those of the others in bfloat16. A copy of the optimizer has none.

    Raises:
        CaptureError: the call cannot be captured as one graph.
        ArgumentError: a number is out of range, or a parameter is complex.
    """

    _process_group: dist.ProcessGroup | None = None

    def __init__(
        self,
        model: nn.Module | ParameterRoles,
        inputs: object = None,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        adamw_lr = lr if adamw_lr is None else adamw_lr
        check_numbers(lr, adamw_lr, weight_decay, momentum, ns_steps, adjust_lr_fn, betas)
        check_group(process_group)
        muon = {
            "method": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": tuple(ns_coefficients),
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        rest = {"method": "adamw", "lr": adamw_lr, "betas": tuple(betas), "eps": adamw_eps}
        groups = made_groups(roles_of(model, inputs), muon, rest, weight_decay)
        super().__init__(groups, {**rest, "weight_decay": 0.0})
        self._process_group = process_group

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: computes the gradients and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ArgumentError: a gradient is sparse.
            RankError: ranks have gradients of different parameters.
        """
        loss = begin_step(self.param_groups, closure)
        for group in self.param_groups:
            if group["method"] == "muon":
                self._muon(group)
            else:
                adamw_step(group, self.state)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of the same model, saved by any number of ranks.

        Raises:
            StateError: its groups are not those of this optimizer.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            for key in ("method", "matrices", "param_names"):
                if own.get(key) != saved.get(key):
                    raise StateError(
                        f"the saved optimizer has other {key} than this one",
                        hint="load the state into an optimizer of the same model and call",
                    )
        super().load_state_dict(state_dict)

    def _muon(self, group: Group) -> None:
        views: list[View] = group["matrices"]
        parameters: list[nn.Parameter] = group["params"]
        gradients = [p.grad for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(gradient)
                state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])

        def compute(indices: list[int]) -> list[Tensor]:
            updates = []
            for i in indices:
                update: Tensor = self.state[parameters[i]]["momentum_buffer"]
                gradient = gradients[i]
                if group["nesterov"] and gradient is not None:
                    update = gradient.lerp(update, group["momentum"])
                updates.append(as_matrices(update.bfloat16(), views[i]))
            options = group["ns_coefficients"], group["ns_steps"], group["eps"]
            return orthogonalised_by_shape(updates, *options)

        found = self._shared(parameters, views, compute)
        for i, update in found.items():
            parameter, (_, rows, columns, _) = parameters[i], views[i]
            rate = float(group["lr"])
            adjusted = rate * rate_factor(group["adjust_lr_fn"], rows, columns)
            parameter.mul_(1 - rate * group["weight_decay"])
            parameter.add_(as_parameter(update, views[i], parameter.shape), alpha=-adjusted)

    def _shared(
        self,
        parameters: list[nn.Parameter],
        views: list[View],
        compute: Callable[[list[int]], list[Tensor]],
    ) -> dict[int, Tensor]:
        present = [p.grad is not None for p in parameters]
        own = [i for i, here in enumerate(present) if here]
        group = self._process_group
        if group is None or dist.get_world_size(group) == 1:
            return dict(zip(own, compute(own), strict=True))
        shapes = [stored(view) for view in views]
        costs = [float(n * a * b * min(a, b)) for n, a, b in shapes]
        return shared(shapes, present, costs, compute, group, parameters[0].device)
