"""The input factor of a convolution: `graphopt::patch_moment` against unfold and one product.

Alternating runs in one process; medians of paired ratios with bootstrap intervals. Run
``python -m benchmarks.conv_factor`` on an otherwise idle machine; the results go to
``benchmarks/results/conv_factor.json``, with the load of the machine when it began.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from benchmarks.harness import alternate, keep, milliseconds, ratio

# images, channels, side: the 3 x 3 convolutions of small residual networks.
SHAPES = [(64, 16, 32), (64, 32, 16), (64, 64, 8), (8, 64, 56)]
ROUNDS = 15


def unfold(x: Tensor) -> Tensor:
    """All patches, and the full product of the matrix that they are."""
    patches = F.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, x.shape[1] * 9)
    return patches.T @ patches


def moment(x: Tensor) -> Tensor:
    return torch.ops.graphopt.patch_moment(
        x, [3, 3], [1, 1], [1, 1], [1, 1], 1, False, [0, 0], False, 1, 1.0
    )


def measure(images: int, channels: int, side: int) -> dict[str, object]:
    x = torch.randn(images, channels, side, side)
    wanted = unfold(x)
    at = torch.tril_indices(channels * 9, channels * 9)
    error = (moment(x)[0] - wanted[at[0], at[1]]).abs().max() / wanted.abs().max()
    times = alternate({"unfold": lambda: unfold(x), "graphopt": lambda: moment(x)}, ROUNDS)
    return {
        "milliseconds": milliseconds(times),
        "unfold / graphopt": ratio(times, "unfold", "graphopt"),
        "largest difference": float(f"{error:.1e}"),
    }


if __name__ == "__main__":
    results: dict[str, object] = {"load": round(os.getloadavg()[0], 2)}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for shape in SHAPES:
            name = "{} images, {} channels, side {}, {} threads".format(*shape, threads)
            results[name] = measure(*shape)
            print(name, results[name], flush=True)
    print(keep("conv_factor", results))
