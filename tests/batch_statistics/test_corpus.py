"""Models of the corpus: gradients of eager, and norms with the statistics of the step."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

import graphopt
from graphopt.testing.corpus import CORPUS
from tests.batch_statistics.models import check

pytestmark = pytest.mark.corpus


# Those that have batch norms.
NAMES = ["resnet", "densenet", "unet", "mobilenet", "used_twice"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_eagers_and_norms_have_the_step(name: str) -> None:
    entry = CORPUS[name]
    plain, args, kwargs = entry.make()
    norms = {n: m for n, m in plain.named_modules() if isinstance(m, _BatchNorm)}
    seen: dict[str, list[torch.Tensor]] = {}
    for norm_name, norm in norms.items():
        found = seen.setdefault(norm_name, [])
        norm.register_forward_pre_hook(lambda _, a, found=found: found.append(a[0].detach()))
    torch.manual_seed(11)
    torch.autograd.backward(entry.loss(plain(*args, **kwargs)))
    model, args, kwargs = entry.make()
    graphopt.optimize(model, passes="cleanup,batch_statistics", backend="eager")
    torch.manual_seed(11)
    torch.autograd.backward(entry.loss(model(*args, **kwargs)))
    for (parameter, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), parameter
        if a.grad is not None and b.grad is not None:
            assert torch.equal(a.grad, b.grad), parameter
    for buffer, value in plain.named_buffers():
        if buffer.endswith("num_batches_tracked"):
            assert torch.equal(value, model.get_buffer(buffer)), buffer
    assert seen
    check(model, [seen], rtol=1e-5)
