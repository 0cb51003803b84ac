"""`graphopt::rnn_rows`: what the weights of a recurrent network saw, step by step.

    rnn_rows(Tensor?[] grads, str mode, Tensor input, Tensor[] hx, Tensor[] params,
             bool has_biases, int num_layers, bool bidirectional, bool batch_first)
        -> Tensor[]

For each layer and direction four tensors of shape [1, N, d] with N = time steps times examples:
gradients of ``W_ih x + b_ih``, the inputs x, gradients of ``W_hh h + b_hh``, the hidden states h.
`graphopt::rnn` computes with one fused kernel and returns none of them, so the network runs once
more, cell by cell, under autograd; only a step that updates its curvature pays for that. Dropout
between layers and projections are not covered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]

_library.define(
    "rnn_rows(Tensor?[] grads, str mode, Tensor input, Tensor[] hx, Tensor[] params, "
    "bool has_biases, int num_layers, bool bidirectional, bool batch_first) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)

Cell = Callable[[Tensor, Tensor, Sequence[Tensor]], tuple[Tensor, ...]]


def _lstm(gates_x: Tensor, gates_h: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    i, f, g, o = (gates_x + gates_h).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(gates_x: Tensor, gates_h: Tensor, state: Sequence[Tensor]) -> tuple[Tensor, ...]:
    (xr, xz, xn), (hr, hz, hn) = gates_x.chunk(3, -1), gates_h.chunk(3, -1)
    reset, update = (xr + hr).sigmoid(), (xz + hz).sigmoid()
    new = (xn + reset * hn).tanh()
    return ((1 - update) * new + update * state[0],)


def _plain(squash: Callable[[Tensor], Tensor]) -> Cell:
    return lambda gates_x, gates_h, _: (squash(gates_x + gates_h),)


CELLS: dict[str, Cell] = {
    "lstm": _lstm,
    "gru": _gru,
    "rnn_tanh": _plain(torch.tanh),
    "rnn_relu": _plain(torch.relu),
}


class RowsArguments(NamedTuple):
    """The parameters of the operator, in order."""

    grads: Sequence[Tensor | None]
    mode: str
    input: Tensor
    hx: Sequence[Tensor]
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    bidirectional: bool
    batch_first: bool

    @property
    def each(self) -> int:
        """Parameters of one layer and direction."""
        return 4 if self.has_biases else 2


def _rows(*parameters: Any) -> list[Tensor]:
    args = RowsArguments(*parameters)
    directions, each = 2 if args.bidirectional else 1, args.each
    found: list[tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]] = []
    with torch.enable_grad():
        sequence = (args.input.transpose(0, 1) if args.batch_first else args.input).detach()
        last: list[list[Tensor]] = [[] for _ in args.hx]
        for layer in range(args.num_layers):
            outputs = []
            for direction in range(directions):
                at = layer * directions + direction
                weights = [p.detach() for p in args.params[at * each : (at + 1) * each]]
                state = [h[at].detach() for h in args.hx]
                found.append(([], [], [], []))
                steps = list(sequence)[:: -1 if direction else 1]
                hidden = []
                for x in steps:
                    state = list(_step(args.mode, x, state, weights, found[-1]))
                    hidden.append(state[0])
                outputs.append(torch.stack(hidden[:: -1 if direction else 1]))
                for kept, value in zip(last, state, strict=True):
                    kept.append(value)
            sequence = torch.cat(outputs, -1)
        results = [
            sequence.transpose(0, 1) if args.batch_first else sequence,
            *(torch.stack(kept) for kept in last),
        ]
        given = [(r, g) for r, g in zip(results, args.grads, strict=False) if g is not None]
        leaves = [leaf for rows in found for leaf in (*rows[0], *rows[2])]
        gradients = iter(torch.autograd.grad([r for r, _ in given], leaves, [g for _, g in given]))
    rows = []
    for at_x, xs, at_h, hs in found:
        gx = [next(gradients) for _ in at_x]
        gh = [next(gradients) for _ in at_h]
        rows += [_stacked(part) for part in (gx, xs, gh, hs)]
    return rows


def _step(
    mode: str,
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    rows: tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]],
) -> tuple[Tensor, ...]:
    """One cell; the leaves added to both products receive the gradients that are asked for."""
    w_ih, w_hh, *biases = weights
    parts = []
    for value, weight, bias, into in (
        (x, w_ih, biases[:1], rows[:2]),
        (state[0], w_hh, biases[1:], rows[2:]),
    ):
        product = F.linear(value, weight, *bias)
        leaf = torch.zeros_like(product, requires_grad=True)
        into[0].append(leaf)
        into[1].append(value.detach())
        parts.append(product + leaf)
    return CELLS[mode](parts[0], parts[1], state)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    stacked = torch.stack(tuple(parts))
    return stacked.reshape(1, -1, stacked.shape[-1])


def _fake(*parameters: Any) -> list[Tensor]:
    args = RowsArguments(*parameters)
    count = args.input.shape[0] * args.input.shape[1]
    rows = []
    for at in range(0, len(args.params), args.each):
        for weight in args.params[at : at + 2]:
            rows += [args.input.new_empty((1, count, d)) for d in weight.shape]
    return rows


_library.impl("rnn_rows", _rows, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::rnn_rows", _fake, lib=_library)
