"""Fits independent, pairwise and K-pairwise models to a synchronous population."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.neural_populations import analysis, fit
from graphopt.examples.neural_populations.data import population
from graphopt.examples.neural_populations.exact import exact_heat_capacity, fit_exact
from graphopt.examples.neural_populations.figure import draw
from graphopt.examples.neural_populations.independent import Independent
from graphopt.examples.neural_populations.model import GibbsSweep, KPairwise, moments

NEURONS, FEW, WORDS = 40, 14, 20_000
STRONG = 2.35  # strength at which the mean correlation of spikes is 0.10
_BURN_IN = 30


class Fitted:
    """A model after both stages of fitting, and its sampler.

    Args:
        run: of the workload.
        name: of the model.
        train: words, shape [N, words].
        last: of `KPairwise`.
        stream: where its random numbers begin.
    """

    def __init__(self, run: Run, name: str, train: Tensor, last: int, stream: int) -> None:
        self.run, self.name, self.stream = run, name, stream
        self.model = KPairwise(len(train), last)
        steps = 10 * run.epochs  # minibatches are a tenth of the words
        fit.fit_pseudo_likelihood(
            run, f"{name}, pseudo-likelihood", self.model, train, steps, stream
        )
        self.early = self.model.vector()
        self.states = fit.fit_moments(
            run, f"{name}, moments", self.model, train, 30 * run.epochs, stream + 100_000
        )
        self.sweep = run.optimize(GibbsSweep(self.model))

    def sample(self, number: int) -> Tensor:
        """300,000 words of the model."""
        noise = self.run.generator(self.stream + 200_000 + number)
        start = analysis.sample(self.sweep, self.states, noise, sweeps=_BURN_IN, every=_BURN_IN)
        return analysis.sample(self.sweep, start, noise, sweeps=1000, every=10)

    def judge(self, test: Tensor) -> dict[str, Any]:
        """Entropy, log Z, P(K), likelihood and correlations, all by sampling."""
        samples, test = self.sample(0), test.to(self.run.device)
        entropy, log_z = analysis.entropy(self.model, samples)
        own, data = analysis.triplets(samples), analysis.triplets(test)
        return {
            "entropy": entropy,
            "log_z": log_z,
            "synchrony": analysis.synchrony(samples),
            "bits": analysis.bits_per_word(self.model, log_z, test),
            "pairs": float((moments(samples).pairs - moments(test).pairs).norm()),
            "triplets": float((own - data).norm() / data.norm()),
        }

    def heat(self, sweeps: int) -> list[Tensor]:
        """Temperatures and heat capacities."""
        noise = self.run.generator(self.stream + 300_000)
        found = analysis.heat_capacity(self.model, self.sweep, self.states, noise, sweeps=sweeps)
        return [values.cpu() for values in found]


def run(run: Run) -> None:
    """Compare the models, check them against enumeration, count metastable states."""
    words = population(NEURONS, WORDS, run.generator())
    figure: dict[str, Any] = {"data": analysis.synchrony(words.test)}
    last = fit.last_resolved(words.train)
    pairwise = Fitted(run, "pairwise", words.train, 0, 1)
    synchronous = Fitted(run, "K-pairwise", words.train, last, 2)
    figure["models"] = _compare(run, pairwise, synchronous, words.train, words.test)
    figure["calibration"] = _predict(run, pairwise, synchronous, words.train, words.test)
    figure["heat"] = _enumerate(run, words.train[:FEW])
    found = run.once("K-pairwise, heat capacity", lambda: synchronous.heat(400))
    silence = run.results.values["entropy of K-pairwise, bits"]
    error = analysis.integrated_entropy(found[0], found[1]) / float(silence) - 1
    run.require("40 neurons: entropy by heat, relative error", abs(error), at_most=0.02, gate=False)
    figure["modes"] = _modes(run)
    draw(run.output / "figure.svg", figure)


def _compare(
    run: Run, pairwise: Fitted, synchronous: Fitted, train: Tensor, test: Tensor
) -> dict[str, Tensor]:
    alone = Independent(train)
    data, split = analysis.synchrony(test), analysis.synchrony(train)
    judged = {
        fitted.name: run.once(f"{fitted.name}, samples", functools.partial(fitted.judge, test))
        for fitted in (pairwise, synchronous)
    }
    judged["first stage alone"] = run.once("early, samples", lambda: _early(synchronous, test))
    spread = analysis.triplets(train) - analysis.triplets(test)
    independent = {  # all its third central moments vanish
        "entropy": alone.entropy,
        "synchrony": alone.synchrony(),
        "bits": float(alone.bits(test).sum(0).mean()),
    }
    for name, found in {"independent": independent, **judged}.items():
        run.row(
            "models: bits, and error of third moments",
            model=name,
            js=analysis.jensen_shannon(found["synchrony"], data),
            p_silence=float(found["synchrony"][0]),
            entropy=found["entropy"],
            test_bits=found["bits"],
            triplets=found.get("triplets", 1.0),
        )
        run.value(f"entropy of {name}, bits", found["entropy"])
    js = {n: analysis.jensen_shannon(f["synchrony"], data) for n, f in judged.items()}
    run.value(
        "JS of P(K) between training and test words, bits", analysis.jensen_shannon(split, data)
    )
    run.value("P(silence) of test words", float(data[0]))
    run.value(
        "triplet error of training words", float(spread.norm() / analysis.triplets(test).norm())
    )
    noise = float((moments(train).pairs - moments(test).pairs).norm())
    run.require(
        "pairwise moments: distance to test words, K-pairwise / training words",
        judged["K-pairwise"]["pairs"] / noise,
        at_most=1.1,
        gate=False,
    )
    a, b, c = independent, judged["pairwise"], judged["K-pairwise"]
    run.require("JS of P(K), K-pairwise / pairwise", js["K-pairwise"] / js["pairwise"], at_most=0.3)
    run.require("test bits per word, pairwise - independent", b["bits"] - a["bits"], at_least=0.0)
    run.require("test bits per word, K-pairwise - pairwise", c["bits"] - b["bits"], at_least=0.0)
    gain = a["entropy"] - b["entropy"], b["entropy"] - c["entropy"]
    run.require("entropy, independent - pairwise, bits", gain[0], at_least=0.0)
    run.require("entropy, pairwise - K-pairwise, bits", gain[1], at_least=0.0)
    return {"independent": alone.synchrony(), **{n: f["synchrony"] for n, f in judged.items()}}


def _early(fitted: Fitted, test: Tensor) -> dict[str, Any]:
    """The judgement of what the first stage of fitting had found."""
    late = fitted.model.vector()
    fitted.model.assign(fitted.early)
    judged = fitted.judge(test)
    fitted.model.assign(late)
    return judged


@torch.no_grad()
def _predict(
    run: Run, pairwise: Fitted, synchronous: Fitted, train: Tensor, test: Tensor
) -> tuple[Tensor, Tensor]:
    """How well a neuron is predicted from the others."""
    test = test.to(run.device)
    loss = {"independent": -float(Independent(train).bits(test.cpu()).mean())}
    for fitted in (pairwise, synchronous):
        odds = fitted.model(test)
        loss[fitted.name] = float(F.binary_cross_entropy_with_logits(odds, test)) / analysis.LN2
    for name, bits in loss.items():
        run.row("a neuron from the rest", model=name, millibits_per_bin=1000 * bits)
    run.require(
        "a neuron from the rest: loss, K-pairwise / pairwise",
        loss["K-pairwise"] / loss["pairwise"],
        at_most=1.0,
    )
    x, y = analysis.calibration(odds.cpu(), test.cpu())
    gap = float((torch.sigmoid(x) - y).abs().mean())
    run.require("a neuron from the rest: calibration error", gap, at_most=0.005)
    return x, y


def _enumerate(run: Run, train: Tensor) -> dict[str, Tensor]:
    """Of so few neurons that all words can be listed, everything is known."""
    last = fit.last_resolved(train)
    few = Fitted(run, "14 neurons", train, last, 3)
    found = run.once("14 neurons, samples", lambda: few.judge(train))
    temperatures, capacity = run.once("14 neurons, heat capacity", lambda: few.heat(2000))
    pairs = FEW * (FEW - 1) // 2
    precision = torch.zeros(FEW + pairs + last, dtype=torch.float64)
    precision[FEW:] = fit.POTENTIAL_PRECISION / WORDS
    precision[FEW : FEW + pairs] = fit.COUPLING_PRECISION / WORDS

    def oracle() -> dict[str, Any]:
        exact = fit_exact(train.T.double().numpy(), last, precision.numpy())
        heat = exact_heat_capacity(exact.energies, temperatures.double().cpu().numpy())
        return {"entropy": exact.entropy, "heat": torch.from_numpy(heat)}

    exact = run.once("14 neurons, enumeration", oracle)
    by_heat = analysis.integrated_entropy(temperatures, capacity)
    run.value("14 neurons: entropy by enumeration, bits", exact["entropy"])
    for name, entropy in (("silence", found["entropy"]), ("heat", by_heat)):
        error = abs(entropy / exact["entropy"] - 1)
        run.require(f"14 neurons: entropy by {name}, relative error", error, at_most=0.01)
    return {"temperatures": temperatures, "sampled": capacity, "exact": exact["heat"]}


def _modes(run: Run) -> tuple[Tensor, Tensor]:
    """The metastable states of a population with stronger shared input."""
    words = population(NEURONS, WORDS, run.generator(4), strength=STRONG)
    index = torch.triu_indices(NEURONS, NEURONS, 1)
    correlation = float(torch.corrcoef(words.train)[index[0], index[1]].mean())
    strong = Fitted(run, "strong", words.train, fit.last_resolved(words.train), 5)
    states, basins = analysis.modes(strong.model, words.test.to(run.device))
    again, _ = analysis.modes(strong.model, words.train.to(run.device))
    known = {tuple(column) for column in again.T.tolist()}
    repeated = torch.tensor([tuple(column) in known for column in states.T.tolist()])
    run.value("strong: mean correlation of spikes", correlation)
    run.value("strong: fraction of test words that descend to silence", float(basins[0]))
    run.value(
        "strong: of the other test words, fraction in a basin that training words reach, too",
        float(basins[1:][repeated[1:]].sum() / basins[1:].sum()),
    )
    run.require("strong: metastable states beside silence", states.shape[1] - 1, at_least=3)
    return states.cpu(), basins.cpu()


def case(device: torch.device) -> Case:
    """A step of maximum pseudo-likelihood on one minibatch."""
    words = population(NEURONS, fit.BATCH, torch.Generator().manual_seed(0)).train
    model = KPairwise(NEURONS, 14)
    start = torch.logit(words.mean(1).clamp(min=0.5 / fit.BATCH))
    model.assign(torch.cat([start, torch.zeros(NEURONS * (NEURONS - 1) // 2 + 14)]))
    words = words.to(device)
    return Case(model.to(device), (words,), lambda odds: fit.pseudo_likelihood_loss(odds, words))


WORKLOAD = Workload(
    "neural_populations",
    "K-pairwise maximum entropy models of synchronous neural populations.",
    run,
    case,
    epochs=20,
    long_epochs=200,
)

if __name__ == "__main__":
    WORKLOAD.main()
