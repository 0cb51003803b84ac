"""The kernels of flex tensors: C++ against the reference, Triton interpreted and compiled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ops import flex as reference
from graphopt.ops.flex import UNKNOWN
from graphopt.runtime.kernels import flex_cpu
from tests.kernels.test_kernels import needs_triton, run
from tests.support.flex import exponent, hard_bits

OPERATORS = ["flex_quantise", "flex_round"]
has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def compare(*arguments: Any) -> None:
    """Both operators in C++ and by the reference: the same bits and strides."""
    for operator in OPERATORS:
        found = getattr(flex_cpu, operator)(*arguments)
        wanted = getattr(reference, operator)(*arguments)
        for mine, theirs in zip(found, wanted, strict=True):
            assert mine.dtype is theirs.dtype
            assert mine.stride() == theirs.stride()
            assert torch.equal(mine, theirs)
        assert torch.equal(found[0].signbit(), wanted[0].signbit())
    mantissas, _ = reference.flex_quantise(*arguments)
    values = flex_cpu.flex_dequantise(mantissas, arguments[1])
    assert torch.equal(values, reference.flex_dequantise(mantissas, arguments[1]))
    assert values.stride() == mantissas.stride()


@has_compiler
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("e", [UNKNOWN, -126, -20, -3, 0, 90, 126, 1000])
def test_the_cpp_kernel_is_the_reference(e: int, stochastic: bool) -> None:
    assert flex_cpu.library() is not None
    random = (2**31 - 1, torch.tensor([-(2**62) - 5, 2**33 + 7])) if stochastic else ()
    for mantissa in (8, 13, 16):
        hard = hard_bits(max(-126, min(126, e)), mantissa, 3000).view(np.float32)
        special = torch.tensor([np.nan, np.inf, -np.inf, 1e-42, -0.0, 3.4e38])
        for x in (
            torch.from_numpy(hard),
            torch.randn(7, 10).t(),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(6, 8)[::2, ::3],
            torch.randn(3, 1).expand(3, 4),
            -torch.zeros(5),
            torch.zeros(0, 3),
            torch.tensor(1.5),
            special,
            special[:3],
        ):
            compare(x, exponent(e), mantissa, *random)


@has_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_no_bit(threads: int) -> None:
    x = torch.randn(200_003)
    x[5], x[100_000], x[-1] = float("nan"), float("inf"), 1e9
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(x, exponent(UNKNOWN), 16)
        compare(x, exponent(-12), 16, 4, torch.tensor([1, 2]))
    finally:
        torch.set_num_threads(before)


@has_compiler
@given(
    st.lists(st.floats(width=32), max_size=40).map(torch.tensor),
    st.integers(-126, 126) | st.just(UNKNOWN),
    st.integers(8, 16),
)
def test_the_cpp_kernel_on_generated_tensors(x: torch.Tensor, e: int, mantissa: int) -> None:
    compare(x, exponent(e), mantissa)


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    flex_cpu.library.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    try:
        assert flex_cpu.library() is None
        compare(torch.randn(10), exponent(UNKNOWN), 16)
    finally:
        flex_cpu.library.cache_clear()


def test_what_cannot_be_built_falls_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    flex_cpu.library.cache_clear()
    monkeypatch.setattr(flex_cpu, "SOURCE", "this is no C++")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    try:
        assert flex_cpu.library() is None
        compare(torch.randn(10), exponent(UNKNOWN), 16)
    finally:
        flex_cpu.library.cache_clear()
    assert "flex operators run without C++" in caplog.text


def test_operators_run_by_the_kernels_once_registered() -> None:
    code = """
import json, torch, graphopt.ops
from graphopt.runtime import kernels
from graphopt.runtime.kernels import flex_cpu
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = [f"graphopt::flex_{n}" for n in ("quantise", "dequantise", "round")]
before = [has(name, "CPU") for name in names]
kernels.register_flex(), kernels.register_flex()
calls, e = [], torch.tensor(-8, dtype=torch.int32)
library = flex_cpu.library()
flex_cpu.library = lambda: calls.append(1) or library
found, statistics = torch.ops.graphopt.flex_quantise(torch.ones(3), e, 16)
values = torch.ops.graphopt.flex_dequantise(found, statistics.select(0, 3))
after = [has(name, "CPU") for name in names]
print(json.dumps([before, after, len(calls), values.tolist()]))
"""
    assert run("-c", code) == [[False] * 3, [True] * 3, 2, [1.0] * 3]


@has_compiler
@pytest.mark.slow
def test_graphs_of_inductor_call_the_kernels() -> None:
    code = """
import json, torch, graphopt.ops
from graphopt.ops import flex
from graphopt.runtime import kernels
from graphopt.runtime.kernels import flex_cpu
kernels.register_flex()
calls, library = [], flex_cpu.library()
flex_cpu.library = lambda: calls.append(1) or library

def step(x, w, e, seed, quantise, round_, dequantise):
    hidden = torch.relu(x * w).t()
    mantissas, statistics = quantise(hidden, e, 16)
    values = dequantise(mantissas, statistics.select(0, 3))
    rounded, others = round_(values - w.t(), e, 9, 3, seed)
    return mantissas, statistics, values + 1, rounded * 2, others

ops = torch.ops.graphopt
registered = ops.flex_quantise, ops.flex_round, ops.flex_dequantise
reference = flex.flex_quantise, flex.flex_round, flex.flex_dequantise
x, w, seed = torch.randn(33, 70), torch.randn(33, 70), torch.tensor([1, 2])
x[0, 0], x[1, 1] = float("nan"), float("inf")
compiled = torch.compile(step, fullgraph=True)
same = []
for e in (flex.UNKNOWN, -12):
    e = torch.tensor(e, dtype=torch.int32)
    found, wanted = compiled(x, w, e, seed, *registered), step(x, w, e, seed, *reference)
    same += [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, wanted)]
    same += [a.stride() == b.stride() for a, b in zip(found, wanted)]
print(json.dumps([all(same), len(calls)]))
"""
    assert run("-c", code) == [True, 6]


@needs_triton
def test_triton_kernels_become_the_cuda_implementation() -> None:
    code = """
import json, torch, graphopt.ops
from graphopt.runtime import kernels
kernels.register_flex()
has = torch._C._dispatch_has_kernel_for_dispatch_key
names = ["flex_quantise", "flex_dequantise", "flex_round", "int16_mm"]
print(json.dumps([has(f"graphopt::{name}", "CUDA") for name in names]))
"""
    assert run("-c", code) == [True] * 4


@pytest.mark.slow
@needs_triton
def test_interpreted_triton_kernels_are_the_reference() -> None:
    count, different = run("-m", "tests.support.interpreted_flex", TRITON_INTERPRET="1")
    assert count == 4 * 2 * 7 * 5 + 5 * 2 * 3 + 1
    assert different == []


@pytest.mark.slow
@needs_triton
def test_triton_kernels_compile_for_hopper(tmp_path: Path) -> None:
    found = run("-m", "tests.support.compiled_flex", TRITON_CACHE_DIR=str(tmp_path))
    assert any("max.s32" in i and i.startswith("atom") for i in found["amax"])
    for name, names in found.items():
        # Subnormal numbers are kept, but for a floor, which is 0 or is rounded up to 0.
        assert [i for i in names if "ftz" in i and not i.startswith("cvt.rmi")] == [], name
        # No rounding by two operations at once.
        assert not any(i.startswith("fma") for i in names), name
    for name in ("quantise", "quantise stochastic", "round", "round stochastic"):
        assert "ld.global.v4.b32" in found[name]
        assert any(i.startswith("st.global.v4") for i in found[name])
        assert ("mul.hi.u32" in found[name]) == ("stochastic" in name)
    assert any("mma" in i and ".s32.s8.s8" in i for i in found["product"])
    assert any(i.startswith("cp.async") for i in found["product"])
