"""A backward runs outside of autocast, as eager's does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError
from tests.support.as_graph import assert_equal, step, twins


class Regions(nn.Module):
    """One layer under the caller's autocast, one in 32 bits."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.low, self.full = nn.Linear(4, 8), nn.Linear(8, 2)
        self.detach = detach

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        h = h.detach() if self.detach else h
        with torch.autocast("cpu", enabled=False):
            return self.full(h.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_gradients_of_regions(dtype: torch.dtype, detach: bool, scale: float) -> None:
    plain, graph = twins(Regions(detach))
    x = torch.randn(3, 4)
    results = []
    for call, model in ((plain, plain), (graph, graph.model)):

        def under_autocast(x: Tensor, call: object = call) -> Tensor:
            with torch.autocast("cpu", dtype):
                return call(x)  # type: ignore[operator, no-any-return]

        results.append(step(under_autocast, model, x, loss=lambda y: y.square().sum() * scale))
    assert_equal(*results)
    full = results[1][1][2]
    assert torch.isfinite(full).all()


def test_everything_under_autocast() -> None:
    plain, graph = twins(nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)))
    x = torch.randn(3, 4)
    results = []
    for call, model in ((plain, plain), (graph, graph.model)):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(step(call, model, x, loss=lambda y: y.float().square().sum()))
    assert_equal(*results)


class Inside(nn.TransformerEncoder):
    """Turns autocast on by itself."""

    def forward(self, src: Tensor) -> Tensor:  # type: ignore[override]
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(src)


@pytest.mark.parametrize("kind", [nn.TransformerEncoder, Inside])
@pytest.mark.parametrize("verify", ["off", "eager"])
def test_the_fast_path_of_an_encoder_is_refused_under_autocast(
    kind: type[nn.TransformerEncoder], verify: str
) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    plain = kind(layer, 1).eval()
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager", verify=verify)
    x = torch.randn(2, 5, 8)
    outside = torch.autocast("cpu", torch.bfloat16, enabled=kind is not Inside)
    with torch.no_grad(), outside:
        with pytest.raises(CaptureError, match="follows autocast within one operator") as caught:
            model(x)
        assert caught.value.hint.startswith("torch.backends.mha.set_fastpath_enabled(False)")
    # Without autocast, and where gradients are taken, there is nothing to refuse.
    with outside:
        assert torch.equal(model(x), plain(x))
    if kind is not Inside:
        with torch.no_grad():
            assert torch.equal(model(x), plain(x))


def test_after_training_an_evaluation_by_the_fast_path_runs_plain() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = nn.TransformerEncoder(layer, 1)
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().sum().backward()
        for m in (plain, model):
            m.eval()
        with torch.no_grad(), pytest.warns(UserWarning, match="follows autocast"):
            assert torch.equal(model(x), plain(x))
