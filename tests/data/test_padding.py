"""What padding changes: planted leaks are found and named, right models pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.data import Pad, check_padding
from graphopt.errors import ArgumentError

LENGTH = 6


class Net(nn.Module):
    """Embeds, computes what a test says, and classifies."""

    def __init__(self, compute: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.embed = nn.Embedding(50, 8)
        self.places = nn.Embedding(64, 8)
        self.attend = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.lstm = nn.LSTM(8, 4, bidirectional=True, batch_first=True)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.drop(F.dropout(self.embed(ids), 0.3, self.training))
        return self.head(self.compute(self, h, mask))


def batch(**more: Tensor) -> dict[str, Tensor]:
    return {
        "ids": torch.randint(1, 50, (3, LENGTH)),
        "mask": torch.ones(3, LENGTH, dtype=torch.bool),
        **more,
    }


def masked_mean(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(h)
    return (h * weights).sum(1) / weights.sum(1)


def attention(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return net.attend(h, h, h, key_padding_mask=~mask)[0]


def causal(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    scores = F.scaled_dot_product_attention(h, h, h, None, 0.5, True)
    return h + scores


def masked_norm(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros_like(h).index_put((mask,), net.norm(h[mask]))


def positions(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return h + net.places(mask.cumsum(1))


def flipped_twice(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return torch.cumsum(h.flip(1) * mask.flip(1)[..., None], 1).flip(1)


RIGHT = [masked_mean, attention, causal, masked_norm, positions, flipped_twice]


def plain_mean(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return h.mean(1)


def wrong_divisor(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return (h * mask[..., None]).sum(1) / h.shape[1]


def maximum(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return (h + 9).amax(1) + (9 - h).amax(1)


def plain_norm(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return net.norm(h.transpose(1, 2)).transpose(1, 2)


def flat_norm(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return net.norm(h.flatten(0, 1)).view_as(h)


def plain_attention(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return net.attend(h, h, h, need_weights=False)[0]


def weak_mask(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    scores = (h @ h.transpose(1, 2)) / 3 - 4.0 * ~mask[:, None]
    return scores.softmax(-1) @ h


def from_the_right(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return h + net.places(torch.arange(h.shape[1] - 1, -1, -1))


def last(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return h[:, -1]


def backwards(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return net.lstm(h)[0]


def neighbours(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    h = torch.relu(h + 1)  # after which padding is not zero
    return F.conv1d(h.transpose(1, 2), torch.ones(8, 8, 3), padding=1).transpose(1, 2)


def gated(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(net, h, mask) + net.gate * h.mean(1)


LEAKS = [
    (plain_mean, "mean.dim", "reduces over padding", "h.mean(1)"),
    (wrong_divisor, "div.Tensor", "depends on padding", "/ h.shape[1]"),
    (maximum, "amax", "reduces over padding", "(h + 9).amax(1)"),
    (plain_norm, "native_batch_norm", "takes statistics over padding", "net.norm("),
    (flat_norm, "native_batch_norm", "takes statistics over padding", "net.norm("),
    (plain_attention, "_scaled_dot_product", "attends to padding", "net.attend("),
    (weak_mask, "_softmax", "normalises over padding", "scores.softmax(-1)"),
    (from_the_right, "arange", "by the padded length", "torch.arange("),
    (last, "select.int", "by the padded length", "h[:, -1]"),
    (backwards, "", "", "net.lstm(h)"),
    (neighbours, "convolution", "reads padding beside", "F.conv1d("),
    (gated, "mean.dim", "reduces over padding", "net.gate * h.mean(1)"),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("compute", RIGHT, ids=lambda f: f.__name__)
def test_right_models_pass(compute: Callable[..., Tensor], training: bool) -> None:
    report = check_padding(Net(compute).train(training), kwargs=batch())
    assert report.ok, str(report)
    assert {c.kind for c in report.compared} >= {"outputs", "gradients"}


@pytest.mark.parametrize(
    ("compute", "operator", "says", "code"), LEAKS, ids=lambda v: getattr(v, "__name__", "")
)
def test_leaks_are_named(
    compute: Callable[..., Tensor], operator: str, says: str, code: str
) -> None:
    report = check_padding(Net(compute), kwargs=batch())
    assert not report.ok
    leak = report.leaks[0]
    assert leak.operator.startswith(operator)
    assert says in leak.says
    assert code in leak.line
    assert "test_padding.py" in leak.line
    assert str(leak) in str(report)


def test_a_leak_that_is_multiplied_by_zero_is_in_the_gradients() -> None:
    report = check_padding(Net(gated), kwargs=batch())
    bad = {c.kind: c.worst for c in report.compared if c.error > report.allowed}
    assert bad == {"gradients": "gradient of gate"}
    with torch.no_grad():
        assert check_padding(Net(gated), kwargs=batch()).ok


def hides_rows(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    seen = mask[:, None] & mask[:, :, None]
    scores = (h @ h.transpose(1, 2)).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ h


def test_nan_at_padded_positions_reaches_gradients() -> None:
    report = check_padding(Net(hides_rows), kwargs=batch())
    assert [c.kind for c in report.compared if c.error > report.allowed] == ["gradients"]
    assert "NaN at padded positions" in report.hint


def test_batch_norm_leaks_in_training_only() -> None:
    assert check_padding(Net(plain_norm).eval(), kwargs=batch()).ok
    report = check_padding(Net(plain_norm), kwargs=batch())
    assert "buffers" in {c.kind for c in report.compared if c.error > report.allowed}
    assert report.leaks[0].module == "norm"


def of_the_first_row(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(h)
    return (h * weights).sum(1) / mask[0].sum()


def to_the_longest(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return h[:, : int(mask.sum(1).max())].mean(1)


def hides_as_the_first_row(net: Net, h: Tensor, mask: Tensor) -> Tensor:
    return net.attend(h, h, h, key_padding_mask=~mask[:1].expand_as(mask))[0]


@pytest.mark.parametrize("compute", [of_the_first_row, to_the_longest, hides_as_the_first_row])
def test_rows_of_different_lengths(compute: Callable[..., Tensor]) -> None:
    report = check_padding(Net(compute), kwargs=batch())
    assert [c.kind for c in report.compared if c.error > report.allowed] == ["rows"]
    assert report.compared[-1].worst.startswith("output 0 of row ")
    assert "a row depends on the length or padding of another" in str(report)


@pytest.mark.parametrize("compute", [masked_mean, attention, causal, positions])
def test_rows_are_compared_where_they_are_independent(compute: Callable[..., Tensor]) -> None:
    assert check_padding(Net(compute), kwargs=batch()).compared[-1].kind == "rows"


def test_rows_that_depend_on_each_other_are_not_compared() -> None:
    assert check_padding(Net(masked_norm), kwargs=batch()).compared[-1].kind == "buffers"
    one = {name: tensor[:1] for name, tensor in batch().items()}
    assert check_padding(Net(masked_mean), kwargs=one).compared[-1].kind == "gradients"


class WithLoss(nn.Module):
    def __init__(self, mean: bool) -> None:
        super().__init__()
        self.mean = mean
        self.embed = nn.Embedding(50, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Any]:
        logits = self.embed(input_ids)
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none" if self.mean else "mean"
        )
        return {"loss": loss.mean() if self.mean else loss, "logits": logits}


@pytest.mark.parametrize("mean", [True, False])
def test_the_loss_of_the_model(mean: bool) -> None:
    inputs = {
        "input_ids": torch.randint(1, 50, (3, LENGTH)),
        "attention_mask": torch.ones(3, LENGTH, dtype=torch.int64),
        "labels": torch.randint(0, 4, (3, LENGTH)),
    }
    report = check_padding(WithLoss(mean), kwargs=inputs)
    assert report.padded["labels"].value == -100
    assert {c.kind: c.error > report.allowed for c in report.compared} == {
        "outputs": False,
        "loss": mean,
        "gradients": mean,
        **({} if mean else {"rows": False}),
    }
    if mean:
        assert report.leaks[0].operator == "mean"


class Encoder(nn.Module):
    """Takes the mask of PyTorch's layers, true where there is padding, and gives up on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.places = nn.Parameter(torch.randn(32, 8))

    def forward(self, x: Tensor, src_key_padding_mask: Tensor) -> Tensor:
        return self.layer(x + self.places[: x.shape[1]], src_key_padding_mask=src_key_padding_mask)


def test_masks_that_mark_padding_and_padding_on_the_left() -> None:
    x, mask = torch.randn(3, LENGTH, 8), torch.zeros(3, LENGTH, dtype=torch.bool)
    mask[0, 4:] = True  # counts as true in the check
    model = Encoder()
    report = check_padding(model, (x, mask))
    assert report.padded["src_key_padding_mask"].value == 1
    assert report.ok, str(report)
    assert not check_padding(model, (x, mask), side="left").ok
    assert check_padding(Net(positions), kwargs=batch(), side="left").ok


def test_the_mask_may_be_the_padding_itself() -> None:
    class FromIds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 8)

        def forward(self, ids: Tensor) -> Tensor:
            return masked_mean(self, self.embed(ids), ids != 0)  # type: ignore[arg-type]

    ids = torch.randint(1, 50, (3, LENGTH))
    assert check_padding(FromIds(), (ids,), pads={"ids": Pad(0, dim=1)}).ok
    report = check_padding(FromIds(), (ids,), pads={"ids": Pad(7, dim=1)})
    assert not report.ok
    assert "the call has no mask" in str(report)


def test_the_model_is_left_alone() -> None:
    model = Net(plain_norm)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state, inputs = torch.get_rng_state(), batch()
    torch.set_rng_state(state)
    check_padding(model, kwargs=inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.drop.p == 0.5
    assert model.training


class Noisy(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class Short(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(LENGTH, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x[..., None] + self.places(torch.arange(x.shape[1]))


@pytest.mark.parametrize(
    ("model", "pads", "message"),
    [
        (Noisy(), None, "forward draws random numbers"),
        (Short(), None, "forward of Short failed with 8 padded positions: index out of range"),
        (Noisy(), {}, "pads is empty"),
        (Noisy(), {"y": Pad(0)}, "the call has no tensor 'y'; it has x, mask"),
        (Noisy(), {"x": Pad(0, dim=2)}, "has no dim=2"),
        (Noisy(), {"x": Pad(0, dim=1), "mask": Pad(0)}, f"x has {LENGTH} positions and mask has 3"),
        (Noisy(), {"mask": Pad(-1, dim=1)}, "padding value -1 does not fit"),
        (
            Noisy(),
            {"x": Pad(0, dim=1), "mask": Pad(0, dim=1, side="left")},
            "pads are on two sides",
        ),
    ],
)
def test_bad_input(model: nn.Module, pads: dict[str, Pad] | None, message: str) -> None:
    inputs = (torch.ones(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.bool))
    with pytest.raises(ArgumentError) as error:
        check_padding(model, inputs, pads=pads)
    assert message in str(error.value)


def test_a_missing_mask() -> None:
    with pytest.raises(ArgumentError, match="no argument of forward is a mask") as error:
        check_padding(nn.Linear(4, 4), (torch.ones(3, 4),))
    assert "--pad input=1" in error.value.hint
    with pytest.raises(ArgumentError, match="the mask has no positions"):
        check_padding(Noisy(), (torch.ones(3, 0), torch.ones(3, 0)))
    with pytest.raises(ArgumentError, match="cannot be called with these arguments"):
        check_padding(Noisy(), ())
