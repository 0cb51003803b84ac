"""Random words that depend on what they are for, and on nothing else: Philox-4x32 with 10 rounds.

The generator is counter-based (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011): a word is a function of a key and a counter. Element i takes word ``i % 4`` of
the counter (i // 4 low, i // 4 high, step, use) under the key `seed`. So the order of threads,
tiles and ranks does not matter, and a step can be repeated.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 10
WORD = 2**32 - 1
# Multipliers of the two halves and increments of the two words of the key.
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
INCREMENTS = 0x9E3779B9, 0xBB67AE85


def words(count: int, seed: Tensor, use: int) -> Tensor:
    """One random word for each of `count` elements.

    Args:
        count: number of elements, from element 0.
        seed: int64 [2]: the seed, and the step (of which the lower 32 bits count).
        use: what the words are for, 0 to 2^31 - 1.

    Returns:
        int64 [count], each 0 to 2^32 - 1, on the device of `seed`.
    """
    group = torch.arange(-(-count // 4), device=seed.device)
    a, b = group & WORD, group >> 32
    c, d = (seed[1] & WORD).expand_as(group), torch.full_like(group, use)
    key, other_key = seed[0] & WORD, (seed[0] >> 32) & WORD
    for _ in range(ROUNDS):
        # Products wrap in int64, but all of their 64 bits are right.
        left, right = a * MULTIPLIERS[0], c * MULTIPLIERS[1]
        a, b, c, d = (
            ((right >> 32) & WORD) ^ b ^ key,
            right & WORD,
            ((left >> 32) & WORD) ^ d ^ other_key,
            left & WORD,
        )
        key, other_key = (key + INCREMENTS[0]) & WORD, (other_key + INCREMENTS[1]) & WORD
    return torch.stack([a, b, c, d], dim=1).view(-1)[:count]
