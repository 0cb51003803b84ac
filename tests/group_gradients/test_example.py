"""The data-parallel example and its twin with DDP train to the same weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "data_parallel"
LIMIT = 120.0  # seconds; a usual run takes about ten


def _train(script: str, weights: Path) -> tuple[str, list[float], dict[str, Tensor]]:
    """What rank 0 prints, the loss of each epoch, and rank 0's weights and buffers."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(FOLDER / script)]
    command += ["--epochs", "2", "--steps", "3", "--save", str(weights)]
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
        raise AssertionError(f"{script} hangs after printing:\n{printed}") from None
    assert process.returncode == 0, printed
    losses = [float(loss) for loss in re.findall(r"^epoch \d+: loss (\S+),", printed, re.MULTILINE)]
    return printed, losses, torch.load(weights)


def test_both_scripts_train_alike(tmp_path: Path) -> None:
    printed, losses, weights = _train("train.py", tmp_path / "graphopt.pt")
    ddp_printed, ddp_losses, ddp_weights = _train("train_ddp.py", tmp_path / "ddp.pt")
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
