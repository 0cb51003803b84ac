"""The messages of a job's curvature: what travels between ranks, to the byte.

Statistics are averaged at their owners. A reduce-scatter would do, but Gloo (torch 2.13) makes an
all-reduce of it, which sends twice as much, and its parts have to be padded to one size. Here each
rank sends every owner its part (an all-to-all), and the owner adds in the order of ranks: exactly
the bytes of a reduce-scatter without padding, sums that do not depend on who owns what, and a
narrow wire type rounds once, before the sum instead of within it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.runtime.ranks.channel import Waiting
from graphopt.runtime.ranks.ranks import Ranks


@dataclass(frozen=True)
class Parcel:
    """A tensor on its way to its owner.

    Attributes:
        kind: under which its bytes are counted.
        name: of the tensor; with `kind` unique.
        tensor: this rank's; same shape on all ranks.
        owner: rank that needs it.
        wire: type in which it travels.
        mean: whether the owner wants the mean over ranks; else all ranks' tensors, concatenated.
    """

    kind: str
    name: str
    tensor: Tensor
    owner: int
    wire: torch.dtype
    mean: bool = True


class Exchange:
    """Collectives over the ranks of a job.

    Args:
        ranks: of the job.

    Attributes:
        inner: the process group that does the work.
        device: where messages lie.
        sent: bytes by kind that all ranks together put on the wire so far, by bandwidth-optimal
            collectives: a message of S bytes costs (w - 1) S to spread or to bring to an owner,
            and twice that to all-reduce.
        about: what a failure is reported to have cost.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.inner, self.device = ranks.group.inner, ranks.device
        self.rank, self.world = ranks.group.rank(), ranks.size
        self.sent: Counter[str] = Counter()
        self.about = "the curvature"

    def to_owners(self, parcels: Sequence[Parcel]) -> dict[tuple[str, str], Tensor]:
        """This rank's tensors by kind and name, averaged over ranks or concatenated.

        Args:
            parcels: of all owners; equal on all ranks up to the values.

        Raises:
            RankError: a rank does not answer.
        """
        found: dict[tuple[str, str], Tensor] = {}
        for wire in dict.fromkeys(p.wire for p in parcels):
            batch = [p for p in parcels if p.wire == wire]
            batch.sort(key=lambda p: p.owner)
            parts = [0] * self.world
            for parcel in batch:
                parts[parcel.owner] += parcel.tensor.numel()
                size = parcel.tensor.numel() * wire.itemsize
                self.sent[parcel.kind] += (self.world - 1) * size
            message = torch.cat([p.tensor.reshape(-1).to(wire) for p in batch])
            mine = message.new_empty(self.world * parts[self.rank])
            with self._telling():
                dist.all_to_all_single(
                    mine, message, [parts[self.rank]] * self.world, parts, group=self.inner
                )
            del message
            received = mine.view(self.world, parts[self.rank])
            place = 0
            for parcel in (p for p in batch if p.owner == self.rank):
                part = received[:, place : place + parcel.tensor.numel()]
                place += parcel.tensor.numel()
                found[parcel.kind, parcel.name] = _received(parcel, part)
        return found

    def mean_everywhere(self, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Means over ranks, on all ranks.

        Raises:
            RankError: a rank does not answer.
        """
        found: dict[str, Tensor] = {}
        for dtype in dict.fromkeys(t.dtype for t in tensors.values()):
            names = [n for n, t in tensors.items() if t.dtype == dtype]
            message = torch.cat([tensors[name].reshape(-1) for name in names])
            self._all_reduce(kind, message)
            message /= self.world
            parts = torch.split(message, [tensors[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                found[name] = part.view(tensors[name].shape)
        return {name: found[name] for name in tensors}

    def sum_everywhere(self, kind: str, numbers: Tensor) -> None:
        """Sums over ranks, in place.

        Raises:
            RankError: a rank does not answer.
        """
        self._all_reduce(kind, numbers)

    def spread(
        self, kind: str, group: dist.ProcessGroup, parts: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Everything that the ranks of a group have, on each of them.

        Each sends its own part to the others; an all-gather would have to pad them to one size.

        Args:
            kind: under which bytes are counted.
            group: a group that this rank is in.
            parts: per rank of the group its tensors; of the others' only shape and type count.

        Raises:
            RankError: a rank does not answer.
        """
        me = group.rank()
        buffers = []
        for index, part in enumerate(parts):
            size = sum(t.numel() * t.element_size() for t in part.values())
            self.sent[kind] += (len(parts) - 1) * size
            buffers.append(
                _to_bytes(list(part.values()), self.device)
                if index == me
                else torch.empty(size, dtype=torch.uint8, device=self.device)
            )
        self._broadcast(group, buffers)
        found: dict[str, Tensor] = {}
        for index, (buffer, part) in enumerate(zip(buffers, parts, strict=True)):
            if index == me:
                found.update(part)
                continue
            place = 0
            for name, like in part.items():
                found[name], place = _from_bytes(buffer, place, like.dtype, like.shape)
        return found

    def union(
        self, kind: str, group: dist.ProcessGroup, mine: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """All tensors of all ranks of a group, of which the others know nothing yet.

        Args:
            kind: under which bytes are counted.
            group: a group that this rank is in.
            mine: this rank's by name; a name that several ranks have is taken from the first.

        Raises:
            RankError: a rank does not answer.
        """
        me, count = group.rank(), group.size()
        described = [[n, str(t.dtype).split(".")[1], list(t.shape)] for n, t in mine.items()]
        header = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
        body = _to_bytes(list(mine.values()), self.device)
        lengths = torch.zeros(count, 2, dtype=torch.int64, device=self.device)
        lengths[me, 0], lengths[me, 1] = len(header), len(body)
        with self._telling():
            dist.all_reduce(lengths, group=group)
        self.sent[kind] += 2 * (count - 1) * lengths.nbytes + (count - 1) * int(lengths.sum())
        buffers = [
            torch.cat((header.to(self.device), body))
            if index == me
            else torch.empty(sum(both), dtype=torch.uint8, device=self.device)
            for index, both in enumerate(lengths.tolist())
        ]
        self._broadcast(group, buffers)
        found: dict[str, Tensor] = {}
        for buffer, length in zip(buffers, lengths[:, 0].tolist(), strict=True):
            place = length
            for name, dtype, shape in json.loads(buffer[:length].cpu().numpy().tobytes()):
                # In memory of its own: what is kept must not keep the whole message.
                value, place = _from_bytes(buffer, place, getattr(torch, dtype), shape)
                found.setdefault(name, value.clone())
        return found

    def _all_reduce(self, kind: str, message: Tensor) -> None:
        self.sent[kind] += 2 * (self.world - 1) * message.nbytes
        with self._telling():
            dist.all_reduce(message, group=self.inner)

    def _broadcast(self, group: dist.ProcessGroup, buffers: Sequence[Tensor]) -> None:
        with self._telling():
            works = [
                dist.broadcast(buffer, group=group, group_src=index, async_op=True)
                for index, buffer in enumerate(buffers)
                if len(buffer)
            ]
            for work in works:
                work.wait()

    def _telling(self) -> Waiting:
        """Says what did not arrive, and whose fault it is as far as the others' reports tell."""
        return self._ranks.group.waiting(f"{self.about} did not arrive")


def _received(parcel: Parcel, part: Tensor) -> Tensor:
    """From the parts of all ranks ``[world, numel]`` what the owner wanted."""
    like = parcel.tensor
    if not parcel.mean:
        return part.reshape(-1, *like.shape[1:]).to(like.dtype)
    total = part[0].to(like.dtype, copy=True)
    for other in part[1:]:
        total += other
    total /= len(part)
    return total.view(like.shape)


def _to_bytes(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    flat = [t.detach().to(device).reshape(-1).contiguous().view(torch.uint8) for t in tensors]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.uint8, device=device)


def _from_bytes(
    buffer: Tensor, place: int, dtype: torch.dtype, shape: Sequence[int]
) -> tuple[Tensor, int]:
    """A tensor that lies in a buffer, and the place behind it."""
    end = place + torch.Size(shape).numel() * dtype.itemsize
    part = buffer[place:end]
    if place % dtype.itemsize:
        part = part.clone()
    return part.view(dtype).view(tuple(shape)), end
