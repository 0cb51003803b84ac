"""Recurrent networks and CTC losses from Dynamo to the joint graph, bit-equal to eager."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.capture import Capture, capture
from graphopt.capture.opaque import capturable_leaves, replace_leaves
from graphopt.plan import Role

aten, ops = torch.ops.aten, torch.ops.graphopt
LEAVES = [aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input]
LEAVES += [aten.ctc_loss.Tensor, aten.ctc_loss.IntList]


class Tagger(nn.Module):
    """A recurrent network between two projections."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below = nn.Linear(3, 4)
        self.rnn = kind(4, 6, num_layers=2, **options)
        self.above = nn.Linear(12 if self.rnn.bidirectional else 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.rnn(self.below(x))[0]).log_softmax(-1)


class Stateful(Tagger):
    """Takes and returns the state as well."""

    def forward(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        output, hidden = self.rnn(self.below(x), state if len(state) == 2 else state[0])
        return (self.above(output), *(hidden if len(state) == 2 else [hidden]))


class Speech(Tagger):
    """Ends in a CTC loss."""

    def __init__(self, kind: type[nn.RNNBase], loss: Callable[..., Tensor] = F.ctc_loss) -> None:
        super().__init__(kind, dropout=0.5, bidirectional=True)
        self.loss = loss

    def forward(self, x: Tensor, targets: Tensor, inputs: Any, lengths: Any) -> Tensor:
        return self.loss(super().forward(x), targets, inputs, lengths)


def speech() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, targets = torch.randn(7, 2, 3), torch.randint(1, 5, (2, 3))
    return x, targets, torch.tensor([7, 6]), torch.tensor([3, 2])


def run(captured: Capture, cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        results = fx.Interpreter(captured.graph.module).run(*captured.inputs, *cotangents)
    return {str(slot): r for slot, r in zip(captured.graph.signature.outputs, results, strict=True)}


def assert_step_is_eager(model: nn.Module, inputs: tuple[Any, ...]) -> Capture:
    """The joint graph gives eager's outputs and eager's gradient of everything."""
    captured = capture(model, inputs)
    assert captured.route == "dynamo"
    assert captured.holds(model, *inputs)
    torch.manual_seed(5)
    outputs = model(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [torch.randn_like(output) for output in outputs]
    names = captured.graph.signature.names(Role.GRAD)
    known = dict(model.named_parameters())
    tensors = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    wanted = [known[name] for name in names if name in known]
    assert len(names) == len(wanted) + len(tensors)
    grads = torch.autograd.grad(outputs, [*wanted, *tensors], cotangents)

    torch.manual_seed(5)
    results = run(captured, cotangents)
    for i, output in enumerate(outputs):
        assert torch.equal(results[f"output '{i}'"], output)
    for name, grad in zip([n for n in names if n in known], grads, strict=False):
        assert torch.equal(results[f"grad {name!r}"], grad), name
    found = [results[f"grad {name!r}"] for name in names if name not in known]
    for actual, expected in zip(found, grads[len(wanted) :], strict=True):
        assert torch.equal(actual, expected)
    return captured


def targets(graph: fx.Graph) -> Counter[Any]:
    return Counter(node.target for node in graph.nodes if node.op == "call_function")


# -- from Dynamo to the joint graph ----------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [False, True])
def test_tagger(kind: type[nn.RNNBase], batch_first: bool) -> None:
    model = Tagger(kind, dropout=0.5, batch_first=batch_first, bidirectional=True)
    captured = assert_step_is_eager(model, (torch.randn(2, 7, 3),))
    counts = targets(captured.graph.fx)
    assert counts[ops.rnn.default] == counts[ops.rnn_backward.default] == 1


@pytest.mark.parametrize(("kind", "count"), [(nn.LSTM, 2), (nn.GRU, 1)])
def test_state_goes_in_and_out(kind: type[nn.RNNBase], count: int) -> None:
    state = [torch.randn(2, 3, 6, requires_grad=True) for _ in range(count)]
    assert_step_is_eager(Stateful(kind), (torch.randn(5, 3, 3, requires_grad=True), *state))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_unbatched_sequence(kind: type[nn.RNNBase]) -> None:
    assert_step_is_eager(Tagger(kind), (torch.randn(5, 3),))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_speech(kind: type[nn.RNNBase]) -> None:
    captured = assert_step_is_eager(Speech(kind), speech())
    counts = targets(captured.graph.fx)
    assert counts[ops.ctc_loss.default] == counts[ops.ctc_loss_backward.default] == 1
    assert len(captured.notes) == 2


@pytest.mark.parametrize(
    "loss",
    [
        nn.CTCLoss(),
        nn.CTCLoss(blank=4, reduction="sum", zero_infinity=True),
        lambda p, t, i, n: F.ctc_loss(p, t, i, n, 0, "none"),
        lambda p, t, i, n: F.ctc_loss(p, t, input_lengths=i, target_lengths=n, zero_infinity=True),
        torch.ctc_loss,
        lambda p, t, i, n: torch.ctc_loss(p, t, input_lengths=i, target_lengths=n, reduction=1),
        lambda p, t, i, n: F.ctc_loss(p, t, (7, 6), (3, 2)),
        lambda p, t, i, n: torch.ctc_loss(p, t, [7, 6], [3, 2], 0, 2),
    ],
)
def test_every_form_of_ctc_loss(loss: Callable[..., Tensor]) -> None:
    assert_step_is_eager(Speech(nn.RNN, loss), speech())


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_between_layers_stays(kind: type[nn.RNNBase]) -> None:
    model, x = Tagger(kind, dropout=0.5), torch.randn(5, 2, 3)
    captured = capture(model, (x,))
    cotangent = torch.ones(5, 2, 5)

    def seeded(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return run(captured, [cotangent])

    first, again, other = seeded(1), seeded(1), seeded(2)
    for name, value in first.items():
        assert torch.equal(value, again[name])
    assert not torch.equal(first["output '0'"], other["output '0'"])
    assert not torch.equal(first["grad 'rnn.weight_ih_l0'"], other["grad 'rnn.weight_ih_l0'"])


@pytest.mark.parametrize("mode", ["eval", "no_grad"])
def test_without_backward_nothing_is_wanted(mode: str) -> None:
    model, x = Tagger(nn.LSTM, dropout=0.5), torch.randn(5, 2, 3)
    model.train(mode != "eval")
    with torch.no_grad():
        captured = capture(model, (x,))
        torch.manual_seed(1)
        expected = model(x)
        torch.manual_seed(1)
        assert torch.equal(run(captured, [])["output '0'"], expected)
    (node,) = captured.graph.fx.find_nodes(op="call_function", target=ops.rnn.default)
    assert node.args[-1] == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_autocast_is_captured(kind: type[nn.RNNBase]) -> None:
    model = Tagger(kind)
    with torch.autocast("cpu", torch.bfloat16):
        captured = assert_step_is_eager(model, (torch.randn(5, 2, 3),))
    (node,) = captured.graph.fx.find_nodes(op="call_function", target=ops.rnn.default)
    assert torch.bfloat16 in node.args


def test_capture_does_not_unroll() -> None:
    short, long = (
        len(capture(Tagger(nn.GRU), (torch.randn(time, 2, 3),)).graph) for time in (2, 300)
    )
    assert short == long


# -- nothing is left behind ------------------------------------------------------------------------


def _state() -> tuple[Any, ...]:
    kernels = tuple(tuple(sorted(map(str, op.py_kernels.items()))) for op in LEAVES)
    return kernels, torch._dynamo.config.allow_rnn


def test_everything_is_put_back() -> None:
    before = _state()
    with capturable_leaves():
        assert _state() != before
        with capturable_leaves():
            pass
    assert _state() == before
    with pytest.raises(KeyError), capturable_leaves():
        raise KeyError
    assert _state() == before


class _Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func.namespace != "prim"  # not questions about a tensor
        return func(*args, **(kwargs or {}))


def test_tracing_outside_is_unaffected() -> None:
    def count() -> int:
        with FakeTensorMode(), enable_python_dispatcher():
            model, x = nn.GRU(3, 4), torch.empty(20, 2, 3)
            with _Count() as mode:
                model(x)
        return mode.calls

    before = count()
    assert before > 100
    with capturable_leaves():
        assert count() < 10
    assert count() == before


def test_guards_hold_outside_and_still_guard() -> None:
    model, x = Tagger(nn.LSTM), torch.randn(5, 2, 3)
    captured = capture(model, (x,))
    assert captured.holds(model, x)
    assert not captured.holds(model, torch.randn(6, 2, 3))
    model.rnn.dropout = 0.25
    assert not captured.holds(model, x)


# -- rewriting -------------------------------------------------------------------------------------


def _forward(build: Callable[[fx.Graph, Callable[..., fx.Node]], fx.Node]) -> fx.GraphModule:
    """A torch-level graph with fake values, as Dynamo makes it."""
    mode, graph = FakeTensorMode(), fx.Graph()

    def value(*shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = graph.placeholder(f"x{len(graph.nodes)}")
        with mode:
            node.meta["example_value"] = torch.empty(shape, dtype=dtype)
        return node

    graph.output((build(graph, value),))
    return fx.GraphModule(nn.Module(), graph)


def test_rewritten_values_stay_right() -> None:
    def build(graph: fx.Graph, value: Callable[..., fx.Node]) -> fx.Node:
        x, h, c = value(5, 2, 3), value(1, 2, 4), value(1, 2, 4)
        weights = [value(16, 3), value(16, 4)]
        options = {"bidirectional": False, "batch_first": False, "train": True, "dropout": 0.0}
        lstm = graph.call_function(
            torch.lstm, (x, (h, c), weights, False), {"num_layers": 1, **options}
        )
        lstm.meta["example_value"] = ()
        return graph.call_function(operator.getitem, (lstm, 2))

    module = _forward(build)
    assert replace_leaves(module) == ("lstm",)
    module.graph.lint()
    (node,) = module.graph.find_nodes(op="call_function", target=ops.rnn.default)
    shapes = [tuple(example.shape) for example in node.meta["example_value"]]
    assert shapes == [(5, 2, 4), (1, 2, 4), (1, 2, 4), (0,)]
    torch.manual_seed(0)
    real = [
        torch.randn(p.meta["example_value"].shape)
        for p in module.graph.find_nodes(op="placeholder")
    ]
    x, h, c, *weights = real
    expected = torch.lstm(x, (h, c), weights, False, 1, 0.0, True, False, False)[2]
    assert torch.equal(module(*real)[0], expected)


def test_ctc_node_keeps_its_name_and_value() -> None:
    def build(graph: fx.Graph, value: Callable[..., fx.Node]) -> fx.Node:
        lengths = value(2, dtype=torch.int64), value(2, dtype=torch.int64)
        call = (value(5, 2, 3), value(2, 4, dtype=torch.int64), *lengths)
        node = graph.call_function(F.ctc_loss, call, {"reduction": "none"}, name="loss")
        node.meta["example_value"] = "what Dynamo saw"
        return node

    module = _forward(build)
    assert replace_leaves(module) == ("ctc_loss",)
    module.graph.lint()
    (result,) = module.graph.output_node().args[0]
    assert (result.name, result.meta["example_value"]) == ("loss", "what Dynamo saw")
    loss, tape = result.args[0].meta["example_value"]
    assert (loss.shape, tape.shape) == ((2,), (0,))


def test_other_graphs_are_left_alone() -> None:
    module = _forward(lambda graph, value: graph.call_function(torch.relu, (value(2),)))
    code = module.code
    assert replace_leaves(module) == ()
    assert module.code == code


def test_descriptions_name_the_module() -> None:
    assert capture(Speech(nn.GRU), speech()).notes == (
        "gru in rnn runs as one opaque operator",
        "ctc_loss runs as one opaque operator",
    )
