"""A batch sampler whose batches have one size each."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from graphopt.data.buckets import Buckets, Lengths, is_whole, share, whole_lengths
from graphopt.data.dealing import Dealt, Examples, deal
from graphopt.errors import ArgumentError, StateError


class BucketBatchSampler(Sampler[list[int]]):
    """Deals the examples of a data set into batches, each of one size, for a `DataLoader`.

    Every example comes once per epoch. What does not fill a batch of its size is filled up with
    examples of smaller sizes, so that all batches of a size have one shape, but for one at the end.
    The order is a function of seed and epoch alone, the same on all ranks.

    Args:
        lengths: of all examples, in the order of the data set; the same on all ranks.
        buckets: the sizes.
        batch_size: examples in a batch; or
        tokens: positions in a batch at most, so that batches of short examples have more of them.
        seed: of the order.
        shuffle: draw the order anew for each epoch; else it is that of the data within each size,
            from the largest size down.
        drop_last: leave out the batches that are smaller than those of their size.
        rank: gets every so many batches; by default that of `torch.distributed`, or 0.
        ranks: all of them have in each step a batch of one shape. Where examples do not go round,
            some come twice, fewer than `ranks` for each size.

    Attributes:
        epoch: whose order comes next; see `set_epoch`.

    Raises:
        ArgumentError: an argument is out of range, a length is above the largest size, or no batch
            would be full.
    """

    def __init__(
        self,
        lengths: Lengths,
        buckets: Buckets,
        *,
        batch_size: int | None = None,
        tokens: int | None = None,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        rank: int | None = None,
        ranks: int | None = None,
    ) -> None:
        if (batch_size is None) == (tokens is None):
            raise ArgumentError(
                "a batch is counted in examples or in positions",
                hint="pass either batch_size=32 or tokens=4096",
            )
        self.rank, self.ranks = _place(rank, ranks)
        numbers = {"batch_size": batch_size, "tokens": tokens}
        for name, value in numbers.items():
            if value is not None and not (is_whole(value) and value >= 1):
                raise ArgumentError(f"{name}={value!r} is no whole number above 0", hint="pass 32")
        if not (is_whole(seed) and seed >= 0):
            raise ArgumentError(f"seed={seed!r} is no whole number from 0 on", hint="pass 0")
        self.buckets, self.seed, self.epoch = buckets, int(seed), 0
        self.shuffle, self.drop_last = shuffle, drop_last
        self._lengths = whole_lengths(lengths)
        if not len(self._lengths):
            raise ArgumentError("there are no lengths", hint="pass one length per example")
        self._which = buckets.which(self._lengths)
        if tokens is None:
            assert batch_size is not None
            self._batch = [int(batch_size)] * len(buckets.sizes)
        elif tokens < buckets.sizes[-1]:
            raise ArgumentError(
                f"tokens={tokens} has no room for one example of the largest size, "
                f"{buckets.sizes[-1]}",
                hint=f"pass at least tokens={buckets.sizes[-1]}",
            )
        else:
            self._batch = [int(tokens) // size for size in buckets.sizes]
        self._skip = 0
        # How many batches there are does not depend on the order.
        self._count = len(self._dealt().batches) // self.ranks
        if not self._count:
            raise ArgumentError(
                f"none of the batches of {len(self._lengths)} examples is full",
                hint="make batches smaller, or leave out drop_last",
            )

    def __len__(self) -> int:
        """Batches that this rank gets in an epoch, the same on all ranks."""
        return self._count

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this rank in the epoch, as indices; after `load_state_dict` the rest."""
        skip, self._skip = self._skip, 0
        batches = self._steps(self._dealt())
        for step in batches[skip:]:
            yield step[self.rank].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Say whose order comes next.

        Raises:
            ArgumentError: it is no whole number from 0 on.
        """
        if not (is_whole(epoch) and epoch >= 0):
            raise ArgumentError(
                f"epoch={epoch!r} is no whole number from 0 on", hint="pass 0, 1, …"
            )
        if epoch != self.epoch:
            self._skip = 0
        self.epoch = int(epoch)

    def report(self) -> str:
        """The shapes of an epoch on all ranks, how often each comes, and the share of padding."""
        dealt = self._dealt()
        sizes = self.buckets.sizes
        shapes = Counter(
            (len(b), sizes[i]) for b, i in zip(dealt.batches, dealt.sizes, strict=True)
        )
        true = sum(int(self._lengths[batch].sum()) for batch in dealt.batches)
        positions = sum(n * size * often for (n, size), often in shapes.items())
        head = f"{len(self)} steps, {share(true, positions):.1%} padding"
        head += f", on each of {self.ranks} ranks" if self.ranks > 1 else ""
        for count, what in ((dealt.dropped, "left out"), (dealt.repeated, "twice")):
            head += f"; {count} {'example' if count == 1 else 'examples'} {what}" if count else ""
        wide = len(str(sizes[-1]))
        lines = [
            f"  {n} x {size:<{wide}}: {often} {'batch' if often == 1 else 'batches'}"
            for (n, size), often in sorted(
                shapes.items(), key=lambda item: (item[0][1], -item[0][0])
            )
        ]
        return "\n".join([head, *lines])

    def state_dict(self, taken: int) -> dict[str, Any]:
        """Where a run is, the same on all ranks.

        Args:
            taken: batches of this epoch that the training loop has had. A loader's workers read
                ahead, so the sampler cannot know.

        Raises:
            ArgumentError: there are not so many.
        """
        if not (is_whole(taken) and 0 <= taken <= self._count):
            raise ArgumentError(
                f"taken={taken!r} is no number of batches out of {self._count}",
                hint="count the batches that your loop has had in this epoch",
            )
        return {"epoch": self.epoch, "taken": int(taken), **self._order()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Have the next iteration go on from there.

        Raises:
            StateError: it is no state of such a sampler, or of one with another order.
        """
        own = self._order()
        try:
            epoch, taken = int(state["epoch"]), int(state["taken"])
            other = {name: state[name] for name in own}
        except (KeyError, TypeError, ValueError) as error:
            raise StateError(
                f"this is no state of a BucketBatchSampler ({type(error).__name__}: {error})",
                hint="pass what state_dict(taken) gave",
            ) from error
        for name, value in own.items():
            if other[name] != value:
                raise StateError(
                    f"the state is of another order: {name} was {other[name]!r} and is {value!r}",
                    hint="make the sampler with the arguments that it was saved with",
                )
        if not (0 <= taken <= self._count and epoch >= 0):
            raise StateError(
                f"the state has {taken} batches of epoch {epoch}, and an epoch has {self._count}",
                hint="pass what state_dict(taken) gave",
            )
        self.epoch, self._skip = epoch, taken

    def _order(self) -> dict[str, Any]:
        """What the order of an epoch depends on."""
        return {
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "ranks": self.ranks,
            "sizes": list(self.buckets.sizes),
            "batch": list(self._batch),
            "lengths": hashlib.sha256(self._lengths.tobytes()).hexdigest()[:16],
        }

    def _dealt(self) -> Dealt:
        order = np.arange(len(self._lengths))
        if self.shuffle:
            order = self._random(0).permutation(order)
        which = self._which[order]
        groups = [order[which == index] for index in range(len(self.buckets.sizes))]
        return deal(groups, self._batch, ranks=self.ranks, drop_last=self.drop_last)

    def _steps(self, dealt: Dealt) -> list[list[Examples]]:
        """Batches of all ranks, step by step."""
        ranks, found = self.ranks, dealt.batches
        steps = [found[i : i + ranks] for i in range(0, len(found), ranks)]
        if not self.shuffle:
            return steps
        return [steps[i] for i in self._random(1).permutation(len(steps))]

    def _random(self, what: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, self.epoch, what])


def _place(rank: int | None, ranks: int | None) -> tuple[int, int]:
    """Rank and number of ranks."""
    if (rank is None) != (ranks is None):
        raise ArgumentError(
            f"rank={rank!r} and ranks={ranks!r} go together", hint="pass both, or none of them"
        )
    if rank is None or ranks is None:
        if not (dist.is_available() and dist.is_initialized()):
            return 0, 1
        return dist.get_rank(), dist.get_world_size()
    if not (isinstance(rank, int) and isinstance(ranks, int) and 0 <= rank < ranks):
        raise ArgumentError(
            f"rank={rank!r} is no rank out of ranks={ranks!r}", hint="ranks count from 0"
        )
    return rank, ranks
