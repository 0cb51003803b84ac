"""Training of a Wasserstein GAN on digits, by any format."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import RMSprop

from examples.flexpoint.classify import Run
from examples.flexpoint.data import digits
from examples.flexpoint.formats import ALL, hold_exponents, prepare, statistics
from examples.flexpoint.models import CODE, Critic, Generator

DIRECTIONS = 512  # of the sliced Wasserstein distance
MADE = 1437  # images for it, as many as there are for training


@dataclass(frozen=True)
class Gan:
    """The task, after Arjovsky et al., arXiv 1701.07875.

    The learning rate is ten times theirs and the bounds are wider, as trainings are short.

    Attributes:
        steps: updates of the generator.
        critic_steps: updates of the critic before each of them.
        rate: learning rate of both.
        clip: the critic's weights stay within plus and minus this.
        batch: images in a step, real ones and made ones each.
    """

    steps: int = 200
    critic_steps: int = 5
    rate: float = 5e-4
    clip: float = 0.05
    batch: int = 64

    def train(self, format: str, seed: int, steps: int | None = None) -> Run:
        """One training; `Run.losses` is the critic's estimate of the Wasserstein distance.

        Args:
            format: one of `ALL`.
            seed: of the weights, the batches and the codes.
            steps: stop after so many updates of the generator.
        """
        chosen = ALL[format]
        torch.manual_seed(seed)
        generator, critic = Generator().train(), Critic().train()
        images = 2 * digits()[0] - 1
        prepare(generator, chosen, torch.zeros(self.batch, CODE))
        prepare(critic, chosen, images[: self.batch])
        makes, judges = (RMSprop(m.parameters(), self.rate) for m in (generator, critic))
        draw = torch.Generator().manual_seed(seed)
        run = Run(models=(critic, generator))
        start = time.perf_counter()
        for _ in range(steps or self.steps):
            critic.requires_grad_(True)
            for _ in range(self.critic_steps):
                real = images[torch.randint(len(images), (self.batch,), generator=draw)]
                with torch.no_grad():
                    made = generator(torch.randn(self.batch, CODE, generator=draw))
                hold_exponents(critic, chosen)
                judges.zero_grad()
                loss = critic(made).mean() - critic(real).mean()
                loss.backward()
                judges.step()
                with torch.no_grad():
                    for p in critic.parameters():
                        p.clamp_(-self.clip, self.clip)
            run.losses.append(-loss.item())
            critic.requires_grad_(False)
            hold_exponents(critic, chosen)
            hold_exponents(generator, chosen)
            makes.zero_grad()
            loss = -critic(generator(torch.randn(self.batch, CODE, generator=draw))).mean()
            loss.backward()
            makes.step()
        run.seconds = time.perf_counter() - start
        run.flex = statistics(critic, generator)
        run.test = {"sliced Wasserstein": _distance(generator, images)}
        return run


def _distance(generator: Generator, images: Tensor) -> float:
    generator.eval()
    draw = torch.Generator().manual_seed(2026)
    with torch.no_grad():
        made = generator(torch.randn(MADE, CODE, generator=draw)).float()
    generator.train()
    return sliced_wasserstein(made, images, draw)


def sliced_wasserstein(made: Tensor, real: Tensor, draw: torch.Generator) -> float:
    """Mean distance of the sorted projections on random directions (Rabin et al., 2011).

    Args:
        made: images, (n, ...).
        real: as many.
        draw: where the directions come from.
    """
    flat = [x.flatten(1) for x in (made, real)]
    directions = torch.randn(flat[0].shape[1], DIRECTIONS, generator=draw)
    directions /= directions.norm(dim=0)
    first, second = ((x @ directions).sort(dim=0).values for x in flat)
    return (first - second).abs().mean().item()
