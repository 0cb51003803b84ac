"""Whether a model computes the same with padding as without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from graphopt.data.collate import Pad, Side
from graphopt.data.leaks import Leak, Recorder, find_leaks
from graphopt.data.padded_call import Call, all_true, checked_pads, found_pads, is_mask
from graphopt.data.padded_run import Compared, compare, record, run
from graphopt.data.positions import Padded
from graphopt.data.rows import compare_rows
from graphopt.model.comparison import Observed, tolerance
from graphopt.passbase import EXACT

MORE = 8
"""Padded positions of the check; a multiple of common strides, and within most models' limits."""


@dataclass(frozen=True)
class PaddingReport:
    """Prints as text.

    Attributes:
        model: its class.
        padded: by argument, how it was padded.
        length: positions without padding.
        more: padded positions.
        allowed: the error that rounding explains.
        compared: what was compared.
        leaks: where padding comes in, as far as it was found.
        masked: whether the call has a mask.
    """

    model: str
    padded: Mapping[str, Pad]
    length: int
    more: int
    allowed: float
    compared: tuple[Compared, ...]
    leaks: tuple[Leak, ...] = ()
    masked: bool = True

    @property
    def ok(self) -> bool:
        """Whether padding changes nothing."""
        return all(c.error <= self.allowed for c in self.compared)

    @property
    def hint(self) -> str:
        """What to look at where no operator says enough; empty if nothing."""
        bad = {c.kind: c.error for c in self.compared if c.error > self.allowed}
        if bad.keys() == {"gradients"} and bad["gradients"] == float("inf"):
            return (
                "NaN at padded positions gets into gradients, such as from a softmax of -inf only"
            )
        if bad.keys() == {"rows"}:
            return "rows of different lengths: a row depends on the length or padding of another"
        if not bad or self.masked:
            return ""
        return "the call has no mask by which the model could tell padding"

    def how(self) -> str:
        """What was padded, in words."""
        parts = [f"{name} with {pad.value:g}" for name, pad in self.padded.items()]
        first = next(iter(self.padded.values()))
        where = "" if first.side == "right" else " on the left"
        return f"{self.length} positions and {self.more} of padding{where}: {', '.join(parts)}"

    def __str__(self) -> str:
        wide = max(len(c.kind) for c in self.compared)
        lines = [f"{self.model}, {self.how()}"]
        for c in self.compared:
            result = "changes" if c.error > self.allowed else "same"
            worst = f": {c.worst} by {c.error:.2g}" if c.error > self.allowed else ""
            lines.append(f"  {c.kind:<{wide}}  {result}{worst}")
        lines += [f"  {leak}" for leak in self.leaks]
        lines += [f"  {self.hint}"] if self.hint else []
        return "\n".join(lines)


def check_padding(
    model: nn.Module,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    pads: Mapping[str, Pad] | None = None,
    side: Side = "right",
) -> PaddingReport:
    """Compare a call of a model with the same call with padded positions more.

    Both run on copies of the model, without dropout, in the mode that it is in and with gradients
    if they are enabled. Compared are outputs at true positions, the loss (an output that is one
    number), gradients of parameters, and buffers that forward writes. If all of these are the same,
    rows of different lengths in one batch are compared with each of them alone, unless rows depend
    on each other anyway.

    Args:
        model: the model; it is not changed.
        args: positional arguments of a call without padding.
        kwargs: keyword arguments of it.
        pads: what is padded, by the name of forward's argument; ``dim`` is one of the batch's
            tensor, and ``value`` of a mask what means padding. By default all arguments of the
            shape (batch, length) that a mask has: an argument with ``mask`` in its name.
        side: where padding goes, without `pads`.

    Raises:
        ArgumentError: there is no mask to tell what is padded, or `pads` names no tensor, a
            dimension that is not there, or two lengths; or forward fails, or draws random numbers.
    """
    call = Call(model, args, kwargs or {})
    chosen = checked_pads(call, dict(pads)) if pads is not None else found_pads(call, side)
    name, pad = next(iter(chosen.items()))
    layout = Padded(pad.length(call.leaves[name], name), MORE, pad.side)
    plain = {n: all_true(n, call.leaves[n], pad) for n, pad in chosen.items()}
    padded = {n: pad.pad(plain[n], MORE) for n, pad in chosen.items()}
    reference = run(call, plain)
    compared = compare(reference, run(call, padded, reference, layout), layout)
    observed = Observed({**reference.outputs, **reference.gradients, **reference.buffers})
    allowed = tolerance(observed, EXACT)
    if all(c.error <= allowed for c in compared):
        rows = compare_rows(call, plain, chosen, layout, reference, allowed)
        compared += () if rows is None else (rows,)
    report = PaddingReport(
        model=type(model).__name__,
        padded=chosen,
        length=layout.length,
        more=layout.more,
        allowed=allowed,
        compared=compared,
        masked=any(is_mask(name) for name in chosen),
    )
    if report.ok or compared[-1].kind == "rows":
        return report
    recorders = Recorder(), Recorder()
    for tensors, recorder in zip((plain, padded), recorders, strict=True):
        record(call, tensors, recorder)
    return replace(report, leaks=find_leaks(*recorders, layout, report.allowed))
