"""What delayed gradients cost, and what compensation, prediction and braking win back.

A small ResNet learns scikit-learn's digits with gradients that arrive late: with the delays of a
pipeline that is never drained, one stage per convolution, or with one delay for all weights. All of
it runs in this process. `benchmarks/delay_study.py` runs it with several seeds and draws a picture.

Run: ``python examples/pipeline/delay_study.py``; ``--help`` for options.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # so that it runs from any folder

from examples.pipeline.delayed_resnet import resnet
from graphopt.extras import extra
from graphopt.optim import DelayedSGD, alternating_delay, pipelined_delay, scale_to_batch
from graphopt.study import ConstantDelay, PipelinedBackpropagation

with extra("examples", "this example"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

PLAIN, SPIKE, BRAKING = "SGD, momentum", "SC", "Adaptive Braking"
BOTH, BOTH_WEIGHTS = "LWP + SC", "LWP of weights + SC"
METHODS: Mapping[str, dict[str, Any]] = {
    PLAIN: {"compensation": "none"},
    SPIKE: {"compensation": "spike"},
    "LWP": {"compensation": "none", "prediction": "velocity"},
    BOTH: {"compensation": "spike", "prediction": "velocity"},
    "LWP of weights": {"compensation": "none", "prediction": "weight"},
    BOTH_WEIGHTS: {"compensation": "spike", "prediction": "weight"},
    BRAKING: {"compensation": "none", "braking": "tensor"},
}
LAWS: Mapping[str, Callable[[int, int], int]] = {
    "pipelined": pipelined_delay,
    "alternating": alternating_delay,
}


@dataclass(frozen=True)
class Setting:
    """What is trained, and how; chosen without delays.

    Attributes:
        blocks: residual blocks per resolution; there are ``6 * blocks + 2`` stages.
        width: channels of the first stage.
        tuned: batch size that learning rate and momentum are meant for.
        lr: the first learning rate, at that batch size; it falls linearly to 0.
        momentum: at that batch size.
        batch: images per update; learning rate and momentum are scaled to it.
        epochs: passes over the training images.
    """

    blocks: int = 2
    width: int = 8
    tuned: int = 32
    lr: float = 0.02
    momentum: float = 0.9
    batch: int = 4
    epochs: int = 6

    @property
    def stages(self) -> int:
        """How many there are."""
        return 6 * self.blocks + 2


@dataclass(frozen=True)
class Digits:
    """Half of the images to train, half to measure; (n, 1, 8, 8) of mean 0 and deviation 1."""

    images: Tensor
    labels: Tensor
    unseen: Tensor
    answers: Tensor

    @classmethod
    def load(cls) -> Digits:
        """The same halves every time."""
        data = load_digits()
        images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
        images = (images - images.mean()) / images.std()
        labels = torch.tensor(data.target)
        train, rest = train_test_split(
            torch.arange(len(labels)), train_size=900, random_state=0, stratify=labels
        )
        return cls(images[train], labels[train], images[rest], labels[rest])

    def accuracy(self, stages: list[nn.Module]) -> float:
        """Share of unseen images that are classified correctly."""
        with torch.no_grad():
            result = nn.Sequential(*stages)(self.unseen)
        return (result.argmax(1) == self.answers).float().mean().item()


def pipelined(
    data: Digits, setting: Setting, method: str, seed: int, law: str = "pipelined"
) -> float:
    """Accuracy after training through a pipeline that is never drained.

    Backwards use the current weights; forwards the predicted ones, if the method predicts.

    Args:
        data: to train and to measure.
        setting: of the training.
        method: one of `METHODS`.
        seed: of weights and order.
        law: one of `LAWS`.
    """
    stages = _network(setting, seed)
    delays = [LAWS[law](stage, len(stages)) for stage in range(len(stages))]
    optimizer = _optimizer(stages, delays, setting, method)
    training = PipelinedBackpropagation(
        stages, optimizer, F.cross_entropy, delays, weights="inconsistent"
    )
    for chosen in _schedule(data, setting, optimizer, seed):
        training.step(data.images[chosen], data.labels[chosen])
    training.drain()
    return data.accuracy(stages)


def constant(data: Digits, setting: Setting, method: str, delay: int, seed: int) -> float:
    """Accuracy after training with all gradients `delay` updates late; 0 is ordinary training."""
    stages = _network(setting, seed)
    optimizer = _optimizer(stages, [delay] * len(stages), setting, method)
    training = ConstantDelay(optimizer, delay)
    model = nn.Sequential(*stages)
    for chosen in _schedule(data, setting, optimizer, seed):
        images, labels = data.images[chosen], data.labels[chosen]
        training.step(lambda x=images, y=labels: F.cross_entropy(model(x), y))  # type: ignore[misc]
    training.drain()
    return data.accuracy(stages)


def _network(setting: Setting, seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return resnet(setting.blocks, setting.width)


def _optimizer(
    stages: list[nn.Module], delays: list[int], setting: Setting, method: str
) -> DelayedSGD:
    groups = [
        {"params": list(stage.parameters()), "delay": delay}
        for stage, delay in zip(stages, delays, strict=True)
    ]
    with warnings.catch_warnings():
        # That long predictions are unstable is one of the things to see here.
        warnings.simplefilter("ignore", RuntimeWarning)
        lr, momentum = _scaled(setting)
        return DelayedSGD(groups, lr, momentum=momentum, **METHODS[method])


def _scaled(setting: Setting) -> tuple[float, float]:
    return scale_to_batch(setting.lr, setting.momentum, tuned=setting.tuned, batch=setting.batch)


def _schedule(data: Digits, setting: Setting, optimizer: DelayedSGD, seed: int) -> Iterator[Tensor]:
    """The images of each batch; sets the learning rate before each."""
    random = torch.Generator().manual_seed(seed)
    full = len(data.labels) // setting.batch
    first = _scaled(setting)[0]
    steps = full * setting.epochs
    for step in range(steps):
        if step % full == 0:
            batches = torch.randperm(len(data.labels), generator=random).split(setting.batch)
        for group in optimizer.param_groups:
            group["lr"] = first * (1 - step / steps)
        yield batches[step % full]


def use_one_core() -> None:
    """Settings of PyTorch for many tiny convolutions; oneDNN spends more on each than it saves."""
    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False


def main() -> None:
    """One seed: accuracy for each method, with and without delay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--law", choices=LAWS, default="pipelined")
    parser.add_argument("--delay", type=int, help="one delay for all weights instead of a law")
    parser.add_argument("--batch", type=int, default=Setting.batch)
    parser.add_argument("--epochs", type=int, default=Setting.epochs)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    use_one_core()
    setting = Setting(batch=chosen.batch, epochs=chosen.epochs)
    data = Digits.load()
    print(f"no delay: {constant(data, setting, PLAIN, 0, chosen.seed):.3f}", flush=True)
    for method in METHODS:
        if chosen.delay is None:
            found = pipelined(data, setting, method, chosen.seed, chosen.law)
        else:
            found = constant(data, setting, method, chosen.delay, chosen.seed)
        print(f"{method}: {found:.3f}", flush=True)


if __name__ == "__main__":
    main()
