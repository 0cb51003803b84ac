"""What every loader asks of its data."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphopt.examples.common.errors import WorkloadError


def check_tensor(name: str, tensor: Tensor, shape: Sequence[int | None]) -> Tensor:
    """Return ``tensor`` if it can be trained on.

    Args:
        name: what the data is called in errors.
        tensor: of any dtype.
        shape: the size of each dimension; None stands for any size above zero.

    Raises:
        WorkloadError: it is empty, has another shape, or holds NaN or an infinity.
    """
    wanted = ", ".join("any" if size is None else str(size) for size in shape)
    fits = tensor.dim() == len(shape) and all(
        size is None or size == own for size, own in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        raise WorkloadError(
            f"{name} has shape {list(tensor.shape)}, expected [{wanted}]", "reshape the data"
        )
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
