from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from graphopt.testing.corpus import CORPUS, CorpusModel

pytestmark = pytest.mark.corpus

SEED = 3


def step(
    entry: CorpusModel, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor]]:
    """One eager step from a seed: the loss, every trainable parameter's gradient, all buffers."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        loss = entry.loss(model(*args, **kwargs))
        loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return loss.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize("entry", CORPUS.values(), ids=CORPUS)
def test_trains_reproducibly(entry: CorpusModel) -> None:
    model, args, kwargs = entry.make()
    assert model.training
    loss, gradients, buffers = step(entry, model, args, kwargs)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert {n for n, g in gradients.items() if g is None} == entry.without_gradient
    assert all(torch.isfinite(g).all() for g in gradients.values() if g is not None)
    assert any(g is not None and g.abs().max() > 0 for g in gradients.values())

    again = step(entry, *entry.make())
    torch.testing.assert_close((loss, gradients, buffers), again, rtol=0, atol=0)


@pytest.mark.parametrize("entry", CORPUS.values(), ids=CORPUS)
def test_a_step_leaves_arguments_and_parameters_alone(entry: CorpusModel) -> None:
    model, args, kwargs = entry.make()
    before = deepcopy((args, kwargs, dict(model.named_parameters())))
    step(entry, model, args, kwargs)
    plain = tree_map_only(Tensor, torch.Tensor.detach, (args, kwargs))
    torch.testing.assert_close(
        tree_map_only(Tensor, torch.Tensor.detach, before[:2]), plain, rtol=0, atol=0
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[2][name]), name


def test_making_a_model_keeps_the_random_state() -> None:
    before = torch.get_rng_state()
    CORPUS["resnet"].make()
    assert torch.equal(torch.get_rng_state(), before)


def test_covers_what_its_docstring_promises() -> None:
    def has(name: str, kind: type[nn.Module]) -> bool:
        return any(isinstance(m, kind) for m in CORPUS[name].make()[0].modules())

    assert has("resnet", nn.BatchNorm2d)
    assert has("vit", nn.MultiheadAttention)
    assert has("lstm_ctc", nn.LSTM)
    tied = CORPUS["tied_language_model"].make()[0]
    assert len(list(tied.parameters())) < len(list(tied.named_parameters(remove_duplicate=False)))
    assert len(CORPUS) >= 20
