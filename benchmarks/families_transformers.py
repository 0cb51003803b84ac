"""One tiny model for each of some hundred families of transformers, by its class.

Sizes are made small by the names that configurations have in common; what a family needs besides is
written behind its class. A text batch is one of a collator: two examples, one of them padded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.families_step import Family

_SMALL: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok", "n_inner"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}
_SMALL["n_inner"] = 64
_TOKENS, _LENGTH = 100, 16

Inputs = Callable[[Any], dict[str, Any]]


def tiny(kind: Any, **given: Any) -> Any:
    """A small configuration of a class: `given`, small sizes, and otherwise its defaults."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        default = field.default
        if default is dataclasses.MISSING and hasattr(kind, field.name):
            default = getattr(kind, field.name)
        optional = field.name in ("num_key_value_heads", "head_dim") and default is None
        if field.name in _SMALL and (type(default) is int or optional):
            values[field.name] = _SMALL[field.name]
        elif field.name.endswith("token_id") and type(default) is int and default >= _TOKENS:
            values[field.name] = 1
    for name, part in getattr(kind, "sub_configs", {}).items():
        if name.endswith("_config") and dataclasses.is_dataclass(part):
            inner = given.pop(name, {})
            if name in {field.name for field in dataclasses.fields(kind)}:
                values[name] = tiny(part, **inner).to_dict()
    return kind(**values | given)


def _text(config: Any) -> dict[str, Any]:
    tokens = torch.randint(5, _TOKENS, (2, _LENGTH))
    mask = torch.ones(2, _LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def _without_mask(config: Any) -> dict[str, Any]:
    given = _text(config)
    return {name: given[name] for name in ("input_ids", "labels")}


def _long(config: Any) -> dict[str, Any]:
    return {name: value.repeat(1, 4) for name, value in _text(config).items()}


def _classified_text(config: Any) -> dict[str, Any]:
    return _text(config) | {"labels": torch.tensor([0, 1])}


def _image(config: Any) -> dict[str, Any]:
    size = getattr(config, "image_size", None)
    size = size if isinstance(size, int) else 64
    return {"pixel_values": torch.randn(2, 3, size, size)}


def _classified_image(config: Any) -> dict[str, Any]:
    return _image(config) | {"labels": torch.tensor([0, 1])}


def _segmented_image(config: Any) -> dict[str, Any]:
    images = _image(config)
    labels = torch.randint(2, (2, *images["pixel_values"].shape[2:]))
    return images | {"labels": labels}


def _image_and_text(config: Any) -> dict[str, Any]:
    size = config.vision_config.image_size
    tokens = torch.randint(5, _TOKENS, (2, _LENGTH))
    images = torch.randn(2, 3, size, size)
    return {"input_ids": tokens, "pixel_values": images, "return_loss": True}


def _captioned(config: Any) -> dict[str, Any]:
    given = _text(config)
    given["pixel_values"] = torch.randn(2, 3, 32, 32)
    return given


def _pictured(config: Any) -> dict[str, Any]:
    """Text with a picture of 16 patches in each example."""
    given = _captioned(config)
    picture = torch.full((2, 16), config.image_token_id)
    given["input_ids"] = torch.cat([picture, given["input_ids"]], 1)
    given["attention_mask"] = torch.cat([torch.ones_like(picture), given["attention_mask"]], 1)
    given["labels"] = torch.cat([torch.full_like(picture, -100), given["labels"]], 1)
    return given


def _boxed(config: Any) -> dict[str, Any]:
    corners = torch.randint(0, 50, (2, _LENGTH, 2))
    return _text(config) | {"bbox": torch.cat([corners, corners + 20], -1)}


def _boxed_and_image(config: Any) -> dict[str, Any]:
    return _boxed(config) | {"pixel_values": torch.randn(2, 3, 32, 32), "labels": None}


def _sound(config: Any) -> dict[str, Any]:
    labels = torch.randint(5, 30, (2, 4))
    return {"input_values": torch.randn(2, 2400), "labels": labels}


def _spectrogram(config: Any) -> dict[str, Any]:
    features = torch.randn(2, config.num_mel_bins, 64)
    return {"input_features": features, "labels": torch.randint(5, _TOKENS, (2, 8))}


def _filter_banks(config: Any) -> dict[str, Any]:
    features = torch.randn(2, 64, config.input_feat_per_channel)
    return {"input_features": features, "labels": torch.randint(5, _TOKENS, (2, 8))}


def _features(config: Any) -> dict[str, Any]:
    features = torch.randn(2, 40, config.feature_projection_input_dim)
    return {"input_features": features, "labels": torch.randint(5, 30, (2, 4))}


def _banks(config: Any) -> dict[str, Any]:
    values = torch.randn(2, config.max_length, config.num_mel_bins)
    return {"input_values": values, "labels": torch.tensor([0, 1])}


def _wave(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, config.audio_channels, 960)}


def _spoken(config: Any) -> dict[str, Any]:
    return {"input_values": torch.randn(2, 2400), "labels": torch.randint(5, 50, (2, 8))}


def _video(config: Any) -> dict[str, Any]:
    videos = torch.randn(2, config.num_frames, 3, config.image_size, config.image_size)
    return {"pixel_values": videos, "labels": torch.tensor([0, 1])}


def _series(config: Any) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length),
        "future_time_features": torch.randn(2, config.prediction_length, config.num_time_features),
    }


def _patches(config: Any) -> dict[str, Any]:
    past = torch.randn(2, config.context_length, config.num_input_channels)
    future = torch.randn(2, config.prediction_length, config.num_input_channels)
    return {"past_values": past, "future_values": future}


def _decisions(config: Any) -> dict[str, Any]:
    return {
        "states": torch.randn(2, 8, config.state_dim),
        "actions": torch.randn(2, 8, config.act_dim),
        "rewards": torch.randn(2, 8, 1),
        "returns_to_go": torch.randn(2, 8, 1),
        "timesteps": torch.arange(8).repeat(2, 1),
        "attention_mask": torch.ones(2, 8),
    }


def _table(config: Any) -> dict[str, Any]:
    kinds = torch.zeros(2, _LENGTH, 7, dtype=torch.long)
    return _text(config) | {"token_type_ids": kinds}


def _questions(config: Any) -> dict[str, Any]:
    given = _text(config)
    del given["labels"]
    places = torch.tensor([3, 5])
    return given | {"start_positions": places, "end_positions": places + 1}


# Layers that are left out at random, as is usual in speech and series, are refused.
_ALL_LAYERS = {"layerdrop": 0.0}
_CONVOLUTIONS = _ALL_LAYERS | {
    "conv_dim": [32, 32],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_STAGES = {"hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
_SERIES = (
    {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "d_model": 16}
    | {"num_time_features": 2}
    | {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
)
_STARTS = {"decoder_start_token_id": 0}
_LORA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4} | {
    "v_head_dim": 8
}

FAMILIES: dict[str, tuple[Inputs, dict[str, Any]]] = {
    # Causal language models.
    "GPT2LMHeadModel": (_text, {}),
    "GPTNeoForCausalLM": (_text, {"attention_types": [[["global", "local"], 1]]}),
    "GPTNeoXForCausalLM": (_text, {}),
    "GPTJForCausalLM": (_text, {"rotary_dim": 4}),
    "GPTBigCodeForCausalLM": (_text, {}),
    "OPTForCausalLM": (_text, {"word_embed_proj_dim": 32}),
    "BloomForCausalLM": (_text, {}),
    "LlamaForCausalLM": (_text, {}),
    "MistralForCausalLM": (_text, {}),
    "MixtralForCausalLM": (_text, {}),
    "Qwen2ForCausalLM": (_text, {}),
    "Qwen2MoeForCausalLM": (_text, {}),
    "Qwen3ForCausalLM": (_text, {}),
    "Qwen3NextForCausalLM": (
        _text,
        {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "GemmaForCausalLM": (_text, {}),
    "Gemma2ForCausalLM": (_text, {}),
    "Gemma3ForCausalLM": (_text, {}),
    "PhiForCausalLM": (_text, {}),
    "Phi3ForCausalLM": (_text, {}),
    "FalconForCausalLM": (_text, {}),
    "MptForCausalLM": (_text, {}),
    "StableLmForCausalLM": (_text, {}),
    "Starcoder2ForCausalLM": (_text, {}),
    "CohereForCausalLM": (_text, {}),
    "Olmo2ForCausalLM": (_text, {}),
    "OlmoeForCausalLM": (_text, {}),
    "GraniteMoeForCausalLM": (_text, {}),
    "DeepseekV3ForCausalLM": (
        _text,
        _LORA | {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    ),
    "GptOssForCausalLM": (_text, {}),
    "MambaForCausalLM": (_text, {}),
    "Mamba2ForCausalLM": (_text, {"num_heads": 8, "n_groups": 2, "chunk_size": 8}),
    "FalconMambaForCausalLM": (_text, {}),
    "JambaForCausalLM": (_text, {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "RecurrentGemmaForCausalLM": (_text, {"lru_width": 32, "num_hidden_layers": 3}),
    "RwkvForCausalLM": (_without_mask, {"attention_hidden_size": 32}),
    "XGLMForCausalLM": (_text, {"attention_heads": 4}),
    "CodeGenForCausalLM": (_text, {"rotary_dim": 4}),
    "CTRLLMHeadModel": (_text, {"dff": 64}),
    "BioGptForCausalLM": (_text, {}),
    "PersimmonForCausalLM": (_text, {}),
    "NemotronForCausalLM": (_text, {}),
    "DiffLlamaForCausalLM": (_text, {}),
    "Lfm2ForCausalLM": (_text, {"layer_types": ["conv", "full_attention"]}),
    # Encoders of text.
    "BertForMaskedLM": (_text, {}),
    "RobertaForMaskedLM": (_text, {}),
    "ElectraForMaskedLM": (_text, {}),
    "AlbertForMaskedLM": (_text, {}),
    "DistilBertForMaskedLM": (_text, {}),
    "DebertaForMaskedLM": (_text, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "DebertaV2ForMaskedLM": (_text, {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "ConvBertForMaskedLM": (_text, {}),
    "MobileBertForMaskedLM": (
        _text,
        {"intra_bottleneck_size": 32, "hidden_size": 64, "true_hidden_size": 32},
    ),
    "SqueezeBertForMaskedLM": (_text, {}),
    "MPNetForMaskedLM": (_text, {}),
    "FunnelForMaskedLM": (_text, {"block_sizes": [1, 1], "num_decoder_layers": 1}),
    "NystromformerForMaskedLM": (_text, {"num_landmarks": 16, "segment_means_seq_len": 16}),
    "YosoForMaskedLM": (_text, {}),
    "LongformerForMaskedLM": (_text, {"attention_window": 8}),
    "BigBirdForMaskedLM": (_long, {"block_size": 4, "num_random_blocks": 2}),
    "ReformerForMaskedLM": (
        _long,
        {
            "is_decoder": False,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [8, 8],
            "axial_pos_embds_dim": [16, 16],
            "attention_head_size": 8,
            "feed_forward_size": 64,
            "local_attn_chunk_length": 16,
            "lsh_attn_chunk_length": 16,
            "num_buckets": 4,
        },
    ),
    "FNetForMaskedLM": (_without_mask, {}),
    "IBertForMaskedLM": (_text, {}),
    "RoFormerForMaskedLM": (_text, {}),
    "RemBertForMaskedLM": (_text, {"input_embedding_size": 16, "output_embedding_size": 32}),
    "XLNetLMHeadModel": (_text, {}),
    "XLMWithLMHeadModel": (_text, {}),
    "ModernBertForMaskedLM": (_text, {}),
    "EsmForMaskedLM": (_text, {"pad_token_id": 1, "mask_token_id": 4, "vocab_size": 128}),
    "CanineForSequenceClassification": (_classified_text, {"num_hash_buckets": 64}),
    "MegatronBertForMaskedLM": (_text, {}),
    "LukeForMaskedLM": (_text, {"entity_vocab_size": 16, "entity_emb_size": 16}),
    "SplinterForQuestionAnswering": (_questions, {}),
    "LayoutLMForMaskedLM": (_boxed, {"max_2d_position_embeddings": 128}),
    "TapasForMaskedLM": (_table, {}),
    # From text to text.
    "T5ForConditionalGeneration": (_text, _STARTS),
    "UMT5ForConditionalGeneration": (_text, {}),
    "LongT5ForConditionalGeneration": (_text, {"local_radius": 4} | _STARTS),
    "SwitchTransformersForConditionalGeneration": (
        _text,
        {"num_sparse_encoder_layers": 1} | _STARTS,
    ),
    "BartForConditionalGeneration": (_text, {}),
    "MBartForConditionalGeneration": (_text, {}),
    "BlenderbotForConditionalGeneration": (_text, {}),
    "PegasusForConditionalGeneration": (_text, {}),
    "PegasusXForConditionalGeneration": (_text, {"block_size": 8, "num_global_tokens": 4}),
    "MarianMTModel": (_text, {}),
    "M2M100ForConditionalGeneration": (_text, {}),
    "LEDForConditionalGeneration": (
        _text,
        {
            "attention_window": 8,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "BigBirdPegasusForConditionalGeneration": (_long, {"block_size": 4, "num_random_blocks": 1}),
    "ProphetNetForConditionalGeneration": (
        _text,
        {
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
    ),
    "FSMTForConditionalGeneration": (
        _text,
        {"src_vocab_size": 128, "tgt_vocab_size": 128, "langs": ["en", "de"]},
    ),
    # Images.
    "ViTForImageClassification": (_classified_image, {}),
    "BeitForImageClassification": (_classified_image, {}),
    "SwinForImageClassification": (
        _classified_image,
        {"patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "Swinv2ForImageClassification": (
        _classified_image,
        {"patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "ConvNextV2ForImageClassification": (_classified_image, _STAGES | {"image_size": 64}),
    "ResNetForImageClassification": (_classified_image, _STAGES),
    "RegNetForImageClassification": (_classified_image, _STAGES),
    "SegformerForSemanticSegmentation": (
        _segmented_image,
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "decoder_hidden_size": 16},
    ),
    "PoolFormerForImageClassification": (_classified_image, _STAGES),
    "MobileViTForImageClassification": (
        _classified_image,
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}
        | {"image_size": 64, "patch_size": 2},
    ),
    "EfficientNetForImageClassification": (
        _classified_image,
        {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
    ),
    "CvtForImageClassification": (
        _classified_image,
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]}
        | {"drop_path_rate": [0.0, 0.0, 0.1]},
    ),
    "LevitForImageClassification": (_classified_image, {"image_size": 64, "patch_size": 16}),
    "PvtV2ForImageClassification": (
        _classified_image,
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]},
    ),
    "FocalNetForImageClassification": (
        _classified_image,
        {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]}
        | {"focal_levels": [2, 2], "focal_windows": [3, 3]},
    ),
    "Dinov2ForImageClassification": (_classified_image, {}),
    "ViTMAEForPreTraining": (
        _image,
        {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32}
        | {"decoder_num_attention_heads": 2},
    ),
    "DPTForSemanticSegmentation": (
        _segmented_image,
        {
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
            "neck_hidden_sizes": [8, 8, 16, 16],
        }
        | {"fusion_hidden_size": 16, "image_size": 64, "patch_size": 16},
    ),
    "HieraForImageClassification": (
        _classified_image,
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1]},
    ),
    "VideoMAEForVideoClassification": (_video, {"num_frames": 4}),
    # Sound.
    "Wav2Vec2ForCTC": (_sound, _CONVOLUTIONS),
    "HubertForCTC": (_sound, _CONVOLUTIONS),
    "WavLMForCTC": (_sound, _CONVOLUTIONS),
    "SEWForCTC": (_sound, _CONVOLUTIONS),
    "Wav2Vec2ConformerForCTC": (_sound, _CONVOLUTIONS | {"vocab_size": 32}),
    "Wav2Vec2BertForCTC": (
        _features,
        _ALL_LAYERS | {"feature_projection_input_dim": 20, "vocab_size": 32},
    ),
    "WhisperForConditionalGeneration": (
        _spectrogram,
        {"max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16},
    ),
    "Speech2TextForConditionalGeneration": (
        _filter_banks,
        {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    ),
    "ASTForAudioClassification": (_banks, {"max_length": 64, "num_mel_bins": 32}),
    "EncodecModel": (_wave, {"num_filters": 4, "hidden_size": 16, "codebook_size": 32}),
    "MoonshineForConditionalGeneration": (
        _spoken,
        {
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "pad_token_id": 0,
        },
    ),
    # Several kinds of inputs.
    "CLIPModel": (_image_and_text, {}),
    "SiglipModel": (_image_and_text, {}),
    "BlipForConditionalGeneration": (_captioned, {}),
    "LlavaForConditionalGeneration": (
        _pictured,
        {
            "image_token_id": 120,
            "vision_config": {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
            | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
            | {"num_attention_heads": 4, "projection_dim": 16},
            "text_config": {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
            | {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128},
        },
    ),
    "LayoutLMv3Model": (
        _boxed_and_image,
        {"input_size": 32, "coordinate_size": 5, "shape_size": 6}
        | {"max_2d_position_embeddings": 128},
    ),
    # Series.
    "TimeSeriesTransformerForPrediction": (_series, _SERIES),
    "InformerForPrediction": (_series, _SERIES),
    "AutoformerForPrediction": (_series, _SERIES | {"label_length": 2, "moving_average": 3}),
    "PatchTSTForPrediction": (
        _patches,
        {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
        | {"num_input_channels": 2},
    ),
    "PatchTSMixerForPrediction": (
        _patches,
        {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
        | {"num_input_channels": 2},
    ),
    "DecisionTransformerModel": (_decisions, {"state_dim": 5, "act_dim": 3}),
}


def _loss(output: Any) -> Tensor:
    """The model's own, or else mean squares of all that it returns."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    values = output.values() if isinstance(output, dict) else output
    parts = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    return torch.stack([part.float().square().mean() for part in parts]).sum()


def families() -> dict[str, Callable[[], Family]]:
    """What builds a model and a batch, by the name of its class."""
    return {name: _builder(name) for name in FAMILIES}


def _builder(name: str) -> Callable[[], Family]:
    def build() -> Family:
        import transformers

        inputs, given = FAMILIES[name]
        kind = getattr(transformers, name)
        config = tiny(kind.config_class, **given)
        batch = inputs(config)
        return Family(kind(config).train(), (), batch, _loss)

    return build
