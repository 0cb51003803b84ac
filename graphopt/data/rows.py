"""Whether rows of different lengths in one batch are what each is alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.data.collate import Pad
from graphopt.data.padded_call import Call
from graphopt.data.padded_run import Compared, Run, forward
from graphopt.data.positions import Padded, closest
from graphopt.errors import ArgumentError

STEP, MOST = 2, 5
"""How lengths of the rows differ: by 1, 3, 0, 2, 4, 1, … positions. The first five are compared."""


def compare_rows(
    call: Call,
    tensors: Mapping[str, Tensor],
    pads: Mapping[str, Pad],
    layout: Padded,
    without: Run,
    allowed: float,
) -> Compared | None:
    """Shorten each row by another number of positions, in the batch by padding and alone by a cut.

    Args:
        call: the call.
        tensors: the padded arguments, without padding.
        pads: how they are padded.
        layout: of the padding.
        without: outputs of the whole batch without padding.
        allowed: the relative error that rounding explains.

    Returns:
        The worst output; ``None`` where nothing can be told: of one row, or of rows that depend on
        each other without padding too, as by batch norm.

    Raises:
        ArgumentError: forward fails with rows of different lengths.
    """
    rows = {t.shape[0] for name, t in tensors.items() if 0 not in pads[name].dims}
    outputs = {n: t for n, t in without.outputs.items() if t.dim() and {t.shape[0]} == rows}
    if len(rows) != 1 or rows <= {0, 1} or not outputs or layout.length < 2:
        return None
    count = rows.pop()
    cuts = [(1 + STEP * row) % min(MOST, layout.length) for row in range(count)]
    batch = {n: t for n, t in call.leaves.items() if t.dim() and t.shape[0] == count}
    batch.update(tensors)
    try:
        for row in range(count)[:MOST]:
            alone = _alone(call, batch, pads, layout, row, 0)
            for name, output in outputs.items():
                place = closest(output[row : row + 1], alone[name], layout)
                if place is None or place.error > allowed:
                    return None
        short = [_alone(call, batch, pads, layout, row, cut) for row, cut in enumerate(cuts[:MOST])]
    except (ArgumentError, KeyError):
        return None  # it takes no batch of one
    ragged = {name: _ragged(tensors[name], pad, cuts) for name, pad in pads.items()}
    together = _outputs(call, ragged, "with rows of different lengths")
    errors: dict[str, float] = {}
    for row, cut in enumerate(cuts[:MOST]):
        grown = Padded(layout.length - cut, cut, layout.side)
        for name in outputs:
            place = closest(short[row][name], together[name][row : row + 1], grown)
            errors[f"{name} of row {row}"] = float("inf") if place is None else place.error
    worst = max(errors, key=lambda name: errors[name])
    return Compared("rows", errors[worst], worst)


def _alone(
    call: Call,
    batch: Mapping[str, Tensor],
    pads: Mapping[str, Pad],
    layout: Padded,
    row: int,
    cut: int,
) -> dict[str, Tensor]:
    """Outputs of one row without its last positions, or its first."""
    kept = layout.length - cut
    tensors = {name: t[row : row + 1] for name, t in batch.items()}
    for name, pad in pads.items():
        for dim in pad.dims:
            start = 0 if layout.side == "right" else cut
            tensors[name] = tensors[name].narrow(dim, start, kept)
    return _outputs(call, tensors, "")


def _ragged(tensor: Tensor, pad: Pad, cuts: Sequence[int]) -> Tensor:
    """The whole batch, in each row as many positions padded."""
    tensor = tensor.clone()
    for row, cut in enumerate(cuts):
        for dim in pad.dims if cut else ():
            length = tensor.shape[dim]
            start = length - cut if pad.side == "right" else 0
            tensor[row : row + 1].narrow(dim, start, cut).fill_(pad.value)
    return tensor


def _outputs(call: Call, tensors: Mapping[str, Tensor], how: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return {f"output {n}": t for n, t in forward(call, tensors, how).items()}
