"""`graphopt::rnn` against PyTorch's own recurrent networks, bit for bit."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import BackendError, DoubleBackwardError
from graphopt.ops.record import Function, Invocation

rnn = torch.ops.graphopt.rnn.default
rnn_backward = torch.ops.graphopt.rnn_backward.default

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 3}),
    "gru": (nn.GRU, {}),
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
TIME, BATCH, WIDTH, HIDDEN = 5, 3, 4, 6


def make(kind: str, **options: Any) -> nn.RNNBase:
    cls, more = KINDS[kind]
    torch.manual_seed(0)
    return cls(WIDTH, HIDDEN, **{"num_layers": 2, **options, **more})


def states(
    model: nn.RNNBase, batch: int = BATCH, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    rows = model.num_layers * (2 if model.bidirectional else 1)
    widths = [model.proj_size or model.hidden_size]
    if model.mode == "LSTM":
        widths.append(model.hidden_size)
    return [torch.randn(rows, batch, width, dtype=dtype) for width in widths]


def sequence(model: nn.RNNBase) -> Tensor:
    shape = (BATCH, TIME, WIDTH) if model.batch_first else (TIME, BATCH, WIDTH)
    return torch.randn(shape, requires_grad=True)


def arguments(model: nn.RNNBase, x: Tensor, hx: Sequence[Tensor]) -> tuple[Any, ...]:
    return (
        model.mode.lower(),
        x,
        list(hx),
        list(model._flat_weights),
        model.bias,
        model.num_layers,
        model.dropout,
        model.training,
        model.bidirectional,
        model.batch_first,
    )


def ours(model: nn.RNNBase, x: Tensor, hx: Sequence[Tensor]) -> list[Tensor]:
    outputs = rnn(*arguments(model, x, hx), None, [])
    return list(outputs[: 1 + len(hx)])


def eager(model: nn.RNNBase, x: Tensor, hx: Sequence[Tensor]) -> list[Tensor]:
    output, hidden = model(x, tuple(hx) if len(hx) == 2 else hx[0])
    return [output, *(hidden if len(hx) == 2 else [hidden])]


def assert_identical(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        assert a.stride() == e.stride()
        assert torch.equal(a, e)


def step(function: Any, model: nn.RNNBase, x: Tensor, hx: list[Tensor]) -> list[Tensor]:
    """Outputs, every gradient, and the random numbers that follow."""
    torch.manual_seed(1)
    outputs = function(model, x, hx)
    after = torch.rand(3)
    torch.manual_seed(2)
    cotangents = [torch.randn_like(output) for output in outputs]
    inputs = [t for t in (x, *hx, *model.parameters()) if t.requires_grad]
    grads = torch.autograd.grad(outputs, inputs, cotangents)
    return [*(o.detach() for o in outputs), *grads, after, torch.rand(3)]


def assert_same_step(model: nn.RNNBase, x: Tensor, hx: list[Tensor]) -> None:
    assert_identical(step(ours, model, x, hx), step(eager, model, x, hx))


# -- equality with eager ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_step_is_bit_equal(kind: str, bidirectional: bool, batch_first: bool) -> None:
    for layers, dropout, bias, training in itertools.product(
        (1, 3), (0.0, 0.4), (False, True), (False, True)
    ):
        if layers == 1 and dropout:
            continue
        model = make(
            kind,
            num_layers=layers,
            dropout=dropout,
            bias=bias,
            bidirectional=bidirectional,
            batch_first=batch_first,
        ).train(training)
        hx = [h.requires_grad_() for h in states(model)]
        assert_same_step(model, sequence(model), hx)


@settings(max_examples=40)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4)),
    batch_first=st.booleans(),
    transposed=st.booleans(),
)
def test_every_shape_and_layout(
    kind: str, shape: tuple[int, int], batch_first: bool, transposed: bool
) -> None:
    model = make(kind, batch_first=batch_first, dropout=0.3)
    x = (
        torch.randn(*shape[::-1], WIDTH).transpose(0, 1)
        if transposed
        else torch.randn(*shape, WIDTH)
    )
    hx = states(model, batch=shape[0] if batch_first else shape[1])
    assert_same_step(model, x.detach().requires_grad_(), hx)


@pytest.mark.parametrize("kind", KINDS)
def test_only_wanted_gradients(kind: str) -> None:
    model = make(kind)
    model.weight_hh_l0.requires_grad_(False)
    model.bias_ih_l1.requires_grad_(False)
    assert_same_step(model, sequence(model).detach(), states(model))


@pytest.mark.parametrize("used", [0, 1])
def test_unused_outputs(used: int) -> None:
    model = make("lstm")
    x, hx = sequence(model), states(model)
    inputs = (x, *model.parameters())
    expected = torch.autograd.grad(eager(model, x, hx)[used].square().sum(), inputs)
    actual = torch.autograd.grad(ours(model, x, hx)[used].square().sum(), inputs)
    assert_identical(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layered", ["leaf", "cast", "float"])
@pytest.mark.parametrize("mkldnn", [False, True])
def test_autocast(kind: str, layered: str, mkldnn: bool) -> None:
    model, below = make(kind, dropout=0.3, bidirectional=True), nn.Linear(WIDTH, WIDTH)
    x = sequence(model)
    inputs = (x, *model.parameters())

    def run(function: Any) -> list[Tensor]:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            y = x if layered == "leaf" else below(x) if layered == "cast" else below(x).float()
            hx = [torch.zeros_like(h, dtype=y.dtype) for h in states(model)]
            outputs = function(model, y, hx)
        total = torch.stack([output.float().square().sum() for output in outputs]).sum()
        return [*(o.detach() for o in outputs), *torch.autograd.grad(total, inputs)]

    def fake(model: nn.RNNBase, y: Tensor, hx: list[Tensor]) -> list[Tensor]:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return ours(model, mode.from_tensor(y), [mode.from_tensor(h) for h in hx])

    with torch.backends.mkldnn.flags(enabled=mkldnn):
        try:
            expected = run(eager)
        except RuntimeError as refusal:  # oneDNN has no bfloat16 LSTM without AVX-512
            assert mkldnn
            assert not torch.ops.mkldnn._is_mkldnn_bf16_supported()
            with pytest.raises(RuntimeError, match=re.escape(str(refusal).splitlines()[0])):
                run(ours)
            return
        assert_identical(run(ours), expected)
        with torch.autocast("cpu", torch.bfloat16):
            y = x if layered == "leaf" else below(x) if layered == "cast" else below(x).float()
            hx = [torch.zeros_like(h, dtype=y.dtype) for h in states(model)]
            promised = fake(model, y, hx)
    for promise, output in zip(promised, expected, strict=False):
        assert (promise.dtype, promise.shape) == (output.dtype, output.shape)


def test_no_backward_records_nothing() -> None:
    model = make("gru", dropout=0.3)
    x, hx = sequence(model), states(model)
    with torch.no_grad():
        *outputs, tape = rnn(*arguments(model, x, hx), None, [])
    assert not hasattr(tape, "_graphopt_record")
    assert not any(output.requires_grad for output in outputs)
    with torch.inference_mode():
        *_, tape = rnn(*arguments(model, x, hx), None, [True] * 10)
    assert not hasattr(tape, "_graphopt_record")


# -- the tape --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_lost_record_is_repeated_bit_equal(kind: str, dropout: float) -> None:
    model = make(kind, dropout=dropout)
    x, hx = sequence(model), [h.requires_grad_() for h in states(model)]
    expected = step(eager, model, x, hx)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        copied = step(ours, model, x, hx)
    assert_identical(copied, expected)


def test_backward_twice_is_repeated_bit_equal() -> None:
    model = make("gru", dropout=0.5)
    x, hx = sequence(model), states(model)
    total = ours(model, x, hx)[0].square().sum()
    first = torch.autograd.grad(total, [x, *model.parameters()], retain_graph=True)
    assert_identical(torch.autograd.grad(total, [x, *model.parameters()]), first)


@pytest.mark.parametrize("change", ["another tensor", "in place"])
def test_backward_is_a_function_of_its_arguments(change: str) -> None:
    """Also where the weights of the backward are not those of the forward."""
    model = make("lstm", dropout=0.5)
    x, hx = sequence(model).detach(), states(model)
    wanted = [isinstance(t, nn.Parameter) for t in (x, *hx, *model.parameters())]
    with torch.no_grad():
        torch.manual_seed(1)
        output, *_, tape = rnn(*arguments(model, x, hx), None, wanted)
        other = make("lstm", dropout=0.5)
        for weight in other.parameters():
            weight.mul_(0.5)
        if change == "in place":
            model.load_state_dict(other.state_dict())
            other = model
        grad = torch.ones_like(output)
        found = rnn_backward([grad, None, None], wanted, *arguments(other, x, hx), None, tape)
    torch.manual_seed(1)
    expected = torch.autograd.grad(other(x, tuple(hx))[0].sum(), list(other.parameters()))
    assert_identical(found, expected)


@pytest.mark.parametrize("recorded", [(0, 3), (0, 2, 3, 4, 5, 6)])
def test_backward_may_want_other_gradients(recorded: tuple[int, ...]) -> None:
    model = make("gru", num_layers=1)
    x, hx = sequence(model).detach(), states(model)
    tensors = [x, *hx, *(weight.detach() for weight in model.parameters())]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    options = arguments(model, x, hx)[4:]
    expected = torch.gru(leaves[0], leaves[1], leaves[2:], *options)[0].sum()
    call = ("gru", tensors[0], tensors[1:2], tensors[2:], *options)
    output, *_, tape = rnn(*call, None, [i in recorded for i in range(6)])
    grads = [torch.ones_like(output), None, None]
    found = rnn_backward(grads, [i in (0, 2) for i in range(6)], *call, None, tape)
    assert_identical(found, torch.autograd.grad(expected, [leaves[0], leaves[2]]))


def test_overwritten_outputs_do_not_change_gradients() -> None:
    model = make("lstm")
    x, hx = sequence(model).detach(), states(model)
    wanted = [isinstance(t, nn.Parameter) for t in (x, *hx, *model.parameters())]
    expected = torch.autograd.grad(eager(model, x, hx)[0].sum(), list(model.parameters()))
    with torch.no_grad():
        *outputs, tape = rnn(*arguments(model, x, hx), None, wanted)
        grad = torch.ones_like(outputs[0])
        for output in outputs:
            output.fill_(float("nan"))
        found = rnn_backward([grad, None, None], wanted, *arguments(model, x, hx), None, tape)
    assert_identical(found, expected)


def test_record_is_freed_with_the_tape() -> None:
    model = make("gru")
    x, hx = sequence(model), states(model)
    with torch.no_grad():
        *outputs, tape = rnn(*arguments(model, x, hx), None, [True] * 10)
    record = weakref.ref(tape._graphopt_record)
    del outputs
    assert record() is not None
    del tape
    gc.collect()
    assert record() is None


def test_double_backward_is_refused() -> None:
    model = make("gru")
    x = sequence(model)
    total = ours(model, x, states(model))[0].sum()
    with pytest.raises(DoubleBackwardError, match="cannot be differentiated again"):
        torch.autograd.grad(total, x, create_graph=True)


def _random(*, can_repeat: bool, device: str = "cpu") -> Invocation:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (nn.functional.dropout(x),)

    random = Function(
        function, lambda x, _: (x,), is_random=lambda x: True, can_repeat=lambda x: can_repeat
    )
    return Invocation(random, [torch.ones(4, device=device)], None)


def test_randomness_that_cannot_be_repeated_is_refused() -> None:
    state = torch.get_rng_state()
    assert _random(can_repeat=True).repeat([True], state).outputs[0].requires_grad
    with pytest.raises(BackendError, match="cannot be repeated and its record is gone"):
        _random(can_repeat=False).repeat([True], state)


def test_unknown_random_generators_are_refused() -> None:
    with pytest.raises(BackendError, match="not supported on 'meta' devices"):
        _random(can_repeat=True, device="meta").random_state()


# -- the registration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "batch_first"), [("lstm", False), ("projected", True), ("gru", True)]
)
def test_opcheck(kind: str, batch_first: bool) -> None:
    model = make(kind, batch_first=batch_first, bidirectional=True)
    x, hx = sequence(model), states(model)
    call = arguments(model, x, hx)
    torch.library.opcheck(rnn, (*call, None, []))
    wanted = [t.requires_grad for t in (x, *hx, *model.parameters())]
    with torch.no_grad():
        grad, *_, tape = rnn(*call, None, [])
        call = arguments(model, x.detach(), hx)
    detached = (*call[:3], [weight.detach() for weight in call[3]], *call[4:])
    torch.library.opcheck(rnn_backward, ([grad, None, None], wanted, *detached, None, tape))


def test_is_marked_as_random() -> None:
    assert torch.Tag.nondeterministic_seeded in rnn.tags
    assert torch.Tag.nondeterministic_seeded not in rnn_backward.tags


def test_frozen_is_an_identity_that_shares_memory() -> None:
    frozen = torch.ops.graphopt.frozen.default
    x = torch.randn(3, 4).t()
    y = frozen(x)
    assert y.is_set_to(x)
    assert y is not x
    assert frozen(torch.empty(2, device="meta")).device.type == "meta"
    with FakeTensorMode() as mode:
        assert frozen(mode.from_tensor(x)).stride() == x.stride()
