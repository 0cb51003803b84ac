"""`nn.TransformerEncoder` on padded batches: refused where eager goes through nested tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError

PADS = torch.tensor([[False, False, False], [False, False, True]])
WORDS = "nested tensors of a padded batch"


def _encoder(nested: bool = True, **options: Any) -> nn.TransformerEncoder:
    options = {"batch_first": True, "dropout": 0.0, **options}
    layer = nn.TransformerEncoderLayer(8, 2, 16, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder = nn.Embedding(9, 8), _encoder()

    def forward(self, tokens: Tensor) -> Tensor:
        h: Tensor = self.encoder(self.embed(tokens), src_key_padding_mask=tokens == 0)
        return h.mean(1)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_refused_before_the_first_padded_batch(mode: Callable[[], Any]) -> None:
    plain = Classifier().eval()
    refused = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    falls_back = graphopt.optimize(copy.deepcopy(plain), backend="eager", fallback="eager")
    full, padded = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 2, 3], [4, 5, 0]])
    with mode():
        with pytest.raises(CaptureError, match=WORDS) as caught:
            refused(full)
        assert "self.encoder(" in caught.value.where
        assert "enable_nested_tensor=False" in caught.value.hint
        with pytest.warns(UserWarning, match="plain PyTorch"):
            falls_back(full)
        assert torch.equal(falls_back(padded), plain(padded))


def test_frozen_weights_take_it_also_where_gradients_are_taken() -> None:
    model = graphopt.optimize(_encoder().requires_grad_(False), backend="eager")
    x = torch.randn(2, 3, 8)
    with pytest.raises(CaptureError, match=WORDS):
        model(x, src_key_padding_mask=PADS)
    model(x.requires_grad_(), src_key_padding_mask=PADS).sum().backward()


def _assert_captured(plain: nn.TransformerEncoder, **given: Any) -> None:
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager", fallback="error")
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(model(x, **given), plain(x, **given))


OTHERS: dict[str, Callable[[], nn.TransformerEncoder]] = {
    "not nested": lambda: _encoder(nested=False),
    "norm first": lambda: _encoder(nested=False, norm_first=True),
    "training": lambda: _encoder().train(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_takes_another_way_in_eager_is_captured(name: str) -> None:
    with torch.no_grad():
        _assert_captured(OTHERS[name](), src_key_padding_mask=PADS)


def test_calls_that_take_another_way_in_eager_are_captured() -> None:
    _assert_captured(_encoder(), src_key_padding_mask=PADS)  # with gradients
    with torch.no_grad():
        _assert_captured(_encoder())
        causal = nn.Transformer.generate_square_subsequent_mask(3)
        pads = torch.zeros(2, 3).masked_fill(PADS, float("-inf"))
        _assert_captured(_encoder(), mask=causal, src_key_padding_mask=pads)
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            _assert_captured(_encoder(), src_key_padding_mask=PADS)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
