"""Each micro-model once more, as formulas over a `Tape`; nothing of `torch.nn` takes part."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.kfac.cases import Case
from tests.kfac.tape import Tape

Explicit = Callable[[Tape, Tensor], Tensor]
EPS = 1e-5


def compute(one: Case) -> tuple[Tape, Tensor]:
    """The tape and the loss of a micro-model on its batch."""
    tape = Tape(one.parameters())
    return tape, one.loss(EXPLICIT[one.name](tape, one.x))


def _mlp(tape: Tape, x: Tensor) -> Tensor:
    return tape.layer(torch.tanh(tape.layer(x, "0")), "2")


def _in_place(tape: Tape, x: Tensor) -> Tensor:
    return tape.layer(tape.layer(x, "0").clamp(min=0), "2")


def _conv(**options: int) -> Explicit:
    def model(tape: Tape, x: Tensor) -> Tensor:
        h = torch.tanh(tape.conv(x, "conv", **options))
        return tape.layer(h.flatten(2).mean(2), "head")

    return model


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two heads of width two; [n, t, 4] each."""
    heads = []
    for h in range(2):
        part = slice(2 * h, 2 * h + 2)
        scores = q[..., part] @ k[..., part].mT / math.sqrt(2)
        heads.append(scores.softmax(-1) @ v[..., part])
    return torch.cat(heads, -1)


def _fused_attention(tape: Tape, x: Tensor) -> Tensor:
    qkv = tape.layer(x, "qkv")
    return tape.layer(_attend(*qkv.split(4, -1)), "out").mean(1)


def _attention(tape: Tape, x: Tensor) -> Tensor:
    qkv = tape.linear(x, "attention.in_proj_weight", "attention.in_proj_bias")
    return tape.layer(_attend(*qkv.split(4, -1)), "attention.out_proj").mean(1)


def _checkpoint(tape: Tape, x: Tensor) -> Tensor:
    h = torch.tanh(tape.layer(torch.tanh(tape.layer(x, "first")), "second"))
    return tape.layer(h, "head")


def _normalise(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + EPS).sqrt()


def _head(tape: Tape, s: Tensor) -> Tensor:
    return tape.layer(torch.tanh(s), "head").mean(1)


def _batch_norm(tape: Tape, x: Tensor) -> Tensor:
    h = tape.conv(x, "first").flatten(2).transpose(1, 2)  # [n, positions, channels]
    return _head(tape, tape.norm(_normalise(h, (0, 1)), "norm"))


def _group_norm(tape: Tape, x: Tensor) -> Tensor:
    h = tape.conv(x, "first").flatten(2).transpose(1, 2)
    halves = [_normalise(half, (1, 2)) for half in h.split(2, -1)]
    return _head(tape, tape.norm(torch.cat(halves, -1), "norm"))


def _layer_norm(tape: Tape, x: Tensor) -> Tensor:
    return _head(tape, tape.norm(_normalise(tape.layer(x, "first"), (-1,)), "norm"))


def _rms_norm(tape: Tape, x: Tensor) -> Tensor:
    h = tape.layer(x, "first")
    normalised = h / (h.square().mean(-1, keepdim=True) + EPS).sqrt()
    return _head(tape, tape.norm(normalised, "norm", shift=False))


def _shared_linear(tape: Tape, x: Tensor) -> Tensor:
    once = torch.tanh(tape.layer(x, "shared"))
    return tape.layer(torch.tanh(tape.layer(once, "shared")), "head")


def _raw_parameters(tape: Tape, x: Tensor) -> Tensor:
    return tape.linear(torch.tanh(tape.linear(x, "w", "b")), "v")


def _lstm(module: str, suffix: str) -> Explicit:
    def model(tape: Tape, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 2)
        for step in range(x.shape[1]):
            name = f"{module}.{{}}{suffix}".format
            gates = tape.linear(x[:, step], name("weight_ih"), name("bias_ih"))
            gates = gates + tape.linear(h, name("weight_hh"), name("bias_hh"))
            i, f, g, o = gates.split(2, -1)
            c = f.sigmoid() * c + i.sigmoid() * torch.tanh(g)
            h = o.sigmoid() * torch.tanh(c)
        return tape.layer(h, "head")

    return model


def _tied_embedding(tape: Tape, x: Tensor) -> Tensor:
    h = torch.tanh(tape.layer(tape.embedding(x, "embedding.weight"), "inner"))
    return tape.linear(h, "embedding.weight").flatten(1)


def _embedding(tape: Tape, x: Tensor) -> Tensor:
    return tape.layer(torch.tanh(tape.embedding(x, "table.weight")).mean(1), "head")


EXPLICIT: dict[str, Explicit] = {
    "mlp": _mlp,
    "conv": _conv(stride=2, before=1),
    "fused_attention": _fused_attention,
    "checkpoint": _checkpoint,
    "conv_same": _conv(before=1),
    "conv_dilation": _conv(dilation=2),
    "conv_groups": _conv(groups=2),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "shared_linear": _shared_linear,
    "raw_parameters": _raw_parameters,
    "conv1d": _conv(before=1),
    "lstm": _lstm("rnn", "_l0"),
    "attention": _attention,
    "tied_embedding": _tied_embedding,
    "in_place": _in_place,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    # Two padded, one of them given back by output_padding: one is cut ahead, none at the end.
    "conv_transposed": _conv(stride=2, before=1, after=0, transposed=True),
    "conv3d": _conv(),
    "lstm_cell": _lstm("cell", ""),
    "embedding": _embedding,
}
