"""Masks of `nn.Transformer` layers, which ask whether a mask is causal: eager's bits either way."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of
from tests.support.as_graph import AsGraph, assert_same_steps

Mask = Callable[[int], Tensor]


class Layers(nn.Module):
    """An encoder, and a decoder if wanted, whose mask is made in forward."""

    def __init__(self, mask: Mask, decodes: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1
        )
        self.mask, self.decodes = mask, decodes

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x.shape[1])
        h: Tensor = self.encoder(x, mask=mask)
        return self.decoder(x, h, tgt_mask=mask) if self.decodes else h


class Given(nn.Module):
    """An encoder whose mask is an argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.encoder(x, mask=mask)


causal = nn.Transformer.generate_square_subsequent_mask


def _window(length: int) -> Tensor:
    """Causal as long as the length is 4 at most."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return torch.where((distance >= 0) & (distance < 4), 0.0, -torch.inf)


def _set_in_place(length: int) -> Tensor:
    mask = torch.zeros(length, length)
    mask[:, 1:] = -torch.inf  # not causal, and all zeros before this line
    return mask


def _flipped_in_place(length: int) -> Tensor:
    mask = torch.ones(length, length, dtype=torch.bool)
    mask.triu_(1)
    return mask


@pytest.mark.parametrize("mask", [causal, _window, _set_in_place, _flipped_in_place])
def test_masks_made_in_forward(mask: Mask) -> None:
    graph = assert_same_steps(Layers(mask), [(torch.randn(3, 4, 8),) for _ in range(2)])
    assert len(graph.captures) == 1
    text = str(graph.captures[0][0].graph.fx)
    assert text.count("graphopt.expect.default") == 2
    assert f"{mask is not _set_in_place})" in text


def test_the_answer_of_another_call_is_another_one() -> None:
    model = Given()
    graph = AsGraph(copy.deepcopy(model))
    x = torch.randn(3, 6, 8)
    masks = [causal(6), torch.zeros(6, 6), _window(6), causal(6)]
    for mask in masks:
        results = []
        for call in (model, graph):
            torch.manual_seed(1)
            results.append(call(x, mask))
        assert torch.equal(*results)
    assert len(graph.captures) == 1


def test_lengths_that_vary() -> None:
    plain = Layers(_window, decodes=False)
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    for length in (3, 4, 2, 9):  # the last one is not causal any more
        x = torch.randn(2, length, 8)
        results = []
        for m in (model, plain):
            m.zero_grad()
            torch.manual_seed(1)
            y = m(x)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in m.parameters() if p.grad is not None)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert controller_of(model).made == 2
