"""Inductor's cache on disk and the vector instructions of a processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch._inductor.cpu_vec_isa import pick_vec_isa

STEP = """
import torch, graphopt
import torch._inductor.config
from graphopt.model.surface import report
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
torch._inductor.config.cpp_cache_precompile_headers = False  # for so few kernels not worth it

class Model(nn.Module):  # of as few kernels as use the instructions: each takes seconds to compile
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64))

    def forward(self, x):
        return torch.softmax(x * self.weight, 1)

model, x = Model(), torch.randn(64, 64)
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
    if pick_vec_isa():  # both processes would ask the compiler again, with an empty cache
        own["TORCHINDUCTOR_VEC_ISA_OK"] = "1"
    for capability in ({}, {"ATEN_CPU_CAPABILITY": "default"}):
        done = subprocess.run(
            [sys.executable, "-c", STEP],
            env={**own, **capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{capability}: {done.stderr}"
