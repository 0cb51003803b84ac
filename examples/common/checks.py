"""What every loader asks of its data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.examples.common.errors import WorkloadError


def check_count(name: str, count: int, *, at_most: int | None = None) -> int:
    """Return ``count`` if it is a whole number from 1 to ``at_most``.

    Raises:
        WorkloadError: it is not.
    """
    if not isinstance(count, int) or count < 1 or (at_most is not None and count > at_most):
        limits = "1 or more" if at_most is None else f"between 1 and {at_most}"
        raise WorkloadError(f"{count!r} {name}", f"take {limits}")
    return count


def check_labels(name: str, labels: Tensor, shape: Sequence[int | None], classes: int) -> Tensor:
    """Return ``labels`` if they are numbers of classes, from 0 on, as int64.

    Raises:
        WorkloadError: they are not, or have another shape.
    """
    check_tensor(name, labels, shape, (torch.int64,))
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise WorkloadError(
            f"{name} go from {least} to {most}, expected 0 to {classes - 1}",
            "number the classes from 0",
        )
    return labels


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> Tensor:
    """Return ``tensor`` if it can be trained on.

    Args:
        name: what the data is called in errors.
        tensor: the data.
        shape: the size of each dimension; None stands for any size above zero.
        dtypes: what it may be of.

    Raises:
        WorkloadError: it is no tensor, is empty, has another shape or dtype, or holds NaN or an
            infinity.
    """
    if not isinstance(tensor, Tensor):
        raise WorkloadError(
            f"{name} is of type {type(tensor).__name__}, expected a tensor", "use torch.as_tensor"
        )
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    fits = tensor.dim() == len(shape) and all(
        size is None or size == own for size, own in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise WorkloadError(
            f"{name} has shape {list(tensor.shape)}, expected [{wanted}]", "reshape the data"
        )
    if tensor.dtype not in dtypes:
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        own = str(tensor.dtype).removeprefix("torch.")
        raise WorkloadError(f"{name} is of {own}, expected {allowed}", "convert it by .to()")
    if not tensor.numel():
        raise WorkloadError(f"{name} is empty: its shape is {list(tensor.shape)}", "pass more data")
    if tensor.is_floating_point() or tensor.is_complex():
        bad = (~tensor.isfinite()).nonzero()
        if len(bad):
            first = bad[0].tolist()
            raise WorkloadError(
                f"{name} holds {len(bad)} values that are NaN or infinite, the first at {first}",
                "remove or replace them before training",
            )
    return tensor
