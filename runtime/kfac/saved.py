"""What a saved curvature may hold: types of its tensors, and numbers that a step can work with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.errors import StateError
from graphopt.plan.kfac import Curvature
from graphopt.runtime.kfac.state import prefix_of
from graphopt.runtime.part import check_dtype

_COUNTS = ("step", "micro-batches", "interval", "owners")
_HINT = "load the state of this model, saved with the same options of kfac"
# Of these a number that is not finite would reach gradients. What an unfinished step has summed up
# is looked at when the step ends.
_FINITE = ("now", "before", "solution")


def check_values(
    parts: Sequence[Curvature], saved: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> None:
    """Whether each tensor has the dtype of its table, and possible values.

    Args:
        parts: the plan parts there are so far.
        saved: by name.
        own: the present state.

    Raises:
        StateError: one has not; names it.
    """
    for key, value in saved.items():
        table = key.partition("/")[0]
        if table in _COUNTS:
            _check_counts(key, table, value)
            continue
        if key.endswith("/damping"):
            _check_shape(key, value, ())
        if key in own:
            check_dtype(f"kfac/{key}", value, own[key].dtype)
        elif key.endswith("/damping"):
            check_dtype(f"kfac/{key}", value, torch.float64)
        elif not value.is_floating_point():
            raise StateError(f"'kfac/{key}' has dtype {str(value.dtype)[6:]}", hint=_HINT)
        if table in _FINITE and not bool(value.isfinite().all()):
            raise StateError(f"'kfac/{key}' is not finite in the saved state", hint=_HINT)
        if key.endswith("/damping") and not bool((value > 0).all()):
            raise StateError(f"'kfac/{key}' is not positive in the saved state", hint=_HINT)
    for part in parts:
        _check_types(part, saved)


def _check_counts(key: str, table: str, value: Tensor) -> None:
    wanted = {"step": (), "micro-batches": (), "interval": (3,)}
    _check_shape(key, value, wanted.get(table, (value.numel(),)))
    check_dtype(f"kfac/{key}", value, torch.int64)
    numbers = value.reshape(-1).tolist()
    least = {"micro-batches": [1], "interval": [1, 1, 0]}.get(table, [0] * len(numbers))
    wrong = any(n < low for n, low in zip(numbers, least, strict=True))
    if table == "owners" and not wrong:
        wrong = not numbers or any(rank >= numbers[0] for rank in numbers[1:])
    if wrong:
        raise StateError(f"'kfac/{key}' has a number that is none of it: {numbers}", hint=_HINT)


def _check_shape(key: str, value: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(value.shape) != wanted:
        raise StateError(
            f"'kfac/{key}' has shape {tuple(value.shape)} in the saved state and {wanted} here",
            hint=_HINT,
        )


def _check_types(part: Curvature, saved: Mapping[str, Tensor]) -> None:
    """All values of one statistic have one dtype, and solutions that of their statistics."""
    for side in (side for block in part.blocks for side in block.sides):
        values = [f"{table}/{side.statistic}" for table in ("now", "before")]
        found = [key for key in values if key in saved]
        if len(found) == 2:
            check_dtype(f"kfac/{found[1]}", saved[found[1]], saved[found[0]].dtype)
    for block in part.blocks:
        now = [saved.get(f"now/{side.statistic}") for side in block.sides]
        dtype = torch.float32
        for value in now:
            dtype = dtype if value is None else torch.promote_types(dtype, value.dtype)
        prefix = prefix_of(block)
        for key in (k for k in saved if k.startswith(prefix) and not k.endswith("/damping")):
            if all(value is not None for value in now):
                check_dtype(f"kfac/{key}", saved[key], dtype)
