"""`calibrate` as a user calls it: batches of all forms, the file, bad data, the corpus."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.calibration.record import Calibration
from graphopt.errors import ArgumentError
from graphopt.testing.corpus import CORPUS


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())


def _batch(size: int = 4) -> Tensor:
    return torch.randn(size, 3, 6, 6)


@pytest.mark.parametrize(
    "batches",
    [_batch(), (_batch(),), {"input": _batch()}, [_batch()], iter([(_batch(),)])],
    ids=["tensor", "tuple", "dict", "list", "iterator"],
)
def test_forms_of_one_batch(batches: object) -> None:
    found = graphopt.calibrate(_net(), batches)
    assert (found.batches, found.samples) == (1, 4)
    assert found.sensitivities.keys() >= {"convolution", "relu"}
    assert found.tensors.keys() >= {"convolution", "relu", "input_1"}


def test_batches_of_two_sizes_and_one_of_one_sample() -> None:
    found = graphopt.calibrate(_net(), [_batch(4), _batch(7), _batch(1)])
    assert (found.batches, found.samples) == (3, 12)
    assert found.tensors["relu"].elements == 12 * 4 * 4 * 4
    assert graphopt.calibrate(_net(), _batch(1)).samples == 1


def test_a_loader_of_inputs_and_labels() -> None:
    data = torch.utils.data.TensorDataset(_batch(6), torch.randint(64, (6,)))
    loader = torch.utils.data.DataLoader(data, batch_size=3)
    found = graphopt.calibrate(_net(), loader, F.cross_entropy)
    assert (found.loss, found.batches, found.samples) == ("given", 2, 6)
    assert found.value is not None


def test_backward_has_ranges_too() -> None:
    found = graphopt.calibrate(_net(), _batch())
    assert any("backward" in name for name in found.tensors)
    assert found.tensors["tangent_0"].log2_amax == pytest.approx(-2)  # one over the examples


def test_neither_parameters_nor_buffers_nor_random_numbers_change() -> None:
    model = nn.Sequential(_net(), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    graphopt.calibrate(model, torch.ones(4, 3, 6, 6))
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_the_same_data_give_the_same_calibration() -> None:
    x = _batch()
    one, two = (graphopt.calibrate(_net(), x) for _ in range(2))
    assert one == two
    assert one.digest == two.digest


# -- the file --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Calibration:
    return graphopt.calibrate(nn.Linear(3, 2), torch.randn(4, 3))


def test_a_file_and_back(small: Calibration, tmp_path: Path) -> None:
    small.save(tmp_path / "a.json")
    assert Calibration.load(tmp_path / "a.json") == small


def _change(path: tuple[str, ...], value: object) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(("schema",), "graphopt.plan/1"), "its schema is not graphopt.calibration/1"),
        (_change(("batches",), "two"), "batches should be int"),
        (_change(("batches",), 0), "0 batches"),
        (_change(("extra",), 1), "unknown field 'extra'"),
        (_change(("tensors", "addmm", "zeros"), 5), "the counts of addmm do not add up"),
        (_change(("tensors", "addmm", "binades"), {"x": 8}), "the counts of addmm do not add up"),
        (_change(("tensors", "addmm", "log2_amax"), None), "addmm has a largest magnitude"),
        (
            _change(("sensitivities", "addmm", "result", "bf16"), -1.0),
            "the sensitivity of addmm is negative",
        ),
        (_change(("value",), float("nan")), "NaN among its numbers"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_files_that_are_no_calibration(
    small: Calibration, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    data = json.loads(small.to_json())
    change(data)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    with pytest.raises(ArgumentError, match=message) as caught:
        Calibration.load(file)
    assert caught.value.where == str(file)
    assert "graphopt calibrate" in caught.value.hint


@pytest.mark.parametrize("content", [b"not json", b"\xff\xfe\x00", b"[]", b""])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ArgumentError, match="calibration"):
        Calibration.load(tmp_path / "bad")


def test_files_that_are_not_there(small: Calibration, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="cannot be read: No such file"):
        Calibration.load(tmp_path / "none")
    with pytest.raises(ArgumentError, match="cannot be written"):
        small.save(tmp_path / "none" / "a.json")


# -- bad data --------------------------------------------------------------------------------------


def test_nan_is_flagged_and_counted() -> None:
    bad = _batch()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="batch 1 has NaN in input_1 and"):
        found = graphopt.calibrate(_net(), [_batch(), bad])
    assert found.tensors["input_1"].nan == 1
    assert any("counts for no sensitivity" in note for note in found.notes)
    assert found.sensitivities
    assert Calibration.from_json(found.to_json()) == found


def test_only_bad_batches_give_no_sensitivity() -> None:
    with pytest.warns(UserWarning, match="NaN"):
        found = graphopt.calibrate(_net(), torch.full((2, 3, 6, 6), float("nan")))
    assert not found.sensitivities


def test_an_empty_batch_is_said_to_be_one() -> None:
    with pytest.warns(UserWarning, match="batch 0 counts for no sensitivity: it is empty"):
        found = graphopt.calibrate(nn.Linear(3, 2), torch.randn(0, 3))
    assert found.samples == 0
    assert not found.sensitivities


def test_without_float32_there_is_nothing_to_find() -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return torch.fft.fft(self.lin(x)), x.argmax(-1)

    x = torch.randn(2, 4)
    for model, batch in ((Spectrum(), x), (nn.Linear(4, 4).half(), x.half())):
        with pytest.warns(UserWarning, match="no output is a differentiable float32 tensor"):
            found = graphopt.calibrate(model, batch)
        assert not found.sensitivities
        assert Calibration.from_json(found.to_json()) == found


def test_inference_without_gradients() -> None:
    with torch.no_grad():
        found = graphopt.calibrate(_net().eval(), _batch())
    assert found.sensitivities.keys() >= {"convolution", "relu"}


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "there is no batch"),
        (3, None, "batches are a int"),
        ([3], None, "must be a tensor"),
        ([None], None, "batch 0 is None"),
        ([_batch()], F.cross_entropy, "has to be a pair of inputs and target"),
        ([(_batch(), 0)], lambda output, target: output, "not one number"),
        ([(_batch(), 0)], lambda output, target: 1.0, "not one number"),
    ],
    ids=["none", "a number", "a list", "nothing", "no pair", "a tensor", "a float"],
)
def test_wrong_arguments(batches: object, loss: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        graphopt.calibrate(_net(), batches, loss)


@pytest.mark.corpus
@pytest.mark.parametrize("name", CORPUS)
def test_every_model_of_the_corpus(name: str) -> None:
    model, args, kwargs = CORPUS[name].make()
    found = graphopt.calibrate(model, [(args, kwargs)], probes=1)
    assert found.notes == ()
    assert Calibration.from_json(found.to_json()) == found
    known = [each.total("bf16") for each in found.sensitivities.values()]
    assert any(change is not None and change > 0 for change in known)
