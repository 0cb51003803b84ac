"""One small model for each family (module) of timm, by its name there, and the size of its images.

Most are a family's smallest. Where even that is large, fewer or narrower layers of the same kind
stand for it; options are those that timm takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.zoo import Step

_CLASSES = 10
_NARROW: dict[str, Any] = {"embed_dim": 48, "depth": 2, "num_heads": 3}
_FIXED = frozenset(
    (
        *("beit_base_patch16_224", "cait_xxs24_224", "coat_lite_tiny", "convit_tiny"),
        *("gcvit_xxtiny", "crossvit_tiny_240", "deit_tiny_distilled_patch16_224"),
        *("vit_tiny_patch16_dinov3_qkvb", "hiera_tiny_224", "gmixer_12_224", "test_maxvit"),
        *("mvitv2_tiny", "nest_tiny", "pit_ti_224", "swin_tiny_patch4_window7_224"),
        *("swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tnt_s_patch16_224"),
        *("twins_svt_small", "visformer_tiny", "test_vit", "vit_tiny_r_s16_p8_224"),
        *("test_vit_relpos", "samvit_base_patch16_224", "volo_d1_224", "vitamin_small_224"),
        *("levit_128s", "xcit_nano_12_p16_224"),
    )
)  # fmt: skip
"""They are built for a size of images."""

FAMILIES: dict[str, tuple[int, dict[str, Any]]] = {
    "beit_base_patch16_224": (64, _NARROW),
    "halonet26t": (256, {}),
    "test_byobnet": (64, {}),
    "cait_xxs24_224": (64, {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "coat_lite_tiny": (64, {}),
    "convit_tiny": (64, {"depth": 3, "local_up_to_layer": 2}),
    "convmixer_768_32": (64, {}),
    "test_convnext": (64, {}),
    "cpubone_nano": (64, {}),
    "crossvit_tiny_240": (240, {"depth": ((1, 1, 0), (1, 1, 0))}),
    "csatv2": (128, {}),
    "darknet17": (64, {}),
    "cspnext_tiny": (64, {}),
    "davit_tiny": (64, {"depths": (1, 1, 1, 1)}),
    "deepseek_vit_412m": (56, _NARROW),
    "deit_tiny_distilled_patch16_224": (64, {"depth": 3}),
    "densenet121": (64, {"block_config": (2, 2, 2, 2)}),
    "dla46_c": (64, {}),
    "dpn48b": (64, {}),
    "edgenext_xx_small": (64, {}),
    "efficientformer_l1": (224, {}),
    "efficientformerv2_s0": (224, {}),
    "test_efficientnet": (64, {}),
    "efficientvim_m1": (128, {}),  # smaller ones normalise two numbers in the last stage
    "efficientvit_b0": (64, {}),
    "efficientvit_m0": (64, {}),
    "vit_tiny_patch16_dinov3_qkvb": (64, _NARROW),
    "fasternet_t0": (64, {}),
    "fastvit_t8": (64, {}),
    "focalnet_tiny_srf": (64, {}),
    "gcvit_xxtiny": (224, {}),
    "gemma4_vit_167m": (64, _NARROW),
    "ghostnet_050": (64, {}),
    "hardcorenas_a": (64, {}),
    "hgnetv2_b0": (64, {}),
    "hiera_tiny_224": (64, {"embed_dim": 32, "stages": (1, 1, 2, 1)}),
    "sam2_hiera_tiny": (128, {"embed_dim": 32, "num_heads": 1}),
    "hrnet_w18_small": (64, {}),
    "iformer_t": (64, {}),
    "inception_next_atto": (64, {}),
    "inception_resnet_v2": (96, {}),
    "inception_v3": (96, {}),
    "inception_v4": (96, {}),
    "lcnetv2_small": (64, {}),
    "levit_128s": (64, {}),
    "lowformer_b0": (64, {}),
    "test_mambaout": (64, {}),
    "test_maxvit": (64, {}),
    "poolformerv2_s12": (64, {}),
    "gmixer_12_224": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "mobilenetv5_base": (128, {}),
    "mobilevit_xxs": (64, {}),
    "mvitv2_tiny": (64, {}),
    "naflexvit_base_patch16_gap": (64, _NARROW),
    "nasnetalarge": (96, {"num_features": 192, "channel_multiplier": 2, "stem_size": 16}),
    "nest_tiny": (64, {}),
    "nextvit_small": (64, {}),
    "test_nfnet": (64, {}),
    "pit_ti_224": (64, {"depth": (1, 1, 1)}),
    "pnasnet5large": (96, {}),
    "pvt_v2_b0": (64, {}),
    "qwen3_vit_88m": (64, _NARROW),
    "rdnet_tiny": (64, {}),
    "regnetx_002": (64, {}),
    "repghostnet_050": (64, {}),
    "repvit_m0_9": (64, {}),
    "res2net50_48w_2s": (64, {"layers": (1, 1, 1, 1)}),
    "resnest14d": (64, {}),
    "test_resnet": (64, {}),
    "resnetv2_18": (64, {}),
    "rexnet_100": (64, {}),
    "selecsls42": (64, {}),
    "legacy_seresnet18": (64, {}),
    "sequencer2d_s": (64, {"layers": (1, 1, 1, 1), "embed_dims": (24, 48, 48, 48)}),
    "shvit_s1": (128, {}),
    "skresnet18": (64, {}),
    "starnet_s050": (64, {}),
    "swiftformer_xs": (64, {}),
    "swin_tiny_patch4_window7_224": (64, {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}),
    "swinv2_tiny_window8_256": (64, {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}),
    "swinv2_cr_tiny_224": (64, {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}),
    "tiny_vit_5m_224": (64, {}),
    "tnt_s_patch16_224": (64, {"embed_dim": 48, "depth": 2, "num_heads_outer": 3}),
    "tresnet_m": (64, {"layers": (1, 1, 1, 1)}),
    "twins_svt_small": (64, {"depths": (2, 2, 2, 2)}),
    "vgg11": (64, {}),
    "visformer_tiny": (64, {}),
    "test_vit": (64, {}),
    "vit_tiny_r_s16_p8_224": (64, {"depth": 2}),
    "test_vit_relpos": (64, {}),
    "samvit_base_patch16_224": (64, _NARROW),
    "vitamin_small_224": (64, {}),
    "volo_d1_224": (64, {}),
    "ese_vovnet19b_slim_dw": (64, {}),
    "legacy_xception": (96, {}),
    "xception41": (96, {}),
    "xcit_nano_12_p16_224": (64, {"depth": 2}),
}


def _loss(output: Any) -> Tensor:
    """Cross entropy of each head."""
    heads = output if isinstance(output, tuple) else (output,)
    labels = torch.tensor([3, 7])
    return torch.stack([F.cross_entropy(head, labels) for head in heads]).sum()


def families() -> dict[str, Callable[[], Step]]:
    """What builds a model and a batch, by its name in timm."""
    return {name: _builder(name) for name in FAMILIES}


def _builder(name: str) -> Callable[[], Step]:
    def build() -> Step:
        import timm

        size, options = FAMILIES[name]
        sized = {"img_size": size} if name in _FIXED else {}
        model = timm.create_model(name, num_classes=_CLASSES, **sized, **options)
        return Step(model.train(), (torch.randn(2, 3, size, size),), {}, _loss)

    return build
