"""Inductor's cache on disk and the vector instructions of a processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

STEP = """
import torch, graphopt
from graphopt.model.surface import report
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
model, x = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Softmax(1)), torch.randn(64, 64)
model(x).square().sum().backward()
expected = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
graphopt.optimize(model, backend="inductor")
model(x).square().sum().backward()
assert report(model).specialisations[0].backend.backend == "inductor", report(model)
for p, e in zip(model.parameters(), expected):
    torch.testing.assert_close(p.grad, e, rtol=1e-4, atol=1e-5)
"""


@pytest.mark.slow
def test_code_kept_for_other_instructions_never_runs(tmp_path: Path) -> None:
    """The cache does not tell them apart: errors, wrong numbers, a corrupted heap."""
    own = {k: v for k, v in os.environ.items() if k != "ATEN_CPU_CAPABILITY"}
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "default"}):
        done = subprocess.run(
            [sys.executable, "-c", STEP],
            env={**own, **capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{capability}: {done.stderr}"
