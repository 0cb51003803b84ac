"""The eager backend writes running statistics where they are, and takes them back on an error."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.model.controller import controller_of
from graphopt.runtime.backends.norms import write_statistics
from graphopt.runtime.engine.halves import Halves, split
from graphopt.runtime.engine.written import Before, written_inputs

aten = torch.ops.aten


class Net(nn.Module):
    """Norms around a lookup that can fail behind them."""

    def __init__(self, momentum: float | None = 0.1, reused: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3, momentum=momentum), nn.BatchNorm1d(3)
        self.again = self.first if reused else nn.BatchNorm1d(3)
        self.table, self.head = nn.Embedding(5, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        h = self.first(x).relu() + self.table(ids)
        return self.head(self.again(h))


X, IDS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5


def _halves(model: nn.Module, *args: Any) -> Halves:
    from functorch.compile import default_partition

    graph = capture(model, args).graph
    return write_statistics(
        split(graph.module, graph.signature, default_partition), graph.signature
    )


def _norms(halves: Halves) -> list[Any]:
    kinds = (
        aten._native_batch_norm_legit_functional.default,
        aten._native_batch_norm_legit.default,
    )
    return [n.target for n in halves.forward.graph.nodes if n.target in kinds]


def test_the_forward_as_text() -> None:
    halves = _halves(nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()), X)
    lines = [line.split(";")[0].strip() for line in halves.forward.code.splitlines()]
    assert [line for line in lines if "aten" in line] == [
        "_native_batch_norm_legit_default = torch.ops.aten._native_batch_norm_legit.default("
        "primals_1, primals_5, primals_6, primals_3, primals_4, True, 0.1, 1e-05)",
        "tanh = torch.ops.aten.tanh.default(getitem)",
        "detach = torch.ops.aten.detach.default(tanh)",
        "_foreach_add__scalar = torch.ops.aten._foreach_add_.Scalar([primals_2], 1)",
    ]
    assert halves.written == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    assert set(written_inputs(halves.forward.graph)) == {1, 2, 3}


def test_statistics_that_two_norms_renew_stay_results() -> None:
    halves = _halves(Net(reused=True), X, IDS)
    assert _norms(halves) == [aten._native_batch_norm_legit_functional.default] * 2
    assert not halves.written


def test_backward_reads_no_running_statistics() -> None:
    halves = _halves(Net(), X, IDS)
    norms = halves.backward.graph.find_nodes(
        op="call_function", target=aten.native_batch_norm_backward.default
    )
    assert norms
    assert all(n.args[3:5] == (None, None) for n in norms)


def _step(model: nn.Module, ids: Tensor = IDS) -> None:
    torch.manual_seed(1)
    model(X, ids).square().sum().backward()


@settings(max_examples=8)
@given(
    momentum=st.sampled_from([0.1, 1.0, None]),
    reused=st.booleans(),
    frozen=st.booleans(),
    untracked=st.booleans(),
    steps=st.integers(1, 3),
)
def test_buffers_and_gradients_are_those_of_eager(
    momentum: float | None, reused: bool, frozen: bool, untracked: bool, steps: int
) -> None:
    torch.manual_seed(0)
    plain = Net(momentum, reused)
    if frozen:
        plain.first.eval()
    if untracked:
        plain.again = nn.BatchNorm1d(3, track_running_stats=False)
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for _ in range(steps):
        for model in (plain, ours):
            _step(model)
    expected = dict(plain.named_buffers()) | {n: p.grad for n, p in plain.named_parameters()}
    actual = dict(ours.named_buffers()) | {n: p.grad for n, p in ours.named_parameters()}
    for name, value in expected.items():
        assert (value is None and actual[name] is None) or torch.equal(value, actual[name]), name


def test_two_forwards_before_their_backwards() -> None:
    plain = Net()
    ours = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for model in (plain, ours):
        (model(X, IDS).sum() + model(2 * X, IDS).square().sum()).backward()
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        if a.grad is not None:
            assert torch.equal(a.grad, b.grad), name
    assert torch.equal(plain.first.running_var, ours.first.running_var)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def _unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_a_forward_that_raises_leaves_the_statistics() -> None:
    model = graphopt.optimize(Net(), backend="eager")
    _step(model)
    before = _buffers(model)
    with pytest.raises(IndexError, match="index out of range in self"):
        _step(model, IDS + 3)
    assert _unchanged(model, before)
    _step(model)
    assert not _unchanged(model, before)


def test_an_error_around_the_forward_leaves_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphopt.optimize(Net(), backend="eager")
    _step(model)
    engine, before = controller_of(model).variants[0].engine, _buffers(model)
    inner = engine.forward

    def fails(step: Any, inputs: list[Any]) -> Any:
        inner(step, inputs)
        assert not _unchanged(model, before)
        raise ValueError("behind the forward")

    monkeypatch.setattr(engine, "forward", fails)
    with pytest.raises(ValueError, match="behind the forward"):
        _step(model)
    assert _unchanged(model, before)


def test_values_of_all_kinds_are_restored() -> None:
    kinds = [torch.tensor(3), torch.randn(4), torch.randn(2, 3), torch.tensor(2.5), torch.zeros(0)]
    kinds += [torch.randn(2, 3).t(), torch.tensor([True, False]), torch.tensor(7)]
    wanted = [t.clone() for t in kinds]
    before = Before(kinds)
    for tensor in kinds:
        tensor.zero_()
    before.restore()
    assert all(torch.equal(a, b) for a, b in zip(kinds, wanted, strict=True))
