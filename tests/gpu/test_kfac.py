"""Preconditioned gradients on a GPU, against the brute-force oracle."""

from __future__ import annotations

import copy

import pytest
import torch

import graphopt
from tests.kfac.brute_force import expected
from tests.kfac.cases import NAMES, case
from tests.kfac.explicit import compute

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "lstm"])
def test_gradients_are_those_of_the_dense_solution(name: str, backend: str) -> None:
    one = case(name)
    wanted = expected(*compute(one), 1e-3)
    model = copy.deepcopy(one.model).cuda()
    spec = "kfac{damping=1e-3,interval=1,solver=factored}"
    graphopt.optimize(model, passes=spec, backend=backend)
    loss = one.criterion.cuda()(model(one.x.cuda()), one.target.cuda())
    loss.backward()
    for parameter, p in model.named_parameters():
        assert p.grad is not None
        found = p.grad.cpu()
        assert (found - wanted[parameter]).norm() / wanted[parameter].norm() < 1e-6, parameter
