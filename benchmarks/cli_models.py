"""The models of `benchmarks.cli`, as the command line names them."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.models import ResNet18


def resnet18() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """ResNet-18 and two images."""
    return ResNet18(), (torch.randn(2, 3, 64, 64),)


def gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A GPT-2 of 12 layers from a configuration, with a loss."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=12, n_head=6, n_embd=192, n_positions=64, vocab_size=4096, use_cache=False
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    tokens = torch.randint(4096, (2, 64))
    return model, {"input_ids": tokens, "labels": tokens}
