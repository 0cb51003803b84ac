"""Comparisons that are repeated while a model trains change nothing, and say what they found."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError
from graphopt.model.levels import Verify
from graphopt.model.remembered import key_of
from graphopt.model.surface import report
from graphopt.model.verification import Check
from tests.support.ranks import on_ranks

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 6),
    "batch norm": lambda: nn.BatchNorm1d(6),
    "dropout": lambda: nn.Dropout(0.3),
    "relu": nn.ReLU,
    "layer norm": lambda: nn.LayerNorm(6),
}
EVERY = "sample{every=3}"


def _net(layers: list[str]) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 6), *(LAYERS[name]() for name in layers))


def _trained(
    layers: list[str],
    verify: str,
    passes: str,
    *,
    steps: int = 20,
    bf16: bool = False,
    rank: int = 0,
) -> tuple[dict[str, Tensor], nn.Module]:
    """What training leaves: weights, buffers, states of optimizer, passes and streams."""
    torch.manual_seed(0)
    model = graphopt.optimize(_net(layers), passes=passes, backend="eager", verify=verify)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    torch.manual_seed(1 + rank)
    for step in range(steps):
        if step % 4 == 0:
            optimizer.zero_grad()
        x = torch.randn(8, 6)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
    found = dict(model.state_dict())
    found |= {f"grad {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    found |= {f"pass {n}": t for n, t in graphopt.state_dict(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer {index} {n}": t for n, t in state.items()}
    return {**found, "random": torch.rand(4)}, model


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@settings(max_examples=4, deadline=None)
@given(
    layers=st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4),
    passes=st.sampled_from(["cleanup", "cleanup,kfac{interval=2}"]),
    bf16=st.booleans(),
)
def test_training_has_the_same_bits_with_and_without(
    layers: list[str], passes: str, bf16: bool
) -> None:
    (off, _), (on, _), (sampled, model) = (
        _trained(layers, verify, passes, bf16=bf16) for verify in ("off", "eager", EVERY)
    )
    _same(off, on)
    _same(off, sampled)
    samples = report(model).specialisations[0].samples
    assert samples is not None
    assert (samples.count, samples.every, samples.step, samples.failed) == (6, 3, 19, 0)


def test_an_optimizer_within_the_backward_is_not_stepped() -> None:
    """Hooks on parameters that step an optimizer as soon as a gradient is there."""
    results = []
    for verify in ("off", EVERY):
        torch.manual_seed(0)
        model = graphopt.optimize(_net(["batch norm"]), backend="eager", verify=verify)
        for parameter in model.parameters():
            optimizer = torch.optim.SGD([parameter], 0.1, momentum=0.9)

            def step(p: Tensor, optimizer: torch.optim.SGD = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        for _ in range(8):
            model(torch.randn(8, 6)).square().mean().backward()
        results.append({n: t.clone() for n, t in model.state_dict().items()})
    _same(*results)


def _on_ranks(rank: int) -> None:
    for passes in ("", "kfac{interval=2},"):
        for wire in ("native", "int32", "bf16"):
            spec = f"{passes}group_gradients{{link=10gbe,wire={wire}}}"
            found = [
                _trained(["batch norm", "dropout"], v, spec, steps=8, rank=rank)[0]
                for v in ("off", "eager", EVERY)
            ]
            # Noise of gradients is measured every few steps and depends on none of this.
            _same(found[0], found[1])
            _same(found[0], found[2])


@pytest.mark.distributed
def test_ranks_train_with_the_same_bits(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _on_ranks)


def test_the_report_says_what_was_compared() -> None:
    _, model = _trained(["relu"], EVERY, "cleanup,kfac{interval=2}", steps=5)
    text = model.explain()
    assert "samples    1, every 3 steps, the last in step 4: bit-equal to eager in all" in text
    assert "not        kfac, preconditioning: it changes the training method by design" in text
    assert "compared   kfac, with and without results of its own: bit-equal, in step 4" in text
    data = json.loads(report(model).to_json())
    assert data["specialisations"][0]["samples"]["count"] == 1
    assert {form["result"] for form in data["forms"]} == {"not compared", "bit-equal"}


def test_calls_without_gradients_are_sampled_on_their_own() -> None:
    model = graphopt.optimize(_net(["relu"]).eval(), backend="eager", verify=EVERY)
    with torch.no_grad():
        for _ in range(7):
            model(torch.randn(2, 6))
    samples = report(model).specialisations[0].samples
    assert samples is not None
    assert samples.count == 2


def test_a_comparison_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = _trained(["relu"], EVERY, "cleanup", steps=3)

    def fails(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(Check, "__call__", fails)
    model(torch.randn(8, 6)).sum().backward()
    assert "none yet, every 3 steps; 1 could not be made" in model.explain()


def test_a_copy_is_compared_on_its_own() -> None:
    _, model = _trained(["relu"], EVERY, "cleanup", steps=4)
    twin = copy.deepcopy(model)
    for _ in range(4):
        F.mse_loss(twin(torch.randn(8, 6)), torch.zeros(8, 6)).backward()
    (mine,), (its,) = report(model).specialisations, report(twin).specialisations
    assert mine.samples is not None
    assert its.samples is not None
    assert (mine.samples.count, its.samples.count) == (1, 1)


@pytest.mark.parametrize(
    ("text", "level", "every"),
    [
        ("off", "off", 0),
        ("eager", "eager", 0),
        ("sample", "eager", 1000),
        ("sample{}", "eager", 1000),
        (" sample{ every = 7 } ", "eager", 7),
    ],
)
def test_levels_are_spelt_as_passes_are(text: str, level: str, every: int) -> None:
    assert Verify.parse(text) == Verify(level, every)  # type: ignore[arg-type]
    assert Verify.parse(str(Verify.parse(text))) == Verify.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("maybe", "verify='maybe' is none of 'off', 'structure', 'eager', 'full', 'sample{every"),
        ("sample{every=0}", "every=0 is not a number of steps from 1 on"),
        ("sample{every=1.5}", "every=1.5 is not a number of steps from 1 on"),
        ("sample{each=3}", "sample has no option 'each'"),
        ("sample{every=3", "is none of"),
        (3, "verify=3 is none of"),
    ],
)
def test_other_levels_are_refused(text: object, message: str) -> None:
    with pytest.raises(ArgumentError) as told:
        graphopt.optimize(nn.Linear(2, 2), verify=text)  # type: ignore[call-overload]
    assert message in told.value.message


def test_each_rank_remembers_what_it_has_compared_itself() -> None:
    pipeline = graphopt.Pipeline.parse("cleanup")
    places = ("", "dp:0/2", "dp:1/2", "dp:1/4")
    keys = [key_of("digest", pipeline, "eager", "eager", place) for place in places]
    assert len(set(keys)) == len(places)
    assert key_of("digest", pipeline, "eager", "eager", "dp:1/2") == keys[2]


class Once(nn.Linear):
    """A layer whose output can be differentiated as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sum()


def test_a_warning_that_is_an_error_does_not_end_what_is_made() -> None:
    from tests.support.stateful_pass import SlightlyWrong

    model = graphopt.optimize(
        Once(3, 3), passes=[SlightlyWrong()], backend="eager", on_mismatch="warn"
    )
    x = torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="without pass 'slightly_wrong'"):
            model(x)
        model(x).backward()
    (entry,) = report(model).specialisations
    assert entry.fallen_back
