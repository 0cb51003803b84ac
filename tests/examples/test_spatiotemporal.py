"""Bayesian neural fields: densities against scipy, particles one by one, quantiles of mixtures."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

import graphopt
from graphopt.capture import capture
from graphopt.examples.common import WorkloadError
from graphopt.examples.spatiotemporal.data import Samples, field, make_split, with_validation
from graphopt.examples.spatiotemporal.model import (
    Ensemble,
    Features,
    Field,
    Variational,
    log_likelihood,
    log_prior,
    noise_sd,
)
from graphopt.examples.spatiotemporal.scores import (
    Prediction,
    mixture_quantile,
    predict_mixture,
    score,
)
from graphopt.examples.spatiotemporal.train import case
from graphopt.model.surface import report
from tests.examples.contract import one_exact_graph

FEATURES = Features((2, 1, 0), (52.0, 4.0), 2)
SCALE = torch.tensor([104.0, 1.0, 1.0])


def _fields(count: int, width: int = 6) -> list[Field]:
    torch.manual_seed(0)
    fields = [Field(FEATURES, SCALE, width) for _ in range(count)]
    for own in fields:
        for parameter in own.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return fields


def _samples(count: int = 20) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(count, 3) * SCALE, torch.randn(count)


def test_prior_and_likelihood_are_those_of_scipy() -> None:
    torch.manual_seed(0)
    parameters = [3 * torch.randn(4, 5, dtype=torch.float64), torch.tensor([40.0, -60.0])]
    expected = sum(stats.logistic.logpdf(p.double().numpy()).sum() for p in parameters)
    assert float(log_prior(parameters)) == pytest.approx(expected, rel=1e-7)
    mean, values = torch.randn(2, 30, dtype=torch.float64)
    sd = noise_sd(torch.tensor(-0.7, dtype=torch.float64))
    normal = stats.norm(mean.numpy(), 0.01 + math.exp(-0.7))
    expected = normal.logpdf(values.numpy()).sum()
    assert float(log_likelihood(mean, sd, values)) == pytest.approx(expected, rel=1e-12)


def test_a_field_is_its_equations() -> None:
    (own,) = _fields(1)
    inputs, _ = _samples()
    p = {name: value.detach().double().numpy() for name, value in own.named_parameters()}
    raw = inputs.double().numpy()
    x = raw / (SCALE.double().numpy() * np.exp(p["log_scale"]))
    columns: list[list[np.ndarray]] = [[x[:, 0], x[:, 1], x[:, 2]]]
    waves = [(x[:, 0], 2), (x[:, 1], 1)]
    for column, degree in waves:
        columns.append(
            [
                f(2 * np.pi * 2**d * column) / (d + 1)
                for f in (np.cos, np.sin)
                for d in range(degree)
            ]
        )
    for period in (52, 4):
        columns.append(
            [f(2 * np.pi * h * raw[:, 0] / period) / h for f in (np.cos, np.sin) for h in (1, 2)]
        )
    columns.append([x[:, 0] * x[:, 1], x[:, 0] * x[:, 2], x[:, 1] * x[:, 2]])
    factors = np.logaddexp(0, p["group_scale"])
    hidden = np.stack([f * c for f, g in zip(factors, columns, strict=True) for c in g], 1)
    share = 1 / (1 + np.exp(-p["activation"]))
    for layer in range(3):
        weight, bias = p[f"weights.{layer}"], p[f"biases.{layer}"]
        hidden = hidden @ weight.T / np.sqrt(weight.shape[1]) + bias
        hidden *= np.logaddexp(0, p["layer_scale"][layer])
        if layer < 2:
            elu = np.where(hidden > 0, hidden, np.expm1(np.minimum(hidden, 0)))
            hidden = share * elu + (1 - share) * np.tanh(hidden)
    np.testing.assert_allclose(own(inputs).detach().numpy(), hidden[:, 0], rtol=2e-4, atol=2e-5)


def test_weights_start_within_two_standard_deviations() -> None:
    torch.manual_seed(0)
    weight = Field(FEATURES, SCALE, 200).weights[1]
    assert float(weight.abs().max()) <= 2.0
    expected = stats.truncnorm(-2, 2).std()
    assert float(weight.std()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("route", ["vmap", "loop"])
def test_members_of_an_ensemble_are_what_they_are_alone(route: str) -> None:
    """Ten steps of Adam, through graphopt and one by one in plain PyTorch."""
    fields, (inputs, values) = _fields(3), _samples()
    ensemble = Ensemble(copy.deepcopy(fields), route)  # type: ignore[arg-type]
    graphopt.optimize(ensemble, backend="eager")
    assert not report(ensemble).specialisations
    for model in (ensemble, *fields):
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(10):
            optimizer.zero_grad()
            if isinstance(model, Ensemble):
                loss = model(inputs, values)[0].sum()
            else:
                sd = 0.01 + model.log_noise.exp()
                normal = torch.distributions.Normal(model(inputs), sd)
                loss = -normal.log_prob(values).sum()
                for parameter in model.parameters():
                    loss = loss + (parameter + 2 * torch.nn.functional.softplus(-parameter)).sum()
            loss.backward()
            optimizer.step()
    for name, stacked in zip(ensemble.names, ensemble.stacked, strict=True):
        alone = torch.stack([dict(f.named_parameters())[name] for f in fields])
        torch.testing.assert_close(stacked, alone, rtol=1e-4, atol=1e-4)
    (only,) = report(ensemble).specialisations
    assert only.level == "joint"


def test_vmap_becomes_batched_products_however_many_particles() -> None:
    inputs, values = _samples()
    sizes, products = [], []
    for count in (2, 5):
        found = capture(Ensemble(_fields(count)), (inputs, values), {}).graph
        sizes.append(len(found.nodes))
        targets = [node.target for node in found.nodes]
        products.append(targets.count(torch.ops.aten.bmm.default))
        assert torch.ops.aten.addmm.default not in targets
    assert sizes[0] == sizes[1]
    assert products[0] == products[1] >= 8  # 3 forward; 3 for weights and 2 for hidden, backward


def test_an_ensemble_is_a_network_of_batched_products() -> None:
    """The same means by `torch.bmm` on stacked weights, without `vmap`."""
    fields, (inputs, values) = _fields(3), _samples()
    hidden = torch.stack([own._features(inputs) for own in fields])
    for layer in range(3):
        weight = torch.stack([own.weights[layer] for own in fields])
        bias = torch.stack([own.biases[layer] for own in fields])[:, None]
        scale = torch.stack([own.layer_scale[layer] for own in fields])[:, None, None]
        product = torch.bmm(hidden, weight.mT) / math.sqrt(weight.shape[2]) + bias
        hidden = torch.nn.functional.softplus(scale) * product
        if layer < 2:
            share = torch.stack([own.activation for own in fields])[:, None, None].sigmoid()
            hidden = share * torch.nn.functional.elu(hidden) + (1 - share) * hidden.tanh()
    means = Ensemble(fields)(inputs, values)[1]
    torch.testing.assert_close(means, hidden[..., 0], rtol=1e-5, atol=1e-5)


def test_the_bound_is_that_of_scipy() -> None:
    (own,), (inputs, values) = _fields(1), _samples()
    model = Variational(own, samples=2, weight=0.3)
    torch.manual_seed(2)
    noise = [torch.randn(2, *p.shape) for p in model.means]
    expected = 0.0
    for draw in range(2):
        member, divergence = copy.deepcopy(own), 0.0
        for name, parameter in member.named_parameters():
            z = noise[model.ensemble.names.index(name)][draw]
            mean = parameter.detach().clone()
            parameter.data = mean + 0.3 * z
            q = stats.norm(mean.numpy(), 0.3).logpdf(parameter.detach().numpy())
            divergence += (q - stats.logistic.logpdf(parameter.detach().numpy())).sum()
        sd = 0.01 + math.exp(float(member.log_noise))
        fit = stats.norm(member(inputs).detach().numpy(), sd).logpdf(values.numpy()).sum()
        expected += (-fit + 0.3 * divergence) / 2
    # Of the entropy the bound leaves out what no parameter changes, and has the rest exactly.
    count = sum(p.numel() for p in model.means)
    z_square = sum(float(z.square().sum()) for z in noise) / 2
    constant = 0.3 * (0.5 * count * math.log(2 * math.pi) + 0.5 * z_square)
    found = float(model(inputs, values, noise)) - constant
    assert found == pytest.approx(expected, rel=1e-4)


def test_quantiles_of_mixtures_are_those_of_brute_force() -> None:
    generator = np.random.default_rng(0)
    means, sds = generator.normal(size=(5, 7)) * 3, generator.uniform(0.05, 2, 5)
    for probability in (0.025, 0.5, 0.9):
        found = mixture_quantile(torch.tensor(means), torch.tensor(sds), probability)
        for column, ours in zip(means.T, found.numpy(), strict=True):
            exact = optimize.brentq(
                lambda v, c=column, p=probability: stats.norm(c, sds).cdf(v).mean() - p,
                -40, 40, xtol=1e-13,
            )  # fmt: skip
            assert ours == pytest.approx(exact, abs=1e-9)
    drawn = means[generator.integers(5, size=400_000)]
    component = generator.integers(5, size=400_000)
    drawn = means[component, 0] + sds[component] * generator.normal(size=400_000)
    assert float(mixture_quantile(torch.tensor(means), torch.tensor(sds), 0.9)[0]) == (
        pytest.approx(np.quantile(drawn, 0.9), abs=0.03)
    )


def test_scores_of_known_intervals() -> None:
    found = score(
        Prediction(torch.zeros(4), torch.full((4,), -1.0), torch.ones(4)),
        torch.tensor([0.0, 1.0, 1.5, -3.0]),
    )
    assert found.coverage == 0.5
    assert found.mis == pytest.approx(2 + 40 * (0.5 + 2) / 4)
    assert found.rmse == pytest.approx(math.sqrt((1 + 2.25 + 9) / 4))


def test_a_short_training_halves_the_error() -> None:
    split = make_split(torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    features = Features((0, 0, 0), (52.0, 4.0), 2)
    ensemble = Ensemble([Field(features, SCALE, 24) for _ in range(3)])
    graphopt.optimize(ensemble, backend="eager")
    inputs, values = split.training.inputs, split.training.values
    optimizer = torch.optim.Adam(ensemble.parameters(), 2e-2)
    for _ in range(120):
        optimizer.zero_grad()
        (ensemble(inputs, values)[0].sum() / len(values)).backward()
        optimizer.step()
    with torch.no_grad():
        means = ensemble(split.validation.inputs, split.validation.values)[1]
    found = score(predict_mixture(means, ensemble.noise()), split.validation.values)
    assert found.rmse < 0.7 * float(split.validation.values.std())


def test_gradients_of_the_case_are_those_of_eager() -> None:
    one_exact_graph(case(torch.device("cpu")))


def test_splits_share_no_sample() -> None:
    split = make_split(torch.Generator().manual_seed(3))
    parts = [split.training, split.validation, split.test]
    keys = [{tuple(row) for row in part.inputs.tolist()} for part in parts]
    assert len(keys[0] | keys[1] | keys[2]) == 30 * 104 == sum(len(k) for k in keys)
    assert len(keys[2]) == 5 * 104 + 10 * 20
    assert len(with_validation(split).values) == 2400


@pytest.mark.parametrize(
    ("inputs", "values", "words"),
    [
        (torch.zeros(0, 3), torch.zeros(0), "weather inputs is empty"),
        (torch.zeros(4, 2), torch.zeros(4), "weather inputs has shape"),
        (torch.zeros(4, 3), torch.zeros(5), "weather values has shape"),
        (torch.zeros(4, 3), torch.full((4,), torch.nan), "weather values holds 4 values"),
    ],
)
def test_other_samples_are_refused(inputs: Tensor, values: Tensor, words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        Samples(inputs, values).check("weather")


def test_places_are_checked() -> None:
    with pytest.raises(WorkloadError, match="places has shape"):
        field(torch.zeros(3, 3), torch.Generator())
