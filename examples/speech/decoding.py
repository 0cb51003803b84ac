"""Text from a network's outputs, and how many of its words are wrong."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphopt.examples.speech.model import output_lengths


def greedy(log_probabilities: Tensor, lengths: Tensor, symbols: str) -> list[str]:
    """The text of the likeliest alignment of each utterance.

    Args:
        log_probabilities: (batch, frames, symbols), as `DeepSpeech` returns them.
        lengths: (batch,), frames of features of each utterance.
        symbols: what each number stands for; the first is CTC's blank.
    """
    best, frames = log_probabilities.argmax(-1).tolist(), output_lengths(lengths).tolist()
    return [collapse(path[:n], symbols) for path, n in zip(best, frames, strict=True)]


def collapse(path: Sequence[int], symbols: str) -> str:
    """Merge repetitions, then remove blanks."""
    kept = [s for i, s in enumerate(path) if s and (i == 0 or s != path[i - 1])]
    return "".join(symbols[s] for s in kept)


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """The fewest insertions, deletions and substitutions that turn one sequence into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def word_error_rate(found: Sequence[str], spoken: Sequence[str]) -> float:
    """Edits of words over words that were spoken, of all utterances together."""
    pairs = [(f.split(), s.split()) for f, s in zip(found, spoken, strict=True)]
    return sum(edit_distance(f, s) for f, s in pairs) / sum(len(s) for _, s in pairs)
