"""Ctrl-C and SIGTERM end a training between two steps."""

from __future__ import annotations

import os
import signal
from types import FrameType

import torch
import torch.distributed as dist


class Interrupts:
    """Remembers the first signal while a loop runs; outside of loops, and twice, it raises."""

    def __init__(self) -> None:
        self.inside = False
        self._asked = False

    def install(self) -> None:
        """Take SIGINT and SIGTERM of this process."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self.inside or self._asked:
            raise KeyboardInterrupt
        self._asked = True
        # The first step may compile for a minute.
        os.write(2, b"stopping behind this step; once more stops at once\n")

    def asked(self, device: torch.device) -> bool:
        """Whether to stop; the ranks of a job stop behind the same step."""
        if not dist.is_initialized():
            return self._asked
        flag = torch.tensor(int(self._asked), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)
