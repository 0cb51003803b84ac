"""The data-parallel example and its twin with DDP train to the same weights."""

from __future__ import annotations

import contextlib
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.ranks import in_processes

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "data_parallel"
LIMIT = 120.0  # seconds; a usual run takes about ten


def _train(weights: Path) -> str:
    """What ``torchrun train.py`` prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / "train.py"), *_options(weights)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=weights.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # so that a hanging run can be ended with its ranks
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        raise AssertionError(f"train.py hangs after printing:\n{printed}") from None
    assert process.returncode == 0, printed
    return printed


def _train_ddp(rank: int, port: int, weights: str, printed: str) -> None:
    """A rank of ``torchrun train_ddp.py``; it is forked, as starting one takes longer than it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv = ["train_ddp.py", *_options(Path(weights))]
    sys.path.insert(0, str(FOLDER))
    with Path(f"{printed}{rank}").open("w") as file, contextlib.redirect_stdout(file):
        runpy.run_path(str(FOLDER / "train_ddp.py"), run_name="__main__")


def _options(weights: Path) -> list[str]:
    return ["--epochs", "2", "--steps", "3", "--save", str(weights)]


def _losses(printed: str) -> list[float]:
    """Of each epoch."""
    return [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+),", printed, re.MULTILINE)]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_both_scripts_train_alike(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "graphopt.pt", tmp_path / "ddp.pt"
    printed = _train(mine)
    in_processes(2, _train_ddp, _free_port(), str(theirs), str(tmp_path / "printed"))
    ddp_printed = (tmp_path / "printed0").read_text()
    losses, ddp_losses = _losses(printed), _losses(ddp_printed)
    weights, ddp_weights = torch.load(mine), torch.load(theirs)
    assert len(losses) == 2
    assert losses[1] < losses[0]
    torch.testing.assert_close(losses, ddp_losses, rtol=1e-4, atol=0)
    assert weights.keys() == ddp_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, ddp_weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    # Both scripts stop with an error if the ranks' weights differ, and say so if they do not.
    assert "on all 2 ranks" in printed
    assert "on all 2 ranks" in ddp_printed
