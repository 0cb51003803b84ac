"""`graphopt::expect`: a check on a value, after which a graph holds for one outcome only.

Forward asks whether all values are finite, or whether a label is in range, to raise or to repair. A
graph is captured for the usual answer, and `expect` raises where the answer is another one. Nothing
has been written by then, so the call can run as PyTorch runs it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.node import has_side_effect

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("expect(Tensor value, bool outcome) -> ()")


class Unexpected(RuntimeError):
    """A value is another than the graph was captured for."""


def _expect(value: Tensor, outcome: bool) -> None:
    if bool(value) is not outcome:
        raise Unexpected("a value is another than the graph was captured for")


def _nothing(value: Tensor, outcome: bool) -> None:
    return None


_library.impl("expect", _expect, "CompositeExplicitAutograd")
_library.impl("expect", _nothing, "Meta")

# It returns nothing, and must stay where nobody uses it.
has_side_effect(torch.ops.graphopt.expect.default)
