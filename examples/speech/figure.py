"""What is said and understood, how networks learn, and how many words they get wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.examples.common import COLOURS, GREY, panels
from graphopt.examples.speech.data import SYMBOLS, Corpus
from graphopt.examples.speech.decoding import greedy
from graphopt.examples.speech.model import STRIDE, DeepSpeech

MILLISECONDS = 10
"""Per frame of features."""


def draw(
    path: Path,
    model: DeepSpeech,
    test: Corpus,
    losses: Mapping[str, Sequence[float]],
    errors: Mapping[str, float],
    per_epoch: int,
) -> None:
    """Write the figure.

    Args:
        path: where to.
        model: whose outputs are shown.
        test: utterances; one of middle length is shown.
        losses: of each step, by network.
        errors: word error rates, by network.
        per_epoch: steps.
    """
    names = list(losses)
    with panels(path, 2, 2, width=9.6, height=2.9) as axes:
        _utterance(axes[0, 0], axes[1, 0], model, test)
        learning, bars = axes[0, 1], axes[1, 1]
        for colour, name in zip(COLOURS, names, strict=True):
            window = np.ones(min(10, len(losses[name])))
            smooth = np.convolve(losses[name], window / len(window), "valid")
            at = (np.arange(len(smooth)) + len(window)) / per_epoch
            learning.plot(at, smooth, color=colour, linewidth=1.3)
            rank = names.index(name)
            bars.barh(rank, 100 * errors[name], color=colour)
            bars.text(100 * errors[name], rank, f" {100 * errors[name]:.1f}", va="center")
        learning.set(xlabel="epoch", ylabel="CTC loss (nats per character)", yscale="log")
        bars.set(xlabel="word error rate on test data (%)")
        bars.set_yticks(range(len(names)), [name.replace(", ", "\n") for name in names])
        bars.tick_params(axis="y", labelsize=8)
        bars.invert_yaxis()
        bars.margins(x=0.12)


def _utterance(spectrum: Any, spikes: Any, model: DeepSpeech, test: Corpus) -> None:
    """Features, and under them when the network is sure of which character."""
    number = int((test.lengths - test.lengths.float().median()).abs().argmin())
    length = int(test.lengths[number])
    features, lengths = test.features[number : number + 1, :length], test.lengths[[number]]
    with torch.no_grad():
        found = model(features, lengths)
    seconds = length * MILLISECONDS / 1000
    spectrum.imshow(
        features[0].T.numpy(),
        aspect="auto",
        origin="lower",
        cmap="magma",
        extent=(0, seconds, 0, len(features[0].T)),
    )
    spectrum.set(xlabel="time (s)", ylabel="frequency (band)")
    spectrum.set_title(f"said: {test.texts[number]}")
    at = (np.arange(found.shape[1]) + 0.5) * STRIDE * MILLISECONDS / 1000
    probabilities = found[0].exp().numpy()
    spikes.plot(at, probabilities[:, 0], color=GREY, linewidth=0.8)
    for symbol in range(1, len(SYMBOLS)):
        if probabilities[:, symbol].max() > 0.2:
            colour = COLOURS[symbol % len(COLOURS)]
            spikes.plot(at, probabilities[:, symbol], color=colour, linewidth=1.2)
    best = probabilities.argmax(1)
    for i in np.flatnonzero((best > 0) & (best != np.roll(best, 1))):
        letter = SYMBOLS[best[i]].replace(" ", "␣")
        spikes.text(at[i], 1.04, letter, ha="center", fontsize=8)
    spikes.set(xlabel="time (s)", ylabel="probability", xlim=(0, seconds), ylim=(0, 1.15))
    spikes.set_title(f"understood: {greedy(found, lengths, SYMBOLS)[0]} (grey: blank)")
