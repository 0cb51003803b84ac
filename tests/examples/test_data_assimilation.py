"""Deep Bayesian filtering, held against Gaussian conditioning, SciPy and PyTorch eager."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from rich.console import Console
from torch import Tensor

import graphopt
from graphopt.examples.common import Run, WorkloadError
from graphopt.examples.common.checkpoint import Checkpoint
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.data_assimilation import train
from graphopt.examples.data_assimilation.baselines import (
    EnsembleSettings,
    ensemble_kalman,
    particle_filter,
    rmse,
)
from graphopt.examples.data_assimilation.data import (
    PENDULUM,
    System,
    Trajectories,
    lorenz96,
    pendulum,
    runge_kutta,
    trajectories,
)
from graphopt.examples.data_assimilation.kalman import largest_difference, linear_gaussian
from graphopt.examples.data_assimilation.model import DeepBayesianFilter
from graphopt.examples.data_assimilation.recursion import Belief, divergence, samples
from graphopt.examples.data_assimilation.time_loops import (
    InCells,
    InParallel,
    InScan,
)
from graphopt.model.surface import report

# -- the recursion ---------------------------------------------------------------------------------


def _conditioned(a, q, h, r, p, seen):  # type: ignore[no-untyped-def]
    """Mean and covariance of the last state by conditioning the joint Gaussian of everything."""
    times, n = len(seen), len(a)
    # All states are M e with e = (first state, noise of each transition).
    m = np.zeros((times * n, times * n))
    for t in range(times):
        for s in range(t + 1):
            m[t * n : (t + 1) * n, s * n : (s + 1) * n] = np.linalg.matrix_power(a, t - s)
    states = m @ scipy.linalg.block_diag(p, *[q] * (times - 1)) @ m.T
    looks = np.kron(np.eye(times), h)
    observations = looks @ states @ looks.T + np.kron(np.eye(times), r)
    cross = (states @ looks.T)[-n:]
    solved = scipy.linalg.solve(observations, cross.T, assume_a="pos").T
    return solved @ seen.reshape(-1), states[-n:, -n:] - solved @ cross.T


@pytest.mark.parametrize("planes", [1, 3])
def test_the_recursion_is_gaussian_conditioning(planes: int) -> None:
    system, model = linear_gaussian(planes, seed=5)
    seen = system.simulate(7, np.random.default_rng(1))
    with torch.no_grad():
        after, _ = model.filter(torch.from_numpy(seen)[None])
    mean, covariance = _conditioned(system.a, system.q, system.h, system.r, system.p, seen)
    assert np.abs(after.mean[:, 0, -1].flatten().numpy() - mean).max() < 1e-10
    for k in range(planes):
        place = np.ix_([k, planes + k], [k, planes + k])
        assert np.abs(after.covariance[:, :, 0, -1, k].numpy() - covariance[place]).max() < 1e-10


def test_the_recursion_is_the_kalman_filter() -> None:
    assert largest_difference(planes=4, times=40, seed=0) < 1e-10


def test_the_check_against_the_kalman_filter_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.examples.data_assimilation.model.VIRTUAL_PRIOR_PRECISION", 1e-6)
    assert largest_difference(planes=2, times=10, seed=0) > 1e-8


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        (DeepBayesianFilter, 6),
        (InCells, 6),
        (InParallel, 2),
        (InParallel, 11),
        (InParallel, 16),
        (InScan, 6),
    ],
)
def test_all_forms_of_the_loop_agree(kind: type[DeepBayesianFilter], times: int) -> None:
    torch.manual_seed(0)
    plain = DeepBayesianFilter(1, 2, planes=3, width=8, steps=times)
    other = kind(1, 2, planes=3, width=8, steps=2)
    other.load_state_dict(plain.state_dict(), strict=False)
    drawn = trajectories(PENDULUM, 5, times, torch.Generator().manual_seed(0))
    noise = torch.randn(2, 5, times, 3, dtype=torch.float64)
    losses = []
    for model in (plain, other):
        losses.append(model(drawn.observations.float(), drawn.states.float(), noise))
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-6)
    names = [name for name, _ in plain.named_parameters()]
    for name in names:
        own, expected = other.get_parameter(name).grad, plain.get_parameter(name).grad
        assert own is not None, name
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-6)


def _belief(seed: int) -> Belief:
    random = torch.Generator().manual_seed(seed)
    root = torch.randn(2, 2, 6, generator=random, dtype=torch.float64)
    mean = torch.randn(2, 6, generator=random, dtype=torch.float64)
    return Belief(mean, torch.einsum("ikn,jkn->ijn", root, root) + 0.1 * torch.eye(2)[..., None])


def test_the_divergence_is_that_of_torch() -> None:
    after, before = _belief(0), _belief(1)
    normal = [
        torch.distributions.MultivariateNormal(b.mean.T, b.covariance.permute(2, 0, 1))
        for b in (after, before)
    ]
    expected = torch.distributions.kl_divergence(*normal)
    torch.testing.assert_close(divergence(after, before), expected, rtol=1e-12, atol=1e-12)


def test_draws_have_the_covariance_of_the_belief() -> None:
    belief = _belief(2)
    root = [samples(belief, e[:, None].expand(2, 6)) - belief.mean for e in torch.eye(2).double()]
    made = torch.einsum("kin,kjn->ijn", torch.stack(root), torch.stack(root))
    torch.testing.assert_close(made, belief.covariance, rtol=1e-12, atol=1e-12)


# -- systems and reference filters -----------------------------------------------------------------


def test_the_pendulum_keeps_its_energy_and_small_swings_are_harmonic() -> None:
    state = torch.tensor([[2.5, 1.0]], dtype=torch.float64)
    energy = lambda s: 0.5 * s[:, 1] ** 2 - 9.8 * s[:, 0].cos()  # noqa: E731
    later = runge_kutta(pendulum, state, 3.0, 150)
    assert abs(float(energy(later) - energy(state))) < 1e-3
    small = runge_kutta(pendulum, torch.tensor([[1e-4, 0.0]], dtype=torch.float64), 1.0, 50)
    assert abs(float(small[0, 0]) / 1e-4 - np.cos(9.8**0.5)) < 1e-5


def test_lorenz_is_that_of_scipy() -> None:
    def derivative(_: float, x: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
        n = len(x)
        return np.array([(x[(i + 1) % n] - x[i - 2]) * x[i - 1] - x[i] + 8.0 for i in range(n)])

    first = 8 + np.random.default_rng(0).normal(size=8)
    exact = scipy.integrate.solve_ivp(derivative, (0, 0.3), first, rtol=1e-11, atol=1e-11).y[:, -1]
    ours = runge_kutta(lorenz96, torch.from_numpy(first)[None], 0.3, 60)[0].numpy()
    assert np.abs(ours - exact).max() < 1e-5


def _linear() -> System:
    """An oscillator observed directly: the Kalman filter is the best there is."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    return System(
        "oscillator",
        lambda state: state @ turn.T,
        lambda n, g: torch.randn(n, 2, generator=g, dtype=torch.float64),
        lambda state: state[..., :1],
        0.5,
        0.2,
        1,
        torch.ones(2, dtype=torch.float64),
    )


def _optimal(observations: Tensor) -> Tensor:
    a = scipy.linalg.expm(0.2 * np.array([[0.0, 1.0], [-1.0, 0.0]]))
    h, r, q = np.array([[1.0, 0.0]]), np.array([[0.25]]), np.zeros((2, 2))
    seen = observations.numpy()
    means = [
        [_conditioned(a, q, h, r, np.eye(2), path[: t + 1])[0] for t in range(len(path))]
        for path in seen
    ]
    return torch.tensor(np.array(means))


@pytest.mark.parametrize("method", ["stochastic", "square root", "particles"])
def test_reference_filters_approach_the_optimum_of_a_linear_system(method: str) -> None:
    system = _linear()
    data = trajectories(system, 8, 10, torch.Generator().manual_seed(3))
    random = torch.Generator().manual_seed(4)
    if method == "particles":
        found = particle_filter(system, data.observations, 4000, 0.005, random)
    else:
        settings = EnsembleSettings(2000, 1.0, 0.0, method == "stochastic")
        found = ensemble_kalman(system, data.observations, settings, random)
    assert rmse(found, _optimal(data.observations)) < 0.05
    assert rmse(data.observations.expand(-1, -1, 2), _optimal(data.observations)) > 0.4


@pytest.mark.parametrize(
    ("states", "observations", "message"),
    [
        (torch.zeros(0, 5, 2), torch.zeros(0, 5, 1), "states is empty"),
        (torch.zeros(3, 5), torch.zeros(3, 5, 1), "states has shape"),
        (torch.zeros(3, 5, 2), torch.zeros(3, 4, 1), "observations has shape"),
        (torch.zeros(3, 5, 2), torch.full((3, 5, 1), torch.nan), "observations holds 15 values"),
    ],
)
def test_bad_trajectories_are_named(states: Tensor, observations: Tensor, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        Trajectories(states, observations)


# -- through the compiler --------------------------------------------------------------------------


def test_a_call_is_one_graph_with_the_gradients_of_eager() -> None:
    case = train.case(torch.device("cpu"))
    plain = copy.deepcopy(case.model)
    graphopt.optimize(case.model, passes=case.passes, backend="eager")
    for model in (case.model, plain):
        case.loss(model(*case.inputs)).backward()
    for (name, own), other in zip(case.model.named_parameters(), plain.parameters(), strict=True):
        assert own.grad is not None, name
        assert other.grad is not None
        assert torch.equal(own.grad, other.grad), name
    found = report(case.model)
    assert len(found.specialisations) == 1
    assert not found.plain


def test_all_calls_of_the_recursion_share_one_graph() -> None:
    torch.manual_seed(0)
    model = DeepBayesianFilter(1, 2, planes=2, width=8, steps=2)
    plain = copy.deepcopy(model)
    graphopt.optimize(model.recursion, backend="eager")
    drawn = trajectories(PENDULUM, 4, 8, torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, 8, 2, dtype=torch.float64)
    for own in (model, plain):
        own(drawn.observations.float(), drawn.states.float(), noise).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        assert other.grad is not None
        # A compiled call adds up what its uses of A contribute before other calls come in.
        exact = 1e-12 if own.dtype == torch.float64 else 0
        torch.testing.assert_close(own.grad, other.grad, rtol=exact, atol=exact)
    assert len(report(model.recursion).specialisations) == 1
    assert not report(model.recursion).plain


@pytest.mark.slow
def test_a_loop_is_captured_as_one_operator() -> None:
    torch.manual_seed(0)
    model = InScan(1, 2, planes=2, width=8)
    plain = copy.deepcopy(model)
    graphopt.optimize(model, passes="cleanup", backend="eager")
    times = 8
    drawn = trajectories(PENDULUM, 4, times, torch.Generator().manual_seed(0))
    noise = torch.randn(2, 4, times, 2, dtype=torch.float64)
    for own in (model, plain):
        own(drawn.observations.float(), drawn.states.float(), noise).backward()
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert own.grad is not None
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=0)
    assert report(model).specialisations[0].steps[-1].nodes_after < 80 * times  # not unrolled
    assert not report(model).plain


def test_a_short_training_learns(tmp_path: Path) -> None:
    settings = {"workload": "data_assimilation", "seed": 0, "epochs": 1, "backend": "none"}
    run = Run(
        checkpoint=Checkpoint(dict(settings)),
        results=Results("data_assimilation", settings),
        output=tmp_path,
        device=torch.device("cpu"),
        console=Console(quiet=True),
        interrupts=Interrupts(),
    )
    losses: list[float] = []
    fit = run.fit
    run.fit = lambda *a, **k: losses.extend(fit(*a, **k)) or losses  # type: ignore[method-assign]
    model = train.train_filter(run, train.ONE_PENDULUM)
    assert sum(losses[-5:]) / 5 < losses[0] - 1.0
    test = trajectories(PENDULUM, 64, train.TIMES, torch.Generator().manual_seed(9))
    found = model.estimate(test.observations.float())
    blind = test.states.mean((0, 1)).expand_as(test.states)
    half = train.TIMES // 2
    assert rmse(found, test.states, half) < 0.7 * rmse(blind, test.states, half)
