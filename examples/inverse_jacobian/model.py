"""A network that inverts a linear measurement, with a penalty on its Jacobian inside of forward.

Measurements are ``y = A x + noise`` with ``A`` of shape (m, d) and m < d. A network Ψ of R^m to
R^d is trained on a few pairs (x, y). How much worse it is on new data is bounded by the Lipschitz
constant of Ψ, or, since new measurements come from the operator too, of Ψ∘A. The penalty is the
squared Frobenius norm of the Jacobian of either, estimated by one random probe per sample:
E‖(J_Ψ A)ᵀ v‖² = E‖J_Ψ A w‖² = ‖J_Ψ A‖_F² for standard normal v and w.

References: Amjad, Lyu and Rodrigues, "Deep Learning for Inverse Problems: Bounds and Regularizers"
(arXiv:1901.11352).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

Route = Literal["vjp", "jvp", "autograd"]


def inverse_network(measurements: int, unknowns: int, width: int = 256) -> nn.Sequential:
    """Ψ: three linear layers with ReLU, from R^measurements to R^unknowns."""
    return nn.Sequential(
        nn.Linear(measurements, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, unknowns),
    )


class JacobianPenalised(nn.Module):
    """Ψ together with a one-probe estimate of its squared Jacobian norm.

    Args:
        network: Ψ, from R^m to R^d.
        operator: A of shape (m, d) for the norm of J_Ψ A; the identity (m, m) for that of J_Ψ.
        route: how the derivative is taken. ``vjp`` pulls a probe of shape (batch, d) back through Ψ
            and then A (reverse mode); ``jvp`` pushes A w for a probe w of shape (batch, columns of
            A) through Ψ (forward mode); ``autograd`` is ``vjp`` by ``torch.autograd.grad``.
    """

    operator: Tensor

    def __init__(self, network: nn.Module, operator: Tensor, route: Route = "vjp") -> None:
        super().__init__()
        self.network = network
        self.route = route
        self.register_buffer("operator", operator)

    def forward(self, y: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstructions (batch, d) of measurements (batch, m), and the penalty, a scalar."""
        if self.route == "jvp":
            x, change = jvp(self.network, (y,), (probe @ self.operator.T,))[:2]
        elif self.route == "vjp":
            x, pull = vjp(self.network, y)[:2]
            change = pull(probe)[0] @ self.operator
        else:
            y = y.detach().requires_grad_()
            x = self.network(y)
            change = torch.autograd.grad(x, y, probe, create_graph=True)[0] @ self.operator
        return x, change.square().sum(dim=1).mean()

    def probe_size(self, unknowns: int) -> int:
        """The length of a probe."""
        return self.operator.shape[1] if self.route == "jvp" else unknowns


def squared_error(x: Tensor, truth: Tensor) -> Tensor:
    """Squared distance of images (batch, d) with values in [0, 1], averaged over the batch."""
    return (x - truth).square().sum(dim=1).mean()
