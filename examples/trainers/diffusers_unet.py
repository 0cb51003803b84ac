"""diffusers: DDPM training of a small UNet on digits, with samples drawn in between.

Nothing is downloaded. Run: ``python -m graphopt.examples.trainers.diffusers_unet``
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt
from graphopt.examples.trainers.beside import BACKEND, Run, checksum, compare, timed
from graphopt.extras import extra

with extra("harness", "this example"):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
    from sklearn.datasets import load_digits

STEPS, SAMPLED = 6, (2, 5)


def net() -> UNet2DModel:
    """For images of 8 x 8 pixels, with attention at half of that."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def train(optimized: bool) -> Run:
    """Train, and draw samples by a loop of one's own and by the pipeline of diffusers."""
    torch.manual_seed(0)
    model, scheduler = net(), DDPMScheduler(num_train_timesteps=20)
    if optimized:
        graphopt.optimize(model, backend=BACKEND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    images = torch.tensor(load_digits().images[:64], dtype=torch.float32)[:, None] / 8 - 1
    losses, samples, begin = [], [], time.perf_counter()

    def sample() -> Tensor:
        model.eval()
        scheduler.set_timesteps(4)
        x = torch.randn(2, 1, 8, 8)
        with torch.no_grad():
            for t in scheduler.timesteps:
                x = scheduler.step(model(x, t).sample, t, x).prev_sample
        model.train()
        return x

    for step in range(STEPS):
        batch = images[torch.randint(len(images), (4,))]
        noise, t = torch.randn_like(batch), torch.randint(20, (4,))
        noisy = scheduler.add_noise(batch, noise, t)
        loss = F.mse_loss(model(noisy, t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step in SAMPLED:
            samples.append(sample().tolist())
    pipeline = DDPMPipeline(model.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=2, num_inference_steps=3, output_type="np").images
    samples.append(drawn.tolist())
    return Run(tuple(losses), checksum(model), timed(begin), model, tuple(map(str, samples)))


def main() -> None:
    plain, ours = compare("DDPM", train)
    if not plain.same(ours):
        raise SystemExit("the two runs differ")
    print(graphopt.model.surface.report(ours.model).explain())


if __name__ == "__main__":
    main()
