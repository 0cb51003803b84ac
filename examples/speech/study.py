"""The networks that are compared, how they are trained, and what is required of them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.examples.common import Run
from graphopt.examples.speech.data import BANDS, SYMBOLS, Corpus, in_order_of_length, shuffled
from graphopt.examples.speech.decoding import greedy, word_error_rate
from graphopt.examples.speech.figure import draw
from graphopt.examples.speech.model import DeepSpeech, ctc

BATCH = 32
EVALUATED = 160
"""Utterances in a batch of the evaluation."""

RATE = 6e-3
"""Of Adam at its highest; chosen on validation data of another language, and good for all."""


@dataclass(frozen=True)
class Variant:
    """A network and its training.

    Attributes:
        title: as tables and figures have it.
        options: of `DeepSpeech`.
        sorted_first: whether the first epoch goes from short to long utterances (SortaGrad).
    """

    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sorted_first: bool = True


FULL = Variant("3 layers")
NO_NORM = Variant("3 layers, no normalisation", {"norm": False})
SHALLOW = Variant("1 layer", {"layers": 1})
WIDE = Variant("1 layer, as many weights", {"layers": 1, "hidden": 103})
SHUFFLED = Variant("3 layers, no SortaGrad", sorted_first=False)
FORWARD = Variant("3 forward layers", {"bidirectional": False})
AHEAD = Variant("3 forward layers, look-ahead", {"bidirectional": False, "ahead": 16})
VARIANTS = (FULL, NO_NORM, SHALLOW, WIDE, SHUFFLED, FORWARD, AHEAD)


def study(run: Run, training: Corpus, test: Corpus) -> None:
    """Train all variants and compare their word error rates."""
    errors: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    models: dict[str, DeepSpeech] = {}
    for variant in VARIANTS:
        title = variant.title
        model = models[title] = network(variant, run.seed)
        losses[title] = train(run, variant, model, training)
        texts = run.once(f"{title}: texts", functools.partial(recognise, model, test, run.device))
        errors[title] = word_error_rate(texts, test.texts)
        run.row(
            "word error rates",
            network=title,
            weights=sum(p.numel() for p in model.parameters() if p.requires_grad),
            loss=sum(losses[title][-20:]) / 20,
            word_error_rate=errors[title],
            seconds=run.results.seconds[title],
        )
    _require(run, errors)
    full = plain_copy(FULL, models[FULL.title])
    run.value("largest output of a recurrent unit", largest_unit(full, test))
    if run.first:
        torch.save(
            {"options": dict(FULL.options), "model": full.state_dict()}, run.output / "model.pt"
        )
        draw(run.output / "figure.svg", full, test, losses, errors, len(training) // BATCH)


def _require(run: Run, errors: Mapping[str, float]) -> None:
    def ratio(a: Variant, b: Variant) -> float:
        # A network that gets every word right still leaves a finite ratio.
        return errors[a.title] / max(errors[b.title], 1e-4)

    run.require("word errors, 3 layers / 1 layer", ratio(FULL, SHALLOW), at_most=0.5)
    run.require("word errors, with / without normalisation", ratio(FULL, NO_NORM), at_most=0.4)
    run.require("word errors, look-ahead / both directions", ratio(AHEAD, FULL), at_most=2.0)
    run.require("word errors, with / without look-ahead", ratio(AHEAD, FORWARD), at_most=0.999)
    run.require(
        "word errors, 3 layers / 1 of as many weights", ratio(FULL, WIDE), at_most=0.999, gate=False
    )
    run.require(
        "word errors, with / without SortaGrad", ratio(FULL, SHUFFLED), at_most=0.999, gate=False
    )


def network(variant: Variant, seed: int) -> DeepSpeech:
    """The variant with the weights that it begins with."""
    torch.manual_seed(seed)
    return DeepSpeech(BANDS, len(SYMBOLS), **variant.options)


def train(run: Run, variant: Variant, model: DeepSpeech, data: Corpus) -> list[float]:
    """Adam with a rate that rises over a tenth of the steps, then falls to zero: all losses."""
    optimized = run.optimize(model).train()
    per_epoch = len(data) // BATCH
    steps = run.epochs * per_epoch
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(10 * (step + 1), (steps - step) / 0.9) / steps
    )

    @functools.lru_cache(1)
    def order(epoch: int) -> list[Tensor]:
        if epoch == 0 and variant.sorted_first:
            return in_order_of_length(data.lengths, BATCH)
        return shuffled(data.lengths, BATCH, run.generator(epoch))

    def loss(step: int) -> Tensor:
        epoch, number = divmod(step, per_epoch)
        features, lengths, targets, sizes = data.batch(order(epoch)[number], run.device)
        return ctc(optimized(features, lengths), lengths, targets, sizes)

    return run.fit(variant.title, model, optimizer, loss, steps, scheduler=scheduler, clip=5.0)


def recognise(model: torch.nn.Module, data: Corpus, device: torch.device) -> list[str]:
    """What a network understands."""
    model.eval()
    texts: list[str] = []
    for features, lengths in zip(
        torch.split(data.features, EVALUATED), torch.split(data.lengths, EVALUATED), strict=True
    ):
        with torch.no_grad():
            found = model(features.to(device), lengths.to(device))
        texts += greedy(found.cpu(), lengths, SYMBOLS)
    return texts


def plain_copy(variant: Variant, trained: DeepSpeech) -> DeepSpeech:
    """The same network on the CPU, in inference mode, and not optimized."""
    copy = DeepSpeech(BANDS, len(SYMBOLS), **variant.options)
    copy.load_state_dict(trained.state_dict())
    return copy.eval()


def largest_unit(model: DeepSpeech, data: Corpus) -> float:
    """The largest output of a recurrence in a direction."""
    largest = [0.0]
    for layer in model.recurrent:
        assert isinstance(layer.cells, torch.nn.RNN)
        layer.cells.register_forward_hook(
            lambda _module, _inputs, outputs: largest.append(float(outputs[0].max()))
        )
    with torch.no_grad():
        model(data.features, data.lengths)
    return max(largest)
