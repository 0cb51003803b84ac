"""`graphopt::ctc_loss` against `torch.nn.functional.ctc_loss`, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import graphopt.ops  # noqa: F401  (registers the operators)

ctc = torch.ops.graphopt.ctc_loss
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
TIME, BATCH, CLASSES = 8, 3, 5


def problem(
    *,
    flat: bool = False,
    batched: bool = True,
    blank: int = 0,
    input_lengths: tuple[int, ...] = (8, 7, 5),
    target_lengths: tuple[int, ...] = (4, 2, 3),
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    log_probs = torch.randn(TIME, BATCH, CLASSES, dtype=dtype).log_softmax(-1).requires_grad_()
    labels = [label for label in range(CLASSES) if label != blank]
    targets = torch.tensor(labels)[torch.randint(len(labels), (BATCH, 4))]
    inputs, lengths = torch.tensor(input_lengths), torch.tensor(target_lengths)
    if not batched:
        return log_probs[:, 0].detach().requires_grad_(), targets[0], inputs[0], lengths[0]
    if flat:
        targets = torch.cat([row[:n] for row, n in zip(targets, target_lengths, strict=True)])
    return log_probs, targets, inputs, lengths


def assert_bit_equal(
    log_probs: Tensor, *rest: Any, blank: int, reduction: str, zero_infinity: bool
) -> Tensor:
    expected = F.ctc_loss(
        log_probs, *rest, blank=blank, reduction=reduction, zero_infinity=zero_infinity
    )
    actual, _ = ctc(log_probs, *rest, blank, REDUCTIONS[reduction], zero_infinity, None, [])
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual, expected)
    cotangent = torch.rand_like(expected)
    (wanted,) = torch.autograd.grad(expected, log_probs, cotangent)
    (found,) = torch.autograd.grad(actual, log_probs, cotangent)
    assert found.stride() == wanted.stride()
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, _ = ctc(
            mode.from_tensor(log_probs), *rest, blank, REDUCTIONS[reduction], False, None, []
        )
    assert (fake.dtype, fake.shape) == (expected.dtype, expected.shape)
    return expected.detach()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("zero_infinity", [False, True])
@pytest.mark.parametrize("lengths", ["tensors", "lists"])
@pytest.mark.parametrize("form", ["padded", "flat", "single"])
def test_bit_equal(reduction: str, zero_infinity: bool, lengths: str, form: str) -> None:
    for blank in (0, 3):
        log_probs, targets, inputs, outputs = problem(
            flat=form == "flat", batched=form != "single", blank=blank
        )
        known: tuple[Any, ...] = (inputs, outputs)
        if lengths == "lists":
            known = (inputs.reshape(-1).tolist(), outputs.reshape(-1).tolist())
        options = {"blank": blank, "reduction": reduction, "zero_infinity": zero_infinity}
        assert_bit_equal(log_probs, targets, *known, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("zero_infinity", [False, True])
def test_impossible_alignments(reduction: str, zero_infinity: bool) -> None:
    """The second input is shorter than its target: an infinite loss, or none at all."""
    given = problem(input_lengths=(8, 2, 5), target_lengths=(4, 4, 3))
    loss = assert_bit_equal(*given, blank=0, reduction=reduction, zero_infinity=zero_infinity)
    assert bool(loss.isinf().any()) is not zero_infinity


@settings(max_examples=40)
@given(
    lengths=st.lists(
        st.tuples(st.integers(1, TIME), st.integers(0, 4)), min_size=BATCH, max_size=BATCH
    ),
    flat=st.booleans(),
    zero_infinity=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_all_lengths(
    lengths: list[tuple[int, int]], flat: bool, zero_infinity: bool, dtype: torch.dtype
) -> None:
    inputs, targets = (tuple(n) for n in zip(*lengths, strict=True))
    given = problem(flat=flat, input_lengths=inputs, target_lengths=targets, dtype=dtype)
    assert_bit_equal(*given, blank=0, reduction="none", zero_infinity=zero_infinity)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_autocast(dtype: torch.dtype) -> None:
    log_probs, *rest = problem(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.ctc_loss(log_probs, *rest)
        actual, _ = ctc(log_probs, *rest, 0, 1, False, None, [])
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake, _ = ctc(mode.from_tensor(log_probs), *rest, 0, 1, False, None, [])
    assert actual.dtype == fake.dtype == expected.dtype
    assert torch.equal(actual, expected)
    (wanted,) = torch.autograd.grad(expected, log_probs)
    (found,) = torch.autograd.grad(actual, log_probs)
    assert found.dtype == dtype
    assert torch.equal(found, wanted)


def test_a_lost_record_is_repeated_bit_equal() -> None:
    log_probs, *rest = problem()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        loss, _ = ctc(log_probs, *rest, 0, 1, False, None, [])
    (wanted,) = torch.autograd.grad(F.ctc_loss(log_probs, *rest), log_probs)
    assert torch.equal(torch.autograd.grad(loss, log_probs)[0], wanted)


@pytest.mark.parametrize("overload", ["default", "IntList"])
def test_opcheck(overload: str) -> None:
    log_probs, targets, *lengths = problem()
    if overload == "IntList":
        lengths = [length.tolist() for length in lengths]
    call = (targets, *lengths, 0, 1, False, None)
    torch.library.opcheck(getattr(ctc, overload), (log_probs, *call, []))
    detached = log_probs.detach()
    grad, tape = ctc(detached, *call, [])
    wanted = [True, False, False, False] if overload == "default" else [True, False]
    backward = getattr(torch.ops.graphopt.ctc_loss_backward, overload)
    torch.library.opcheck(backward, ([grad], wanted, detached, *call, tape))
