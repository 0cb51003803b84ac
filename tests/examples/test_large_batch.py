"""Large batches: data, workers that are one batch, and recipes that do what their names say."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from graphopt.examples.common import WorkloadError
from graphopt.examples.large_batch.data import TRAIN, Batches, Images, digits, split
from graphopt.examples.large_batch.model import Workers, accuracy, network
from graphopt.examples.large_batch.train import LARGE, RATE, SMALL, case, recipes
from graphopt.examples.large_batch.training import MICRO, fixed, gradual
from graphopt.optim import slow_start
from tests.examples.contract import one_exact_graph

CPU = torch.device("cpu")


def data() -> Images:
    return digits(torch.Generator().manual_seed(0), CPU).train


def gradient(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("count", [1, 4, 16])
def test_workers_and_micro_batches_have_the_gradient_of_one_batch(count: int) -> None:
    torch.manual_seed(0)
    whole, images = network(batch_norm=False).double(), data()
    pixels, labels = images.pixels[:64].double(), images.labels[:64]
    shared, accumulated = copy.deepcopy(whole), copy.deepcopy(whole)
    F.cross_entropy(whole(pixels), labels).backward()
    Workers(shared, count).backward(pixels, labels)
    micro = list(zip(pixels.chunk(count), labels.chunk(count), strict=True))
    for step in fixed(count * MICRO)(accumulated).steps(micro):
        for own, targets in step:
            step.backward(F.cross_entropy(accumulated(own), targets))
    for model in (shared, accumulated):
        torch.testing.assert_close(gradient(model), gradient(whole), rtol=1e-10, atol=1e-12)


def test_workers_with_batch_norm_are_not_one_batch() -> None:
    """Each normalises by its own examples; which is why the criterion leaves it out."""
    torch.manual_seed(0)
    whole, images = network(), data()
    shared = copy.deepcopy(whole)
    F.cross_entropy(whole(images.pixels[:64]), images.labels[:64]).backward()
    Workers(shared, 4).backward(images.pixels[:64], images.labels[:64])
    far = (gradient(shared) - gradient(whole)).norm() / gradient(whole).norm()
    assert float(far) > 0.01


def test_recipes_say_what_they_are() -> None:
    found = {recipe.name: recipe for recipe in recipes(8)}
    assert len(found) == len(recipes(8))
    model = network()
    large = found["large, RMSprop warm-up"]
    assert large.rate == pytest.approx(RATE * LARGE / SMALL)
    assert large.batch(model).micro_batches * large.micro == LARGE
    equal = found["equal updates, RMSprop warm-up"]
    assert equal.epochs * -(-TRAIN // LARGE) == found["small"].epochs * (TRAIN // SMALL)
    halved, grown = found["small, rate halved"], found["AdaBatch"].batch(model)
    assert halved.schedule is not None
    assert [halved.schedule(e, 8.0) for e in (0.0, 1.9, 2.0, 7.9)] == [1.0, 1.0, 0.5, 0.125]
    assert grown.double_every == 2
    assert found["noise scale"].batch(model).micro_batches * found["noise scale"].micro == SMALL


def test_a_gradual_warm_up_rises_and_is_the_slow_start_then() -> None:
    assert [gradual(e, 10.0) for e in (0.0, 0.5, 1.0)] == [0.0, 0.25, 0.5]
    assert all(gradual(e, 10.0) == slow_start(e, 10.0) for e in (1.0, 5.0, 9.9))


def test_accuracy_is_in_percent_and_leaves_the_model_training() -> None:
    model, images = network(), data()
    scores = model.eval()(images.pixels)
    right = int((scores.argmax(1) == images.labels).sum())
    assert accuracy(model, images.pixels, images.labels) == pytest.approx(100 * right / TRAIN)
    assert model.training


def test_a_pass_sees_every_image_once() -> None:
    images = data()
    batches = Batches(images, 100, torch.Generator().manual_seed(1))
    found = list(batches)
    assert len(batches) == len(found) == 14
    assert [len(labels) for _, labels in found] == [100] * 13 + [44]
    seen = torch.cat([labels for _, labels in found])
    assert torch.equal(seen.sort().values, images.labels.sort().values)


def test_gradients_are_those_of_eager() -> None:
    torch.manual_seed(0)
    one_exact_graph(case(CPU))


def test_bad_data_is_named() -> None:
    pixels, labels = torch.zeros(1500, 1, 8, 8), torch.zeros(1500, dtype=torch.int64)
    random = torch.Generator()
    with pytest.raises(WorkloadError, match="images has shape"):
        split(pixels[:, :, :7], labels, random, CPU)
    with pytest.raises(WorkloadError, match="labels has shape"):
        split(pixels, labels[:-1], random, CPU)
    with pytest.raises(WorkloadError, match="1344 images leave none to test on"):
        split(pixels[:TRAIN], labels[:TRAIN], random, CPU)
    with pytest.raises(WorkloadError, match="a batch of 5000"):
        Batches(data(), 5000, random)
    pixels[3, 0, 1, 2] = torch.nan
    with pytest.raises(WorkloadError, match=r"images holds 1 .* at \[3, 0, 1, 2\]"):
        split(pixels, labels, random, CPU)
