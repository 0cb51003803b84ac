"""The restart example: a rank is killed, and fewer ranks go on from the last checkpoint."""

from __future__ import annotations

import contextlib
import os
import runpy
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from tests.support.ranks import in_processes

pytestmark = pytest.mark.distributed

FOLDER = Path(__file__).parents[2] / "examples" / "data_parallel"


def _runs(rank: int, ranks: int, port: int, folder: str, options: list[str]) -> None:
    """A rank of ``torchrun restart.py``; it is forked, as starting one takes longer than it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    checkpoint = ["--checkpoint", f"{folder}/run.pt", "--timeout", "8"]
    sys.argv = ["restart.py", *checkpoint, *options]
    sys.path.insert(0, str(FOLDER))
    with Path(f"{folder}/{ranks}.{rank}").open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(FOLDER / "restart.py"), run_name="__main__")


def _start(ranks: int, folder: Path, *options: str) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        in_processes(ranks, _runs, ranks, port, str(folder), list(options))
    finally:
        printed = "".join(Path(folder, f"{ranks}.{r}").read_text() for r in range(ranks))
    return printed


def test_fewer_ranks_go_on_after_a_kill(tmp_path: Path) -> None:
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        _start(3, tmp_path, "--steps", "8", "--every", "2", "--die", "2", "5")
    assert torch.load(tmp_path / "run.pt")["step"] == 4
    printed = _start(2, tmp_path, "--steps", "8", "--every", "2")
    assert "2 ranks begin at step 4" in printed
    assert "after step 8" in printed
    assert torch.load(tmp_path / "run.pt")["step"] == 8
