"""Served models: which bits an answer has, against oracles that know no batches."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError, ServingError
from graphopt.model.controller import controller_of
from graphopt.runtime.serving import Dispatcher
from tests.serving.gated import PATIENCE


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    @staticmethod
    def request() -> Tensor:
        return torch.randn(3, 6, 6)


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(12, 16, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, frames: Tensor) -> Tensor:
        return F.log_softmax(self.head(self.rnn(frames)[0]), dim=-1)

    @staticmethod
    def request() -> Tensor:
        return torch.randn(7, 12)


class Text(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.heads = nn.Linear(16, 48)
        self.out = nn.Linear(16, 3)

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        q, k, v = self.heads(self.embed(tokens)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return {"logits": self.out(h.transpose(1, 2).flatten(2).mean(1)), "hidden": h}

    @staticmethod
    def request() -> dict[str, Tensor]:
        mask = torch.ones(9, dtype=torch.bool)
        mask[int(torch.randint(4, 9, ())) :] = False
        return {"tokens": torch.randint(50, (9,)), "mask": mask}


KINDS = (Image, Speech, Text)
SIZES = (1, 2, 4, 8)
Served = tuple[Dispatcher, Any, nn.Module]


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """A dispatcher, the optimized model that it serves, and a plain copy of that."""
    torch.manual_seed(0)
    model = request.param().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    plain = copy.deepcopy(model)
    graphopt.optimize(model, passes="cleanup,fold_inference", backend="eager")
    with graphopt.serve(model, model.request(), sizes=SIZES) as dispatcher:
        yield dispatcher, model, plain


def stacked(requests: list[Any]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    if isinstance(requests[0], Tensor):
        return (torch.stack(requests),), {}
    return (), {key: torch.stack([r[key] for r in requests]) for key in requests[0]}


def at(outputs: Any, i: int) -> Any:
    return outputs[i] if isinstance(outputs, Tensor) else {k: v[i] for k, v in outputs.items()}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Held:
    """Within, a dispatcher is held by a callback in its own thread, so it starts no batch."""

    def __init__(self, dispatcher: Dispatcher, request: object) -> None:
        self._dispatcher, self._request = dispatcher, request
        self._here = threading.current_thread()
        self._started, self._go_on = threading.Event(), threading.Event()

    def _hold(self, _: object) -> None:
        if threading.current_thread() is self._here:  # it was answered already: once more
            self._submit()
            return
        self._started.set()
        assert self._go_on.wait(PATIENCE)

    def _submit(self) -> None:
        self._dispatcher.submit(self._request).add_done_callback(self._hold)

    def __enter__(self) -> None:
        self._submit()
        assert self._started.wait(PATIENCE)

    def __exit__(self, *_: object) -> None:
        self._go_on.set()


@pytest.mark.parametrize("count", range(1, 9))
def test_an_answer_has_the_bits_of_its_row_in_a_batch_of_that_size(
    served: Served, count: int
) -> None:
    dispatcher, model, _ = served
    requests = [model.request() for _ in range(count)]
    others = [model.request() for _ in range(8)]  # in the rows that are padding
    size = next(s for s in SIZES if s >= count)
    before = dispatcher.stats().batches
    with Held(dispatcher, model.request()):
        futures = [dispatcher.submit(r) for r in requests]
    answers = [f.result(PATIENCE) for f in futures]
    if size > 1:  # one batch held all of them
        assert dispatcher.stats().batches[size] == before[size] + 1
    args, kwargs = stacked([*requests, *others][:size])
    with torch.no_grad():
        expected = model(*args, **kwargs)
    assert all(equal(answer, at(expected, i)) for i, answer in enumerate(answers))


@pytest.mark.parametrize("kind", KINDS)
def test_without_rewrites_the_bits_are_those_of_plain_pytorch(kind: Any) -> None:
    torch.manual_seed(1)
    model = kind().eval()
    plain = copy.deepcopy(model)
    graphopt.optimize(model, passes="cleanup", backend="eager")
    requests = [model.request() for _ in range(4)]
    with graphopt.serve(model, requests[0], sizes=(1, 4)) as dispatcher:
        with Held(dispatcher, requests[0]):
            futures = [dispatcher.submit(r) for r in requests[:3]]
        args, kwargs = stacked(requests)
        with torch.no_grad():
            expected = plain(*args, **kwargs)
        for i, future in enumerate(futures):
            assert equal(future.result(PATIENCE), at(expected, i))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), counts=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_answers_are_those_of_the_plain_model_one_at_a_time(
    served: Served, seed: int, counts: list[int]
) -> None:
    dispatcher, model, plain = served
    torch.manual_seed(seed)
    callers = [[model.request() for _ in range(count)] for count in counts]
    answers: list[list[Any]] = [[] for _ in callers]

    def call(i: int) -> None:
        futures = [dispatcher.submit(request, wait=True) for request in callers[i]]
        answers[i] = [future.result(PATIENCE) for future in futures]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(len(callers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    for requests, found in zip(callers, answers, strict=True):
        assert len(found) == len(requests)
        for request, answer in zip(requests, found, strict=True):
            args, kwargs = stacked([request])
            with torch.no_grad():
                torch.testing.assert_close(
                    answer, at(plain(*args, **kwargs), 0), rtol=1e-5, atol=1e-5
                )


def test_sizes_share_graphs(served: Served) -> None:
    dispatcher, model, _ = served
    for future in [dispatcher.submit(model.request()) for _ in range(60)]:
        future.result(PATIENCE)
    controller = controller_of(model)
    assert controller is not None
    assert len(controller.variants) == controller.made
    assert controller.made == 2  # for one request, and for several
    assert {variant.entry.level for variant in controller.variants} == {"inference"}


def test_a_plain_model_can_be_served() -> None:
    model = nn.Linear(3, 2).eval()
    with graphopt.serve(model, torch.ones(3), sizes=(2,)) as dispatcher:
        x = torch.randn(3)
        with torch.no_grad():
            assert torch.equal(dispatcher(x), model(torch.stack([x, x]))[0])  # type: ignore[arg-type]


@pytest.mark.slow
def test_inductor_compiles_in_the_thread_that_computes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend="inductor")
    x = torch.randn(8)
    with graphopt.serve(model, x, sizes=(4,)) as dispatcher, torch.no_grad():
        torch.testing.assert_close(dispatcher(x), plain(x[None])[0])


class _Mixes(nn.Linear):
    def __init__(self, how: Any) -> None:
        super().__init__(4, 4)
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(super().forward(x))


@pytest.mark.parametrize(
    "how",
    [
        lambda h: h - h.mean(0),
        lambda h: torch.softmax(h, 0),
        lambda h: h / h.abs().amax(),
        lambda h: F.dropout(h, 0.5, training=True),
        lambda h: (h, h.roll(1, 0)),
    ],
    ids=["mean", "softmax", "scale", "chance", "second"],
)
def test_models_that_mix_requests_are_refused(how: Any) -> None:
    model = graphopt.optimize(_Mixes(how).eval(), backend="eager", verify="off")
    with pytest.raises(ServingError, match=r"batch size 4, output [01] of a request depends on"):
        graphopt.serve(model, torch.randn(4), sizes=(1, 4))


def test_a_model_that_cannot_be_tried_reversed_says_so() -> None:
    def run(x: Tensor) -> Tensor:
        if bool((x[:, 0] > x[:, 1]).any()):
            raise ValueError("not ascending")
        return x

    with (
        pytest.warns(UserWarning, match="could not be tried at batch size 2.*not ascending"),
        Dispatcher(run, torch.tensor([0.0, 1.0]), sizes=(1, 2)) as dispatcher,
    ):
        dispatcher(torch.tensor([3.0, 4.0]))


class _Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: nn.BatchNorm1d(4), {}, "BatchNorm1d is in training mode"),
        (lambda: nn.Sequential(nn.Dropout()).eval().append(nn.Dropout()), {}, "at: module '1'"),
        (
            lambda: graphopt.optimize(nn.Linear(4, 4).eval()),
            {"sizes": range(1, 10)},
            "9 sizes need as many captures, and 8 are kept",
        ),
        (lambda: nn.Linear(4, 4).forward, {}, "serve needs an nn.Module, and got a method"),
        (
            lambda: graphopt.optimize(_Counts().eval(), backend="eager"),
            {"sizes": (1,)},
            "forward writes to 'calls'",
        ),
    ],
    ids=["training", "part", "sizes", "function", "writes"],
)
def test_bad_arguments(model: Any, arguments: dict[str, Any], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(ArgumentError, match=message):
        graphopt.serve(model(), torch.randn(4), **arguments)
    assert threading.active_count() == before


def test_training_mode_while_it_is_served_is_an_error_of_requests() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).eval()
    with graphopt.serve(model, torch.ones(4), sizes=(1,)) as dispatcher:
        model.train()
        with pytest.raises(ServingError, match="put into training mode while it is served"):
            dispatcher(torch.ones(4))
        model.eval()
        dispatcher(torch.ones(4))
