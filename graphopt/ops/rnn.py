"""`graphopt::rnn`: a whole LSTM, GRU or plain RNN, all layers and directions, as one operator.

    rnn(str mode, Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers,
        float dropout, bool train, bool bidirectional, bool batch_first, ...)
        -> (Tensor output, Tensor hn, Tensor cn, Tensor tape)

Parameters are those of the function that `torch.nn.LSTM` and its relatives call (`torch.lstm`,
`torch.gru`, `torch.rnn_tanh`, `torch.rnn_relu`), whose name is `mode`; `hx` is ``[h0, c0]`` for
``"lstm"`` and ``[h0]`` otherwise. Projections (`proj_size`) are covered, packed sequences are not.
`cn` is empty except for ``"lstm"``. See `graphopt.ops.taped` for the remaining arguments, the
backward operator and how results stay bit-equal to eager.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.ops.record import Function
from graphopt.ops.taped import define

MODES: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "lstm": torch._VF.lstm,
    "gru": torch._VF.gru,
    "rnn_tanh": torch._VF.rnn_tanh,
    "rnn_relu": torch._VF.rnn_relu,
}

_PARAMETERS = (
    "str mode, Tensor input, Tensor[] hx, Tensor[] params, bool has_biases, int num_layers, "
    "float dropout, bool train, bool bidirectional, bool batch_first"
)


class RnnArguments(NamedTuple):
    """The parameters of the operator, in order."""

    mode: str
    input: Tensor
    hx: Sequence[Tensor]
    params: Sequence[Tensor]
    has_biases: bool
    num_layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool

    def time_major(self, x: Tensor) -> Tensor:
        """`x` laid out with time outermost, as all eager kernels leave it; usually `x` itself."""
        if self.batch_first:
            return x.transpose(0, 1).contiguous().transpose(0, 1)
        return x.contiguous()


def _eager(*parameters: Any) -> tuple[Tensor, ...]:
    args = RnnArguments(*parameters)
    state = tuple(args.hx) if args.mode == "lstm" else args.hx[0]
    output, *hidden = MODES[args.mode](args.input, state, list(args.params), *args[4:])
    if args.mode != "lstm":
        hidden.append(output.new_empty(0))
    return (args.time_major(output), *(h.contiguous() for h in hidden))


def _fake(*parameters: Any) -> tuple[Tensor, ...]:
    *given, autocast = parameters
    args = RnnArguments(*given)
    hidden, cell = _dtypes(args, autocast)
    input, hx = args.input, args.hx
    size = hx[0].shape[-1] * (2 if args.bidirectional else 1)
    output = input.new_empty((*input.shape[:2], size), dtype=hidden)
    cn = hx[1].shape if args.mode == "lstm" else (0,)
    return (
        args.time_major(output),
        hx[0].new_empty(hx[0].shape, dtype=hidden),
        hx[0].new_empty(cn, dtype=cell),
    )


def _dtypes(args: RnnArguments, autocast: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the hidden and of the cell state."""
    mode, input, hx = args[:3]
    if autocast is None or input.dtype is torch.float64:
        return input.dtype, input.dtype
    projects = mode == "lstm" and hx[0].shape[-1] != hx[1].shape[-1]
    is_fused = mode == "lstm" and torch.backends.mkldnn.enabled and not projects
    if input.device.type != "cpu" or is_fused or mode.startswith("rnn"):
        return autocast, autocast
    # Step by step on CPU, only matrix products are cast; the carried state keeps its dtype.
    carried = torch.promote_types(autocast, hx[-1].dtype)
    return (autocast if projects else carried), carried


def _is_random(*parameters: Any) -> bool:
    args = RnnArguments(*parameters)
    return args.train and args.dropout > 0 and args.num_layers > 1


def _can_repeat(mode: str, input: Tensor, *_: object) -> bool:
    # cuDNN keeps its own dropout state, which cannot be read from outside.
    if input.device.type != "cuda":
        return True
    return not torch.backends.cudnn.is_acceptable(input)  # type: ignore[no-untyped-call]


def _arrange(gradient: Tensor, index: int, *parameters: Any) -> Tensor:
    # Of the input, as the forward lays its output out.
    return RnnArguments(*parameters).time_major(gradient) if index == 0 else gradient.contiguous()


define("rnn", _PARAMETERS, 3, Function(_eager, _fake, _is_random, _can_repeat, _arrange))
