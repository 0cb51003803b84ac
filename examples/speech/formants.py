"""A synthetic language: letters are moving resonances, spoken by anybody at any rate, in noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from graphopt.examples.speech.data import BANDS, FRAMES, SYMBOLS, VOCABULARY, Corpus, corpus

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Language:
    """How letters sound, as three formants each; frequencies in bands.

    Attributes:
        centres: (letters, 3), in the middle of the letter.
        widths: (letters, 3), standard deviations.
        slopes: (letters, 3), from the letter's beginning to its end.
        durations: (letters,), in frames at the usual rate.
    """

    centres: Array
    widths: Array
    slopes: Array
    durations: Array

    @classmethod
    def draw(cls, seed: int) -> Language:
        """A language of its own for each seed, whose letters keep apart from each other."""
        draw = np.random.default_rng([seed, 0])
        low, high = np.array([2.0, 8.0, 17.0]), np.array([10.0, 20.0, 30.0])
        letters: list[Array] = []  # (centres, slopes) of each
        for _ in SYMBOLS[2:]:
            options = np.stack(
                [draw.uniform(low, high, (32, 3)), draw.uniform(-4.0, 4.0, (32, 3))], axis=1
            )
            apart = [np.square(options - letter).sum((1, 2)) for letter in letters]
            letters.append(options[np.min(apart, axis=0).argmax() if apart else 0])
        centres, slopes = np.stack(letters, axis=1)
        widths = draw.uniform(0.8, 1.8, centres.shape)
        return cls(centres, widths, slopes, draw.uniform(4.0, 6.5, len(centres)))

    def say(self, text: str, draw: np.random.Generator, noise: float) -> Array:
        """Features (frames, BANDS) of a text, by a speaker drawn at random.

        The speaker shifts and stretches all frequencies and has a rate; each sound has a loudness.
        """
        shift, stretch, rate = (
            draw.uniform(-4.0, 4.0),
            draw.normal(1, 0.05),
            draw.uniform(0.75, 1.35),
        )
        bands = np.arange(BANDS)
        sounds = [np.zeros((int(draw.integers(2, 6)), BANDS))]
        for character in text:
            letter = SYMBOLS.index(character) - 2
            if letter < 0:
                sounds.append(np.zeros((int(draw.integers(2, 5)), BANDS)))
                continue
            wanted = self.durations[letter] * rate * draw.uniform(0.8, 1.2)
            when = np.linspace(-0.5, 0.5, max(4, round(wanted)))[:, None]
            at = self.centres[letter] + self.slopes[letter] * when
            at = (at * stretch + shift)[..., None]
            width = self.widths[letter][:, None]
            peaks = np.exp(-(((bands - at) / width) ** 2) / 2).sum(1)
            sounds.append(peaks * draw.uniform(0.7, 1.3))
        sounds.append(np.zeros((int(draw.integers(2, 6)), BANDS)))
        spoken = np.concatenate(sounds)
        # The mouth moves from one sound to the next.
        around = np.concatenate([spoken[:1], spoken, spoken[-1:]])
        blurred = (around[:-2] + around[1:-1] + around[2:]) / 3
        noisy: Array = blurred + noise * draw.standard_normal(blurred.shape)
        return noisy


def formants(
    name: str, count: int, seed: int, stream: int, *, words: int = 8, noise: float = 0.35
) -> Corpus:
    """Utterances of up to `words` words of `VOCABULARY`, in the language of the seed.

    Args:
        name: what they are called in errors.
        count: of utterances.
        seed: of the language, and of everything else together with `stream`.
        stream: another one gives other utterances in the same language.
        words: most words of an utterance; fewer where they would not fit `FRAMES`.
        noise: standard deviation, beside peaks of about one.
    """
    language, draw = Language.draw(seed), np.random.default_rng([seed, 1 + stream])
    utterances = []
    for _ in range(count):
        said = list(draw.choice(VOCABULARY, size=int(draw.integers(1, words + 1))))
        spoken = language.say(" ".join(said), draw, noise)
        while len(spoken) > FRAMES[-1]:
            said.pop()
            spoken = language.say(" ".join(said), draw, noise)
        utterances.append((torch.tensor(spoken, dtype=torch.float32), " ".join(said)))
    return corpus(name, utterances)
