"""Numbers that change from call to call: inputs of the graph, with the bits of eager."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.model.controller import controller_of
from graphopt.model.surface import restore
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

FLOATS = (0.7, 1.3, 0.35, 2.5, 0.9, 0.05, 1.0, 2.0, 0.5)
WHOLE = (5, 7, 2, 11, 3, 8, 4)


class Body(nn.Module):
    """Operators that take a number; each result is an output."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lin = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(40, 4))
        self.drop = nn.Dropout(0.3)
        self.body = body

    def forward(self, x: Tensor, t: Any) -> Any:
        return self.body(self, self.lin(x), t)


def _results(model: nn.Module, output: Any) -> list[Tensor]:
    outputs = output if isinstance(output, tuple) else (output,)
    loss = torch.stack([o.square().sum() for o in outputs if o.requires_grad]).sum()
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return [*outputs, *grads]


def _same(left: Sequence[Any], right: Sequence[Any]) -> None:
    assert len(left) == len(right)
    for position, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), position


def _optimized(make: Callable[[], nn.Module], **how: Any) -> tuple[nn.Module, nn.Module]:
    model = graphopt.optimize(make(), backend="eager", **how)
    plain = copy.deepcopy(model)
    restore(plain)
    return model, plain


def _follow(
    make: Callable[[], nn.Module],
    values: Sequence[Any],
    call: Callable[[nn.Module, Tensor, Any], Any] = lambda m, x, value: m(x, value),
    **how: Any,
) -> nn.Module:
    """Train with one value after the other, beside eager."""
    model, plain = _optimized(make, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"\w+ was captured 4 times")
        for step, value in enumerate(values):
            x = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
            results = []
            for m in (model, plain):
                m.zero_grad()
                torch.manual_seed(step)
                results.append(_results(m, call(m, x, value)))
            _same(*results)
    return model


def _made(model: nn.Module) -> int:
    return controller_of(model).made


FLOAT: dict[str, Callable[[Any, Tensor, float], Any]] = {
    "arithmetic": lambda m, h, t: (
        h * t, h / t, t - h, t / (h.abs() + 1), (h.abs() + 1) ** t, h.sum() * t + h.mean(),
        torch.lerp(h, h.exp(), t), torch.add(h, h.exp(), alpha=t), torch.addcmul(h, h, h, value=t),
        h % t, -h.square().mean() * t,
    ),
    "activations": lambda m, h, t: (
        F.softplus(h, beta=t), F.leaky_relu(h, t), F.elu(h, t), h.clamp(-t, t), h.clamp(max=t),
        F.threshold(h, t, t), torch.where(h > t, h, h * 2), h.masked_fill(h > 0, t),
        F.softmax(h / t, -1),
    ),
    "losses": lambda m, h, t: (
        F.smooth_l1_loss(h, m.lin.weight[:3], beta=t),
        F.huber_loss(h, torch.zeros(3, 4), delta=t, reduction="sum"),
        F.cross_entropy(h, torch.tensor([0, 1, 2]), label_smoothing=t / 4),
        F.cross_entropy(h, torch.tensor([0, -100, 2]), label_smoothing=t / 4, reduction="none"),
    ),
    "dropout": lambda m, h, t: (F.dropout(h, t / 4), F.gumbel_softmax(h, tau=t)),
    "tensors": lambda m, h, t: (
        h + torch.full((4,), t), h * torch.tensor(t), h + torch.zeros(4).fill_(t),
        h * torch.linspace(0, t, 4), h + torch.randn(4) * t,
    ),
    "python": lambda m, h, t: (
        h * math.sin(t), h * max(t, 0.8), h * math.exp(-t), h * (1 - t) ** 2, h * abs(t - 1),
        h * (t if t > 0.2 else 0.2),
    ),
}  # fmt: skip
INTEGER: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "arithmetic": lambda m, h, t: (
        h * t, h / t, (h.abs() + 1) ** t, h * 0.9**t, h * min(1.0, t / 10), h.sum() * t,
        h * math.cos(t / 3), h + torch.cos(t * torch.arange(4)),
    ),
    "indexing": lambda m, h, t: (
        h + m.table[t], h + m.table[-t], h + m.table[t : t + 3], m.table[:t].sum(0) + h,
        h + F.embedding(torch.tensor([t]), m.table), m.table.narrow(0, t, 3) + h,
    ),
    "sizes": lambda m, h, t: (
        h.sum() * torch.arange(t), h + torch.full((3, 1), t), h + torch.full((3, 1), float(t)),
        h[0].expand(t, 4) * 2, h.sum() + torch.zeros(t, 2), m.table.topk(t, 0)[0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FLOAT))
def test_floats(name: str) -> None:
    model = _follow(lambda: Body(FLOAT[name]), FLOATS)
    assert _made(model) <= 3
    assert "numbers    t" in model.explain()


@pytest.mark.parametrize("name", list(INTEGER))
def test_whole_numbers(name: str) -> None:
    model = _follow(lambda: Body(INTEGER[name]), WHOLE)
    assert _made(model) == 2
    assert "numbers    t" in model.explain()


@pytest.mark.parametrize("name", [*(f"float {n}" for n in FLOAT), *(f"int {n}" for n in INTEGER)])
def test_texts_and_invariants(name: str) -> None:
    kind, name = name.split()
    body, value = (FLOAT[name], 0.7) if kind == "float" else (INTEGER[name], 5)
    graph = capture(Body(body), (torch.randn(3, 4), value), numbers={"L['t']"}).graph
    verify(graph)
    text = print_graph(graph)
    parsed = parse_graph(text)
    assert print_graph(parsed) == text
    verify(parsed)
    assert '"t"' in text


@dataclass
class Settings:
    scale: float = 1.0


SCALE = 1.0


class Everywhere(Body):
    """Numbers of all places change at the same time."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)
        self.temp = 1.0
        self.options: dict[str, Any] = {"rate": 1.0}
        self.settings = Settings()
        self.steps = 0

    def forward(self, x: Tensor, weight: float = 1.0, *, shift: float = 0.0) -> Tensor:
        self.steps += 1
        h = self.drop(self.lin(x)) / self.temp * self.options["rate"] + self.settings.scale
        return h * SCALE * weight + shift + self.steps


def _everywhere(m: nn.Module, x: Tensor, t: float) -> Tensor:
    m.temp, m.options["rate"], m.settings.scale = t, t + 0.1, t + 0.2
    m.drop.p = t / 5
    global SCALE
    SCALE = t + 0.3
    return m(x, t + 0.4, shift=t + 0.5) if t > 1 else m(x)


def test_numbers_of_all_places() -> None:
    model = _follow(Everywhere, FLOATS, _everywhere)
    assert model.steps == len(FLOATS)
    assert _made(model) <= 3
    said = [line for line in model.explain().splitlines() if "numbers  " in line][-1]
    for name in ("self.temp", "self.options['rate']", "self.settings.scale", "self.drop.p"):
        assert name in said
    for name in ("SCALE", "weight", "shift", "self.steps"):
        assert name in said


def test_each_backward_has_the_number_of_its_forward() -> None:
    body = FLOAT["arithmetic"]
    model, plain = _optimized(lambda: Body(body))
    for m in (model, plain):
        for t in (0.4, 0.6):
            m(torch.ones(3, 4), t)
    results = []
    for m in (model, plain):
        m.zero_grad()
        first, second = (m(torch.full((3, 4), t), t) for t in (0.7, 1.9))
        results.append([*_results(m, second), *_results(m, first)])  # which accumulates
    _same(*results)
    assert _made(model) == 2


def test_numbers_that_change_whenever_sizes_do() -> None:
    model, plain = _optimized(lambda: Body(lambda m, h, t: (h * t, F.softplus(h, beta=t))))
    for step, (size, t) in enumerate(zip((3, 5, 8, 4, 7), FLOATS, strict=False)):
        x = torch.randn(size, 4, generator=torch.Generator().manual_seed(step))
        for m in (model, plain):
            m.zero_grad()
        _same(*(_results(m, m(x, t)) for m in (model, plain)))
    assert _made(model) == 2


def test_training_evaluation_and_no_grad() -> None:
    def call(m: nn.Module, x: Tensor, t: float) -> Any:
        with torch.no_grad():
            seen = m.eval()(x, t)
            m.train()(x, t)
        return (*m(x, t), *(s.detach() for s in seen))

    body = FLOAT["dropout"]
    model = _follow(lambda: Body(body), FLOATS, call)
    assert _made(model) <= 6


@settings(max_examples=15, deadline=None)
@given(st.floats(-1e3, 1e3, allow_subnormal=False), st.integers(-50, 50))
def test_any_values(t: float, n: int) -> None:
    _same(*(_results(m, m(torch.ones(3, 4), (t, n))) for m in _any()))


_PAIR: list[tuple[nn.Module, nn.Module]] = []


def _any() -> tuple[nn.Module, nn.Module]:
    if not _PAIR:
        body = lambda m, h, t: (h * t[0], h + t[0] * t[1], h * (t[1] / 3), h.sum() * t[0] - t[1])  # noqa: E731
        _PAIR.append(_optimized(lambda: Body(body)))
        for pair in ((0.5, 3), (0.25, 4)):
            _PAIR[0][0](torch.ones(3, 4), pair)
    for m in _PAIR[0]:
        m.zero_grad()
    assert _made(_PAIR[0][0]) == 2
    return _PAIR[0]


def test_what_decides_structure_is_a_condition() -> None:
    def body(m: Any, h: Tensor, t: Any) -> Tensor:
        for _ in range(t["layers"]):
            h = m.lin(h)
        h = h.relu() if t["flag"] else h
        return h * t["scale"] if t["how"] == "times" else h + t["scale"]

    def option(layers: int, flag: bool, how: str) -> list[dict[str, Any]]:
        return [{"layers": layers, "flag": flag, "how": how, "scale": s} for s in FLOATS[:4]]

    calls = [*option(1, True, "times"), *option(1, False, "plus"), *option(2, False, "plus")]
    model = _follow(lambda: Body(body), calls)
    assert _made(model) <= 5


def test_numbers_of_which_torch_makes_constants_leave_the_others_alone() -> None:
    def body(m: Any, h: Tensor, t: Any) -> Tensor:
        return F.layer_norm(h, (4,), eps=t[0]) * t[1]

    model = _follow(lambda: Body(body), [(1e-5, 1.0), *((1e-3, t) for t in FLOATS)])
    assert _made(model) == 2
    assert "numbers    t[1]" in model.explain()


def test_a_dropout_that_is_switched_off_and_on() -> None:
    body = lambda m, h, t: F.dropout(h, t)  # noqa: E731
    model = _follow(lambda: Body(body), [0.0, 0.1, 0.3, 0.0, 1.0, 0.2, 0.5, 1.0, 0.0])
    assert _made(model) <= 4


def test_a_crop_by_a_ratio_of_a_length_that_varies() -> None:
    class Crop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin = nn.Linear(4, 4)
            self.ratio = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(x)[:, : int(x.shape[1] * self.ratio)].cumsum(1)

    def call(m: nn.Module, _: Tensor, value: tuple[int, float]) -> Any:
        length, m.ratio = value
        return m(torch.ones(2, length, 4))

    values = [(10, 0.5), (12, 0.5), (14, 0.7), (9, 0.6), (20, 0.55), (31, 0.9), (17, 0.33)]
    model = _follow(Crop, values, call)
    assert _made(model) <= 3


@pytest.mark.parametrize("passes", ["cleanup", "group_gradients", "schedule", "kfac", "precision"])
def test_passes(passes: str) -> None:
    def body(m: Any, h: Tensor, t: float) -> Any:
        return m.drop(h).relu() * t + (1 + 2) * t, h.square().mean() * t

    model, plain = _optimized(lambda: Body(body), passes=passes)
    for step, t in enumerate(FLOATS):
        outputs = []
        for m in (model, plain):
            m.zero_grad()
            torch.manual_seed(step)
            outputs.append(m(torch.ones(3, 4), t))
            outputs[-1][1].backward()
        torch.testing.assert_close(*outputs, rtol=2e-2, atol=2e-2)
    assert _made(model) == 2
