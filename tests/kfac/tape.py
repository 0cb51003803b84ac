"""Layers by explicit formulas and loops over positions that remember what went through them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Use:
    """One use of a weight.

    Attributes:
        weight: parameter name.
        bias: parameter name; ``""`` for none.
        known: value of one side, [n, R, groups, its size], the trailing 1 included.
        output: tensor of [n, R, groups, size of the other side] whose gradient is the other side.
        kind: ``"linear"``, ``"conv"``, ``"transposed"`` or ``"embedding"``.
    """

    weight: str
    bias: str
    known: Tensor
    output: Tensor
    kind: str


@dataclass
class NormUse:
    """One use of a norm: ``output = normalised * scale + shift``, all of [n, positions, C]."""

    scale: str
    shift: str
    normalised: Tensor
    output: Tensor


@dataclass
class Tape:
    """Layers by explicit formulas, remembering their inputs and outputs.

    Attributes:
        parameters: by name, leaves that require gradients.
        uses: of weights, in order.
        norms: of norms, in order.
    """

    parameters: dict[str, Tensor]
    uses: list[Use] = field(default_factory=list)
    norms: list[NormUse] = field(default_factory=list)

    def linear(self, x: Tensor, weight: str, bias: str = "") -> Tensor:
        """``x Wᵀ + b`` for x of [n, ..., d]."""
        w = self.parameters[weight]
        known = _with_ones(x.reshape(x.shape[0], -1, 1, x.shape[-1]), bias)
        s = known @ matrix(w, self._bias(bias), "linear", 1).mT
        self.uses.append(Use(weight, bias, known, s, "linear"))
        return s.reshape(*x.shape[:-1], w.shape[0])

    def layer(self, x: Tensor, module: str) -> Tensor:
        """`linear` with the parameters that `nn.Linear` has."""
        return self.linear(x, f"{module}.weight", f"{module}.bias")

    def embedding(self, index: Tensor, weight: str) -> Tensor:
        """Rows of a table for index of [n, R]."""
        table = self.parameters[weight]
        known = torch.zeros(*index.shape, 1, table.shape[0], dtype=table.dtype)
        for n, r in itertools.product(*map(range, index.shape)):
            known[n, r, 0, int(index[n, r])] = 1
        s = known @ table
        self.uses.append(Use(weight, "", known, s, "embedding"))
        return s.squeeze(2)

    def conv(
        self,
        x: Tensor,
        module: str,
        *,
        stride: int = 1,
        before: int = 0,
        after: int | None = None,
        dilation: int = 1,
        groups: int = 1,
        transposed: bool = False,
    ) -> Tensor:
        """A convolution over any number of dimensions, patch by patch.

        Args:
            x: [n, C, *sizes].
            module: owns ``weight`` and ``bias``.
            stride: of both kinds.
            before: zeros ahead of each dimension; of a transposed one how many outputs are cut.
            after: those at the end, where they differ; of a transposed one the cut at the end.
            dilation: distance of the taps of the kernel.
            groups: of channels.
            transposed: whether x is spread by the stride rather than read in steps of it.
        """
        weight, bias = f"{module}.weight", f"{module}.bias"
        w = self.parameters[weight]
        kernel, sizes = tuple(w.shape[2:]), tuple(x.shape[2:])
        ends = [before if after is None else after] * len(kernel)
        spans = [dilation * (k - 1) for k in kernel]
        outs = []
        for size, span, end in zip(sizes, spans, ends, strict=True):
            if transposed:
                outs.append((size - 1) * stride + span + 1 - before - end)
            else:
                outs.append((size + before + end - span - 1) // stride + 1)
        patches = []
        for position in itertools.product(*map(range, outs)):
            taps = []
            for tap in itertools.product(*map(range, kernel)):
                if transposed:
                    far = [p + before - t * dilation for p, t in zip(position, tap, strict=True)]
                    source = [f // stride if f % stride == 0 else -1 for f in far]
                else:
                    far = [p * stride + t * dilation for p, t in zip(position, tap, strict=True)]
                    source = [f - before for f in far]
                inside = all(0 <= q < size for q, size in zip(source, sizes, strict=True))
                taps.append(x[(..., *source)] if inside else x.new_zeros(x.shape[:2]))
            patches.append(torch.stack(taps, -1))  # [n, C, taps]
        known = torch.stack(patches, 1)  # [n, T, C, taps]
        known = _with_ones(known.reshape(*known.shape[:2], groups, -1), bias)
        kind = "transposed" if transposed else "conv"
        s = torch.einsum("ntgk,gmk->ntgm", known, matrix(w, self._bias(bias), kind, groups))
        self.uses.append(Use(weight, bias, known, s, kind))
        return s.flatten(2).transpose(1, 2).reshape(x.shape[0], -1, *outs)

    def norm(self, normalised: Tensor, module: str, *, shift: bool = True) -> Tensor:
        """Scale and shift of the last dimension; normalised is [n, positions, C]."""
        scale, name = f"{module}.weight", f"{module}.bias" if shift else ""
        s = normalised * self.parameters[scale]
        s = s + self.parameters[name] if shift else s
        self.norms.append(NormUse(scale, name, normalised, s))
        return s

    def _bias(self, name: str) -> Tensor | None:
        return self.parameters[name] if name else None


def _with_ones(known: Tensor, bias: str) -> Tensor:
    if not bias:
        return known
    return torch.cat((known, torch.ones_like(known[..., :1])), -1)


def matrix(weight: Tensor, bias: Tensor | None, kind: str, groups: int) -> Tensor:
    """The parameter as [groups, rows, columns], the bias as its last column."""
    if kind == "transposed":  # inputs come first
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        body = split.transpose(1, 2).flatten(2)
    else:
        body = weight.reshape(groups, weight.shape[0] // groups, -1)
    if bias is None:
        return body
    return torch.cat((body, bias.reshape(groups, -1, 1)), -1)


def restore(m: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, ...]:
    """The inverse of `matrix`: tensors of the shapes of the weight and, if any, the bias."""
    body = m if bias is None else m[..., :-1]
    if kind == "transposed":
        groups = m.shape[0]
        body = body.reshape(groups, m.shape[1], weight.shape[0] // groups, -1).transpose(1, 2)
    parts = (body.reshape(weight.shape),)
    return parts if bias is None else (*parts, m[..., -1].reshape(bias.shape))
