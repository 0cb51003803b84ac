"""What other libraries of K-FAC hold about each weight of a model after one batch.

Each adapter takes a micro-model and gives the statistics by name of the parameter that they are
about: ``(left, right)`` moments of a weight or ``[C, 2, 2]`` moments of a norm; and the names of
all parameters that the library does not leave alone. No library is needed to import this file; an
adapter whose library is missing raises `ModuleNotFoundError`.

- kfac-pytorch: https://github.com/gpauloski/kfac-pytorch, ``kfac``;
- ASDL: https://github.com/kazukiosawa/asdl, ``asdfghjkl`` on PyPI, ``asdl``;
- curvlinops: https://github.com/f-dangel/curvlinops, ``curvlinops-for-pytorch`` on PyPI.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib import metadata
from unittest import mock

from torch import Tensor, nn

from tests.kfac.cases import Case

Statistics = dict[str, tuple[Tensor, Tensor] | Tensor]
ALMOST_NOTHING = 1e-12  # weight of the identity from which kfac-pytorch starts its running mean


def kfac_pytorch(one: Case) -> tuple[Statistics, set[str]]:
    """`KFACPreconditioner` with a running mean that forgets at once.

    Returns:
        The statistics and the names of all parameters that it preconditions.
    """
    from kfac.preconditioner import KFACPreconditioner

    model = copy.deepcopy(one.model)
    preconditioner = KFACPreconditioner(
        model,
        factor_decay=ALMOST_NOTHING,
        # Else the last use of a shared layer would overwrite the others.
        update_factors_in_hook=False,
    )
    one.loss(model(one.x)).backward()
    preconditioner.step()
    statistics: Statistics = {}
    covered: set[str] = set()
    for module, (name, layer) in preconditioner._layers.items():
        statistics[f"{name}.weight"] = (layer.g_factor, layer.a_factor)
        covered |= _names(name, module)
    return statistics, covered


def asdl(one: Case) -> tuple[Statistics, set[str]]:
    """`KfacGradientMaker` with the empirical Fisher; it makes the loss a sum itself."""
    from asdl import FISHER_EMP, KfacGradientMaker, PreconditioningConfig

    # Its embedding counts tokens in single precision.
    model, x, target = copy.deepcopy(one.model).float(), _single(one.x), _single(one.target)
    config = PreconditioningConfig(data_size=x.shape[0], damping=1e-3, ema_decay=1.0)
    maker = KfacGradientMaker(model, config, fisher_type=FISHER_EMP)
    output = maker.setup_model_call(model, x)
    maker.setup_loss_call(copy.deepcopy(one.criterion), output, target)
    with mock.patch("torch.cuda.nvtx._nvtx"):  # it marks ranges even where there is no GPU
        maker.forward_and_backward()
    statistics: Statistics = {}
    covered: set[str] = set()
    for name, module in model.named_modules():
        fisher = getattr(module, "fisher", None)
        if fisher is None:
            continue
        kron, unit = getattr(fisher, "kron", None), getattr(fisher, "unit", None)
        if kron is not None:
            statistics[f"{name}.weight"] = (kron.B, kron.A)
        elif unit is not None:
            statistics[f"{name}.weight"] = unit.data
        covered |= _names(name, module)
    return statistics, covered


def curvlinops(one: Case) -> tuple[Statistics, set[str]]:
    """`KFACLinearOperator` with the empirical Fisher, weights and biases together."""
    from curvlinops import KFACLinearOperator

    model = copy.deepcopy(one.model)
    operator = KFACLinearOperator(
        model,
        one.criterion,
        list(model.parameters()),
        [(one.x, one.target)],
        fisher_type="empirical",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    statistics: Statistics = {}
    covered: set[str] = set()
    for name, places in operator._mapping.items():
        left, right = operator._gradient_covariances[name], operator._input_covariances[name]
        statistics[f"{name}.weight"] = (left, right)
        covered |= {f"{name}.{own}" for own in places}
    return statistics, covered


PEERS: dict[str, tuple[str, Callable[[Case], tuple[Statistics, set[str]]]]] = {
    "kfac-pytorch": ("kfac-pytorch", kfac_pytorch),
    "ASDL": ("asdfghjkl", asdl),
    "curvlinops": ("curvlinops-for-pytorch", curvlinops),
}


def version(distribution: str) -> str:
    """Its version, as far as it is known."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not known"


def _names(prefix: str, module: nn.Module) -> set[str]:
    return {f"{prefix}.{own}" for own, _ in module.named_parameters(recurse=False)}


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value
