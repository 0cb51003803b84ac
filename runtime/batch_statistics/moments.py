"""Counts, sums and sums of squares, which add up over uses, micro-batches, ranks and steps.

For norms of C channels a vector of float64 holds, one after the other, ``[count, sums (C), sums of
squares (C)]`` of each norm. In float64 the variance of what has mean m and standard deviation s is
lost to about (m / s)² · 2e-16 of itself, which is more than a norm in float32 gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.plan.batch_statistics import COUNT, INVERSE, MEAN, Norm, Statistic


def width(norm: Norm) -> int:
    """Elements of the vector of one norm."""
    return 1 + 2 * norm.channels


class Layout:
    """Where the vectors of several norms lie in one.

    Args:
        norms: in order.

    Attributes:
        widths: elements per norm.
        starts: where each norm begins, by its buffer of means.
    """

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.norms = tuple(norms)
        self.widths = [width(norm) for norm in norms]
        self.starts = {n.mean: sum(self.widths[:i]) for i, n in enumerate(self.norms)}
        self._channels = [norm.channels for norm in norms]
        places = []
        for norm, start in zip(self.norms, self.starts.values(), strict=True):
            channels = torch.arange(norm.channels) + start + 1
            count = torch.full_like(channels, start)
            places.append(torch.stack([count, channels, channels + norm.channels]))
        # Of count, sum and sum of squares of all channels.
        self._places = torch.cat(places, dim=1) if places else torch.zeros(3, 0, dtype=torch.int64)

    def statistics(self, moments: Tensor) -> list[Tensor]:
        """Mean and unbiased variance of each norm, in turn.

        Args:
            moments: float64, the vectors of all norms.
        """
        self._places = self._places.to(moments.device)
        count, total, squares = moments[self._places]
        mean = total / count.clamp(min=1)
        var = (squares - total * mean).clamp(min=0) / (count - 1).clamp(min=1)
        split = (torch.split(value, self._channels) for value in (mean, var))
        return [tensor for pair in zip(*split, strict=True) for tensor in pair]


class Taking:
    """How the results of one forward become moments.

    Args:
        layout: of the result.
        statistics: what the results are, in order; see `Statistic`.
    """

    def __init__(self, layout: Layout, statistics: Sequence[Statistic]) -> None:
        norms = {norm.mean: norm for norm in layout.norms}
        # A batch without values has no statistics.
        kept = [(i, s) for i, s in enumerate(statistics) if s.what == MEAN and s.values != 0]
        inverses, counts = (
            {(s.norm, s.use): i for i, s in enumerate(statistics) if s.what == what}
            for what in (INVERSE, COUNT)
        )
        self._means = [i for i, _ in kept]
        self._inverses = [inverses[s.norm, s.use] for _, s in kept]
        told = [(n, counts[s.norm, s.use]) for n, (_, s) in enumerate(kept) if s.values is None]
        self._counts = [i for _, i in told]
        # Of the kept norms those whose number of values the forward returns.
        self._varying = torch.tensor([n for n, _ in told], dtype=torch.int64)
        self._width = sum(layout.widths)
        channels = [norms[s.norm].channels for _, s in kept]
        starts = [layout.starts[s.norm] for _, s in kept]
        repeated = torch.tensor(channels, dtype=torch.int64)
        self._norm_of = torch.arange(len(kept)).repeat_interleave(repeated)
        self._values = torch.tensor([float(s.values or 0) for _, s in kept], dtype=torch.float64)
        eps = torch.tensor([norms[s.norm].eps[s.use] for _, s in kept], dtype=torch.float64)
        self._eps = eps[self._norm_of]
        sums = [torch.arange(c) + start + 1 for c, start in zip(channels, starts, strict=True)]
        squares = [place + c for c, place in zip(channels, sums, strict=True)]
        self._places = torch.cat([torch.tensor(starts, dtype=torch.int64), *sums, *squares])

    def __call__(self, results: Sequence[Tensor]) -> Tensor:
        """The moments of one forward, float64.

        Args:
            results: mean and ``1 / sqrt(var + eps)`` of each use of a norm, and how many values
                these are of, where that varies.
        """
        device = results[0].device
        self._to(device)
        moments = torch.zeros(self._width, dtype=torch.float64, device=device)
        if not self._means:
            return moments
        mean = torch.cat([results[i].to(device) for i in self._means]).double()
        inverse = torch.cat([results[i].to(device) for i in self._inverses]).double()
        var = (inverse.square().reciprocal() - self._eps).clamp(min=0)
        values = self._values
        if self._counts:
            counts = torch.stack([results[i].to(device) for i in self._counts])
            values = values.index_copy(0, self._varying, counts)
        per_channel = values[self._norm_of]
        sums = per_channel * mean
        squares = per_channel * (var + mean.square())
        return moments.index_add_(0, self._places, torch.cat([values, sums, squares]))

    def _to(self, device: torch.device) -> None:
        if self._values.device != device:
            for name in ("_values", "_varying", "_norm_of", "_eps", "_places"):
                setattr(self, name, getattr(self, name).to(device))


def joined(own: Tensor, layout: Layout, earlier: Mapping[str, Tensor], whole: Layout) -> Tensor:
    """Moments of this micro-batch and of earlier ones.

    Args:
        own: in `layout`.
        layout: of this micro-batch.
        earlier: by norm.
        whole: `layout`, and behind it the norms that only earlier ones have used.
    """
    moments = torch.nn.functional.pad(own, (0, sum(whole.widths) - len(own)))
    for name, found in earlier.items():
        start = whole.starts[name]
        moments[start : start + len(found)] += found.to(own.device)
    return moments
