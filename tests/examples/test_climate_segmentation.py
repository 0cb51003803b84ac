"""Climate segmentation: networks against loops over pixels, losses, lag, LARC, a short training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import correlate2d
from sklearn.metrics import jaccard_score, recall_score
from torch import Tensor, nn

import graphopt
from graphopt.examples.climate_segmentation import data as climate
from graphopt.examples.climate_segmentation.data import CHANNELS, CLASSES, Fields, make_fields
from graphopt.examples.climate_segmentation.deeplab import DeepLab
from graphopt.examples.climate_segmentation.metrics import Scores, confusion, predict
from graphopt.examples.climate_segmentation.model import (
    class_weights,
    published,
    small_deeplab,
    small_tiramisu,
    weighted_loss,
)
from graphopt.examples.climate_segmentation.tiramisu import Order, Tiramisu, jegou_103, kurth
from graphopt.examples.climate_segmentation.train import case
from graphopt.examples.common import WorkloadError
from graphopt.model.surface import report
from graphopt.study import ConstantDelay
from tests.examples.contract import one_exact_graph
from tests.support.ranks import on_ranks

ORDERS: tuple[Order, ...] = ("norm_first", "conv_first")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- the networks ----------------------------------------------------------------------------------


def tiny(order: Order = "norm_first", norm: bool = True) -> Tiramisu:
    torch.manual_seed(0)
    return Tiramisu(
        2, 3, down=(2,), bottom=2, growth=2, first=3, dropout=0.0, order=order, norm=norm
    )


class Numbers:
    """A forward pass in NumPy, from the weights alone."""

    def __init__(self, model: nn.Module, order: Order) -> None:
        self.weights = {n: t.double().numpy() for n, t in model.state_dict().items()}
        self.order = order

    def conv(self, name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        weight = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias", np.zeros(len(weight)))
        maps = [
            sum(correlate2d(m, k, "same") for m, k in zip(x, kernels, strict=True)) + b
            for kernels, b in zip(weight, bias, strict=True)
        ]
        return np.stack(maps)[:, ::stride, ::stride]

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        w = {
            k: self.weights[f"{name}.{k}"][:, None, None]
            for k in ("weight", "bias", "running_mean", "running_var")
        }
        return (x - w["running_mean"]) / np.sqrt(w["running_var"] + 1e-5) * w["weight"] + w["bias"]

    def layer(self, name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        if self.order == "norm_first":
            return self.conv(f"{name}.2", np.maximum(self.norm(f"{name}.0", x), 0))
        return np.maximum(self.norm(f"{name}.1", self.conv(f"{name}.0", x, stride)), 0)

    def block(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        start = len(x)
        for index in range(2):
            x = np.concatenate([x, self.layer(f"{name}.layers.{index}", x)])
        return x, x[start:]

    def up(self, name: str, x: np.ndarray) -> np.ndarray:
        weight, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        _, height, width = x.shape
        out = np.zeros((weight.shape[1], 2 * height + 2, 2 * width + 2))
        for m, kernels in zip(x, weight, strict=True):
            for i in range(height):
                for j in range(width):
                    out[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] += m[i, j] * kernels
        return out[:, 1:-1, 1:-1] + bias[:, None, None]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        first = self.order == "norm_first"
        x = self.conv("first.0", x) if first else self.layer("first", x)
        skip, _ = self.block("down_blocks.0", x)
        if first:
            x = self.layer("downs.0", skip)
            count, height, width = x.shape
            x = x.reshape(count, height // 2, 2, width // 2, 2).max((2, 4))
        else:
            x = self.layer("downs.0", skip, stride=2)
        _, new = self.block("bottom", x)
        x, _ = self.block("up_blocks.0", np.concatenate([self.up("ups.0", new), skip]))
        return self.conv("head", x)


@pytest.mark.parametrize("order", ORDERS)
def test_tiramisu_is_what_loops_over_pixels_compute(order: Order) -> None:
    model = tiny(order).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator(1))
    x = torch.randn(1, 2, 6, 8, generator=generator(2), dtype=torch.float64)
    with torch.no_grad():
        actual = model.eval()(x)[0]
    np.testing.assert_allclose(actual.numpy(), Numbers(model, order)(x[0].numpy()), rtol=1e-10)


def test_published_tiramisu() -> None:
    """Jégou et al. give 103 layers and 9.4 million parameters; here norms count, too."""
    with torch.device("meta"):
        model = jegou_103()
        layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
        pools = [m for m in model.modules() if isinstance(m, nn.MaxPool2d)]
        assert (len(layers), len(pools)) == (103, 5)
        assert 9.3e6 < sum(p.numel() for p in model.parameters()) < 9.5e6
        assert model(torch.empty(1, 3, 64, 96)).shape == (1, 11, 64, 96)
        net, inputs = published()
        assert net(*inputs).shape == (1, 3, 768, 1152)
        strided = [m for m in kurth().modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
        assert [m.kernel_size for m in strided] == [(1, 1)] * 4


def test_published_deeplab() -> None:
    with torch.device("meta"):
        model = DeepLab()
        x = torch.empty(2, 16, 768, 1152)
        features, low = model.encoder(x)
        assert features.shape == (2, 2048, 96, 144)
        assert low.shape == (2, 256, 192, 288)
        assert model(x).shape == (2, 3, 768, 1152)
        encoder = [m for m in model.encoder.modules() if isinstance(m, nn.Conv2d)]
        assert len(encoder) == 1 + 3 * (3 + 4 + 6 + 3) + 4  # ResNet-50: shortcuts, no classifier
        rates = [m.dilation[0] for m in model.pyramid.modules() if isinstance(m, nn.Conv2d)]
        assert rates == [1, 12, 24, 36, 1, 1]


def test_every_weight_of_deeplab_learns_and_each_point_matters() -> None:
    torch.manual_seed(0)
    model = small_deeplab()
    fields = make_fields(2, generator())
    weighted_loss(model(fields.values), fields.labels, torch.ones(3)).backward()
    for name, parameter in model.named_parameters():
        if "ups" not in name:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.isfinite().all()), name
            assert bool(parameter.grad.any()) or ".norm" in name or "conv" in name, name
    model.eval()
    with torch.no_grad():
        moved = fields.values.clone()
        moved[0, :, 20, 30] += 1
        change = (model(moved) - model(fields.values))[0].abs().sum(0)
    # Beside the encoder, which is blurred over 8 points, there is a path at full resolution.
    assert change[20, 30] > 2 * change[20, 36]


# -- loss and scores -------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighting", "power"), [("none", 0), ("1/sqrt(f)", -0.5), ("1/f", -1)])
def test_weighted_loss_is_a_sum_over_points(weighting: Any, power: float) -> None:
    labels = torch.randint(3, (2, 4, 5), generator=generator(), dtype=torch.long)
    logits = torch.randn(2, 3, 4, 5, generator=generator(1)).double()
    weights = class_weights(labels, weighting)
    counts = [float((labels == c).sum()) for c in range(3)]
    raw = [(count / 40) ** power for count in counts]
    scale = sum(r * count for r, count in zip(raw, counts, strict=True)) / 40
    np.testing.assert_allclose(weights, [r / scale for r in raw], rtol=1e-6)
    total = 0.0
    for n in range(2):
        for i in range(4):
            for j in range(5):
                row, label = logits[n, :, i, j].tolist(), int(labels[n, i, j])
                partition = sum(math.exp(v) for v in row)
                total -= float(weights[label]) * math.log(math.exp(row[label]) / partition)
    actual = weighted_loss(logits, labels, weights.double())
    assert float(actual) == pytest.approx(total / 40, rel=1e-12)


def test_scores_are_those_of_scikit_learn() -> None:
    truth = torch.randint(3, (2, 6, 7), generator=generator())
    found = torch.randint(3, (2, 6, 7), generator=generator(1))
    scores = Scores(confusion(truth, found))
    flat = truth.flatten().numpy(), found.flatten().numpy()
    np.testing.assert_allclose(scores.iou, jaccard_score(*flat, average=None))
    np.testing.assert_allclose(scores.recall, recall_score(*flat, average=None))
    assert scores.accuracy == pytest.approx(float((truth == found).double().mean()))


# -- the data --------------------------------------------------------------------------------------


def test_cyclones_turn_with_their_hemisphere_around_low_pressure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(climate, "NOISE", 0.0)
    fields = make_fields(64, generator())
    u, v, p = (fields.values[:, CHANNELS.index(name)] for name in "uvp")
    curl = torch.gradient(v, dim=2)[0] - torch.gradient(u, dim=1)[0]
    north = (torch.arange(48) >= 24).view(1, 48, 1).expand_as(curl)
    inside, outside = fields.labels == 2, fields.labels == 0
    assert curl[inside & north].mean() > 5 * curl[outside].abs().mean()
    assert curl[inside & ~north].mean() < -5 * curl[outside].abs().mean()
    assert p[inside].mean() < p[outside].mean() - 0.8
    q = fields.values[:, 0]
    assert q[fields.labels == 1].mean() > q[outside].mean() + 0.8


def test_storms_are_rare_and_cross_the_seam() -> None:
    fields = make_fields(256, generator())
    shares = torch.bincount(fields.labels.flatten(), minlength=3) / fields.labels.numel()
    assert 0.96 < shares[0] < 0.985
    assert 0.003 < shares[2] < 0.008
    edges = fields.labels[:, :, 0].eq(2).any(1) & fields.labels[:, :, -1].eq(2).any(1)
    assert edges.any()


def test_loaders_refuse_by_name() -> None:
    values, labels = torch.zeros(2, 8, 48, 72), torch.zeros(2, 48, 72, dtype=torch.long)
    with pytest.raises(WorkloadError, match=r"labels has shape \[1, 48, 72\]"):
        Fields(values, labels[:1])
    with pytest.raises(WorkloadError, match="fields has shape"):
        Fields(values[:, :3], labels)
    with pytest.raises(WorkloadError, match="fields is empty"):
        Fields(values[:0], labels[:0])
    values[1, 2, 3, 4] = math.nan
    with pytest.raises(WorkloadError, match=r"fields holds 1 .*\[1, 2, 3, 4\]"):
        Fields(values, labels)


# -- through graphopt ------------------------------------------------------------------------------


def test_gradients_through_graphopt_are_those_of_eager_in_one_graph() -> None:
    one_exact_graph(case(torch.device("cpu")))


@pytest.mark.parametrize("order", ORDERS)
def test_only_norms_behind_convolutions_are_folded(order: Order) -> None:
    model = graphopt.optimize(tiny(order), passes="cleanup,fold_inference", backend="eager").eval()
    with torch.no_grad():
        model(torch.randn(1, 2, 8, 8, generator=generator()))
    (specialisation,) = report(model).specialisations
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    (_, fold) = specialisation.steps
    folded = [a for a in fold.outcome.applied if a.what == "folded into the layer before"]
    assert (len(folded), norms) == ((8, 8) if order == "conv_first" else (0, 7))


def test_a_short_training_finds_storms() -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(small_tiramisu(), backend="eager")
    fields = make_fields(8, generator())
    weights = class_weights(fields.labels, "1/sqrt(f)")
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        loss = weighted_loss(model(fields.values[:4]), fields.labels[:4], weights)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    held = Fields(fields.values[4:], fields.labels[4:])
    shape = (4, len(CLASSES), 48, 72)
    assert predict(model, held).shape == (shape[0], *shape[2:])


# -- gradient lag ----------------------------------------------------------------------------------


def _lag(net: nn.Module, shares: list[tuple[Tensor, Tensor]], stale: bool) -> list[Tensor]:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    training = ConstantDelay(optimizer, 0 if stale else 1)
    for x, labels in shares:
        training.step(lambda x=x, y=labels: weighted_loss(net(x), y, torch.ones(3)))
    return [p.detach().clone() for p in net.parameters()]


def _rank(rank: int) -> None:
    batches = [
        (
            torch.randn(4, 2, 8, 8, generator=generator(seed)),
            torch.randint(3, (4, 8, 8), generator=generator(seed)),
        )
        for seed in range(4)
    ]
    expected = _lag(tiny(norm=False), batches, stale=False)
    model = graphopt.optimize(
        tiny(norm=False), passes="cleanup,group_gradients{stale=lag}", backend="eager"
    )
    actual = _lag(model, [(x[rank::2], y[rank::2]) for x, y in batches], stale=True)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
def test_the_lag_of_a_job_is_the_delay_of_one_process(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _rank)
