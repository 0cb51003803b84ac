"""The example trains alike on any number of ranks, and goes on from its checkpoint on another."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "pipeline" / "train.py"
LIMIT = 120.0  # seconds; a usual run takes about fifteen


def _train(ranks: int, *options: str) -> tuple[str, list[float]]:
    """What the first rank prints, and the loss of each epoch; without torchrun for one rank."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    process = subprocess.Popen(
        [*command, str(SCRIPT), "--steps", "2", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # so that a hanging run can be ended with its ranks
    )
    try:
        printed, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        printed, _ = process.communicate()
        raise AssertionError(f"the example hangs after printing:\n{printed}") from None
    assert process.returncode == 0, printed
    losses = re.findall(r"^epoch \d+: loss (\S+),", printed, re.MULTILINE)
    return printed, [float(loss) for loss in losses]


def test_ranks_train_alike_and_share_a_checkpoint(tmp_path: Path) -> None:
    _, alone = _train(1, "--epochs", "2", "--checkpoint", str(tmp_path / "alone.pt"))
    shared = tmp_path / "shared.pt"
    # Stopped behind the first of two epochs, the training goes on where it was.
    printed, first = _train(2, "--epochs", "2", "--until", "1", "--checkpoint", str(shared))
    assert "stage 1 on rank 1" in printed
    printed, second = _train(
        4, "--epochs", "2", "--schedule", "zero_bubble", "--checkpoint", str(shared)
    )
    assert "resumed behind epoch 1" in printed
    assert "stage 3 on rank 3" in printed
    assert len(alone) == 2
    torch.testing.assert_close(first + second, alone, rtol=1e-4, atol=0)
    weights, whole = torch.load(shared)["model"], torch.load(tmp_path / "alone.pt")["model"]
    assert weights.keys() == whole.keys()
    torch.testing.assert_close(weights, whole, rtol=1e-4, atol=1e-5)


def test_two_pipelines_train_alike() -> None:
    # The norms of this model are over one image; batch norm would see half of a batch.
    options = ["--model", "unet", "--epochs", "1", "--microbatches", "4"]
    _, alone = _train(1, *options)
    _, losses = _train(4, *options, "--dp", "2")
    assert len(alone) == 1
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=0)
