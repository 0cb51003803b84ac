"""Models of the `transformers` package for the corpus: tiny configurations, random weights.

The package is imported when a model is made; nothing is downloaded, no global setting is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from graphopt.extras import extra

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]

_VOCABULARY = 32


def gpt2() -> Made:
    """GPT-2: tied embeddings, learned positions, dropout."""
    with extra("corpus", "this model of the corpus"):
        from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=_VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # other models say it by the name of their class
    return _with_labels(model)


def llama() -> Made:
    """Llama: rotary positions, grouped queries, gated feed-forward."""
    with extra("corpus", "this model of the corpus"):
        from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        use_cache=False,
    )
    return _with_labels(LlamaForCausalLM(config))


def bert() -> Made:
    """BERT with its masked language model head."""
    with extra("corpus", "this model of the corpus"):
        from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    return _with_labels(BertForMaskedLM(config))


def t5() -> Made:
    """T5: an encoder and a decoder with relative positions."""
    with extra("corpus", "this model of the corpus"):
        from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=_VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        use_cache=False,
    )
    config.decoder_start_token_id = 0
    return _with_labels(T5ForConditionalGeneration(config))


def hf_vit() -> Made:
    """The package's vision transformer, as an image classifier."""
    with extra("corpus", "this model of the corpus"):
        from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.1,
    )
    config.num_labels = 4
    arguments = {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([1, 3])}
    return ViTForImageClassification(config).train(), (), arguments


def _with_labels(model: nn.Module) -> Made:
    tokens = torch.randint(2, _VOCABULARY, (2, 7))
    return model.train(), (), {"input_ids": tokens, "labels": tokens.clone()}
