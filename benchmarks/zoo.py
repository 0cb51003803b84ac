"""Training steps of some forty models that nothing was tuned for, small enough for one core.

`ZOO` has convolutional nets, transformers and others with steps of 10 to 300 ms; those of the
corpus, whose steps take 1 to 10 ms, are in `SMALL`. Nothing is built before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models import ResNet18, digits_resnet, tiny_gpt2
from graphopt.testing.corpus import CORPUS

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any], Callable[[Any], Tensor]]


@dataclass(frozen=True)
class Step:
    """Forward and backward of one model on one batch, from empty gradients.

    Attributes:
        model: in train mode.
        args: positional arguments.
        kwargs: keyword arguments.
        loss: of what the model returns.
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    loss: Callable[[Any], Tensor]

    def __call__(self) -> None:
        """Run it."""
        self.forget()
        self.loss(self.model(*self.args, **self.kwargs)).backward()

    def forget(self) -> None:
        """Drop the gradients."""
        for parameter in self.model.parameters():
            parameter.grad = None


def _own_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _transformers(model: str, **config: Any) -> nn.Module:
    import transformers

    kind = getattr(transformers, model)
    made: nn.Module = kind(kind.config_class(**config))
    return made.train()


def _text(model: str, labels: str = "labels", **config: Any) -> Callable[[], Made]:
    def make() -> Made:
        tokens = torch.randint(10, 500, (4, 64))
        given = {"input_ids": tokens, labels: tokens}
        return _transformers(model, vocab_size=512, **config), (), given, _own_loss

    return make


def _classified(model: str, size: int = 64, **config: Any) -> Callable[[], Made]:
    def make() -> Made:
        made = _transformers(model, **config)
        given = {
            "pixel_values": torch.randn(4, 3, size, size),
            "labels": torch.tensor([0, 1, 0, 1]),
        }
        return made, (), given, _own_loss

    return make


def _digits() -> Made:
    labels = torch.randint(10, (64,))
    images = torch.randn(64, 1, 8, 8)
    return digits_resnet(), (images,), {}, lambda out: F.cross_entropy(out, labels)


def _gpt2() -> Made:
    tokens = torch.randint(512, (8, 64))
    return (
        tiny_gpt2(),
        (tokens,),
        {},
        lambda out: F.cross_entropy(out.logits.flatten(0, 1), tokens.flatten()),
    )


def _resnet18() -> Made:
    labels = torch.randint(1000, (4,))
    return ResNet18(), (torch.randn(4, 3, 64, 64),), {}, lambda out: F.cross_entropy(out, labels)


def _mlp() -> Made:
    layers = [m for _ in range(8) for m in (nn.Linear(256, 256), nn.GELU(), nn.Dropout(0.1))]
    labels = torch.randint(10, (128,))
    model = nn.Sequential(*layers, nn.Linear(256, 10))
    return model, (torch.randn(128, 256),), {}, lambda out: F.cross_entropy(out, labels)


def _encoder() -> Made:
    layer = nn.TransformerEncoderLayer(128, 4, 512, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    return model, (torch.randn(4, 64, 128),), {}, lambda out: out.square().mean()


_LAYERS = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
_BERT = _LAYERS | {"intermediate_size": 256, "max_position_embeddings": 80}
_LLAMA = _LAYERS | {"intermediate_size": 256, "num_key_value_heads": 2, "use_cache": False}
_VIT = _LAYERS | {"intermediate_size": 256, "image_size": 64, "patch_size": 8}

ZOO: dict[str, Callable[[], Made]] = {
    "digits ResNet": _digits,
    "ResNet-18": _resnet18,
    "ResNet-50, narrow": _classified(
        "ResNetForImageClassification", embedding_size=32, hidden_sizes=[64, 128, 256, 512]
    ),
    "RegNet": _classified(
        "RegNetForImageClassification",
        embedding_size=16,
        hidden_sizes=[32, 64, 128],
        depths=[1, 2, 2],
    ),
    "MobileNetV1": _classified("MobileNetV1ForImageClassification", depth_multiplier=0.5),
    "MobileNetV2": _classified("MobileNetV2ForImageClassification", depth_multiplier=0.5),
    "EfficientNet": _classified(
        "EfficientNetForImageClassification",
        width_coefficient=0.5,
        depth_coefficient=0.5,
        hidden_dim=640,
    ),
    "ConvNeXt": _classified(
        "ConvNextForImageClassification", hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 3, 1]
    ),
    "PoolFormer": _classified(
        "PoolFormerForImageClassification", hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 2, 1]
    ),
    "SegFormer": _classified(
        "SegformerForImageClassification", hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1]
    ),
    "ViT": _classified("ViTForImageClassification", **_VIT),
    "BEiT": _classified("BeitForImageClassification", **_VIT),
    "Swin": _classified(
        "SwinForImageClassification", image_size=64, embed_dim=32, depths=[1, 1], num_heads=[2, 4]
    ),
    "tiny GPT-2": _gpt2,
    "OPT": _text(
        "OPTForCausalLM",
        **_LAYERS,
        ffn_dim=256,
        max_position_embeddings=80,
        word_embed_proj_dim=128,
        use_cache=False,
    ),
    "Llama": _text("LlamaForCausalLM", **_LLAMA),
    "Qwen2": _text("Qwen2ForCausalLM", **_LLAMA),
    "GPT-NeoX": _text("GPTNeoXForCausalLM", **_BERT, use_cache=False),
    "BERT": _text("BertForMaskedLM", **_BERT),
    "RoBERTa": _text("RobertaForMaskedLM", **_BERT),
    "ELECTRA": _text("ElectraForMaskedLM", **_BERT, embedding_size=64),
    "ALBERT": _text("AlbertForMaskedLM", **_BERT, embedding_size=64),
    "DistilBERT": _text("DistilBertForMaskedLM", dim=128, n_layers=3, n_heads=4, hidden_dim=256),
    "T5": _text(
        "T5ForConditionalGeneration",
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    ),
    "BART": _text(
        "BartForConditionalGeneration",
        d_model=128,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
        max_position_embeddings=80,
    ),
    "MLP": _mlp,
    "TransformerEncoder": _encoder,
}


def _of_corpus(name: str) -> Callable[[], Made]:
    return lambda: (*CORPUS[name].make(), CORPUS[name].loss)


SMALL: dict[str, Callable[[], Made]] = {
    f"corpus {name}": _of_corpus(name)
    for name in (
        "resnet",
        "densenet",
        "unet",
        "mobilenet",
        "vit",
        "group_and_instance_norm",
        "lstm_ctc",
        "gru_classifier",
        "embedding_bag",
        "checkpointed",
    )
}


def step(name: str) -> Step:
    """A new step of this name; the same at every call."""
    torch.manual_seed(0)
    return Step(*({**ZOO, **SMALL}[name]()))
