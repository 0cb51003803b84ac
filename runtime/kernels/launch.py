"""How a sum over many rows is spread over a GPU."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Two programs per multiprocessor hide each other's load latency.
_PROGRAMS_PER_PROCESSOR = 2


def splits_for(tensor: Tensor, programs: int, rows: int, least_rows: int) -> int:
    """Into how many parts the rows are cut, each summed by its own program.

    The parts are then summed in a fixed order, so that results do not vary from run to run.

    Args:
        tensor: where the work is done.
        programs: how many run without cutting.
        rows: how many can be cut.
        least_rows: rows below which a part is not worth a program.
    """
    if not tensor.is_cuda:
        return 1
    wanted = -(-_PROGRAMS_PER_PROCESSOR * _processors(tensor.device) // max(1, programs))
    return max(1, min(wanted, rows // least_rows))


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
