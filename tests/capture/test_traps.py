"""The silent traps of capturing training steps, each with proof that graphopt does not fall in.

Every one of these makes some route through PyTorch's own capture compute wrong gradients, or run a
graph that was made for something else, without a word.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphopt

Loss = Callable[[object], Tensor]


def _gradients(model: nn.Module, *inputs: Tensor) -> tuple[list[Tensor | None], Tensor]:
    torch.manual_seed(7)
    model.zero_grad()
    output = model(*inputs)
    output.square().mean().backward()
    return [p.grad for p in model.parameters()], output.detach()


def _assert_equal_to_eager(model: nn.Module, *inputs: Tensor) -> nn.Module:
    optimized = graphopt.optimize(copy.deepcopy(model), backend="eager")
    _assert_same_step(model, optimized, *inputs)
    return optimized


def _assert_same_step(model: nn.Module, optimized: nn.Module, *inputs: Tensor) -> None:
    expected, output = _gradients(model, *inputs)
    actual, own = _gradients(optimized, *inputs)
    assert torch.equal(output, own)
    for (name, _), a, b in zip(model.named_parameters(), expected, actual, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    for (name, a), (_, b) in zip(model.named_buffers(), optimized.named_buffers(), strict=True):
        assert torch.equal(a, b), name


class TripleBackward(torch.autograd.Function):
    """Its backward is deliberately not the derivative of its forward."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.sin()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return 3 * g


def test_custom_autograd_function_keeps_its_backward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return TripleBackward.apply(self.lin(x))

    _assert_equal_to_eager(Model(), torch.randn(3, 4))


def test_what_dynamo_refuses_is_refused() -> None:
    """Other ways in (torch.export) would drop the backward of a custom autograd.Function."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return TripleBackward.apply(self.lin(x))

    model = graphopt.optimize(Model(), backend="eager")
    with pytest.raises(graphopt.CaptureError, match=r"graph_break\(\)"):
        model(torch.randn(3, 4))


def test_checkpointing_with_dropout() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def _inner(self, x: Tensor) -> Tensor:
            return F.dropout(torch.relu(self.a(x)), 0.5, self.training)

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self._inner, x, use_reentrant=False)
            return self.b(F.dropout(h, 0.5, self.training))

    _assert_equal_to_eager(Model(), torch.randn(4, 8))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_between_recurrent_layers(kind: type[nn.LSTM | nn.GRU]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(5, 6, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    optimized = _assert_equal_to_eager(Model(), torch.randn(3, 7, 5))
    x = torch.randn(3, 7, 5)
    torch.manual_seed(0)
    first = optimized(x)
    torch.manual_seed(1)
    assert not torch.equal(first, optimized(x)), "the dropout is gone"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.Linear])
def test_another_batch_size(kind: type[nn.Module]) -> None:
    """A static LSTM graph crashes the process at another batch size; others go silently wrong."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = kind(5, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return h[0] if isinstance(h, tuple) else h

    model = Model()
    optimized = graphopt.optimize(copy.deepcopy(model), backend="eager")
    for batch in (3, 5, 2, 3):
        _assert_same_step(model, optimized, torch.randn(4, batch, 5))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_gradients(causal: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    _assert_equal_to_eager(Model(), torch.randn(2, 9, 16))


def test_in_place_view_writes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lin(x)
            h[:, 0] = h[:, 1] * 2
            h[:, 2:4].mul_(3)
            return h.relu_()

    _assert_equal_to_eager(Model(), torch.randn(3, 6))


def test_eval_after_training_and_back() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 2)
    )
    x = torch.randn(5, 1, 8, 8)
    optimized = _assert_equal_to_eager(model, x)
    for training in (False, True, False):
        model.train(training)
        optimized.train(training)
        _assert_same_step(model, optimized, x)
    model[2].train()  # one submodule only
    optimized[2].train()
    _assert_same_step(model, optimized, x)


def test_input_gradients_appear_when_asked_for() -> None:
    model = nn.Linear(4, 4)
    optimized = _assert_equal_to_eager(model, torch.randn(3, 4))
    x, own = (torch.ones(3, 4, requires_grad=True) for _ in range(2))
    model(x).sum().backward()
    optimized(own).sum().backward()
    assert own.grad is not None
    assert torch.equal(x.grad, own.grad)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_grad_gives_outputs_without_history(mode: Callable[[], object]) -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    optimized = _assert_equal_to_eager(model, x)
    with mode():  # type: ignore[attr-defined]
        out = optimized(x)
    assert not out.requires_grad
    assert torch.equal(out, model(x))
    assert optimized(x).requires_grad


def test_frozen_parameter_gets_its_own_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    optimized = _assert_equal_to_eager(model, x)
    for m in (model, optimized):
        m[0].weight.requires_grad_(False)
    _assert_same_step(model, optimized, x)
    assert optimized[0].weight.grad is None


def test_autocast_gets_its_own_graph() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    optimized = _assert_equal_to_eager(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert optimized(x).dtype == torch.bfloat16
        _assert_same_step(model, optimized, x)
    assert optimized(x).dtype == torch.float32


def test_retain_graph_gives_the_same_gradients_twice() -> None:
    optimized = graphopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), backend="eager")
    loss = optimized(torch.randn(3, 4)).sum()
    weights = list(optimized.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    second = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_absent_tangents_leave_gradients_absent() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.body(x)
            return {"a": self.a(h), "b": self.b(h)}

    optimized = graphopt.optimize(TwoHeads(), backend="eager")
    optimized(torch.randn(3, 4))["a"].sum().backward()
    assert optimized.a.weight.grad is not None
    assert optimized.b.weight.grad is None


def test_parameter_changed_between_forward_and_backward_is_noticed() -> None:
    optimized = graphopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), backend="eager")
    loss = optimized(torch.randn(3, 4)).sum()
    with torch.no_grad():
        optimized[1].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class TanhView(nn.Module):
    """Its result is a view of what the backward needs, or of what it does not need."""

    def __init__(self, needed: bool) -> None:
        super().__init__()
        self.lin, self.needed = nn.Linear(4, 4), needed

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        return (h.tanh() if self.needed else h).view(-1)


def test_changing_an_output_that_the_backward_needs_is_noticed() -> None:
    for model in (TanhView(True), graphopt.optimize(TanhView(True), backend="eager")):
        with pytest.raises(RuntimeError, match=r"in-?place"):
            model(torch.randn(3, 4)).mul_(2).sum().backward()


def test_changing_an_output_that_the_backward_does_not_need_works() -> None:
    model = TanhView(False)
    optimized = graphopt.optimize(copy.deepcopy(model), backend="eager")
    x = torch.randn(3, 4)
    for m in (model, optimized):
        m(x).mul_(2).sum().backward()
    assert torch.equal(model.lin.weight.grad, optimized.lin.weight.grad)
