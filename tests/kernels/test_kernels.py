"""The Triton kernels, without a GPU: interpreted against the reference, and compiled for sm_90."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graphopt.runtime import kernels

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def run(*arguments: str, **environment: str) -> Any:
    """What a Python process prints last, from JSON."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, **environment},
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@needs_triton
def test_kernels_agree_with_the_reference() -> None:
    errors = run("-m", "tests.support.interpreted_kernels", TRITON_INTERPRET="1")
    assert len(errors) == 21
    assert {name: error for name, error in errors.items() if error > 2e-6} == {}


@pytest.mark.slow
@needs_triton
def test_kernels_compile_for_hopper(tmp_path: Path) -> None:
    found = run("-m", "tests.support.compiled_kernels", TRITON_CACHE_DIR=str(tmp_path))
    for name, instructions in found.items():
        has_tensor_cores = any("mma" in instruction for instruction in instructions)
        # float32 is multiplied as float32, not rounded for the tensor cores.
        assert has_tensor_cores == ("bf16" in name), (name, instructions)
        if "fp32" in name:
            assert any(i.startswith("fma.rn.f32") for i in instructions), (name, instructions)


@needs_triton
def test_kernels_become_the_cuda_implementation() -> None:
    code = """
import json, torch, graphopt.ops
from graphopt.runtime import kernels
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = ["graphopt::second_moment", "graphopt::patch_moment"]
before = [has(name, "CUDA") for name in names]
print(json.dumps([before, kernels.register(), kernels.register(), [has(n, "CUDA") for n in names]]))
"""
    assert run("-c", code) == [[False, False], True, True, [True, True]]


def test_without_triton_nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert kernels.register.__wrapped__() is False
