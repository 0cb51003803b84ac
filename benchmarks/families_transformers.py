"""One tiny model for each of some hundred families of transformers, by its class.

Sizes are made small by the names that configurations have in common; what a family needs besides is
written behind its class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import families_batches as batches
from benchmarks.families_batches import TOKENS
from benchmarks.zoo import Step

_SMALL: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_inner"), 64),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 16,
}

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
        elif field.name.endswith("token_id") and type(default) is int and default >= TOKENS:
            values[field.name] = 1
    for name, part in getattr(kind, "sub_configs", {}).items():
        if name.endswith("_config") and dataclasses.is_dataclass(part):
            inner = given.pop(name, {})
            if name in {field.name for field in dataclasses.fields(kind)}:
                values[name] = tiny(part, **inner).to_dict()
    return kind(**values | given)


# Layers that are left out at random, and masks that numpy draws, are refused.
_SPEECH = {"layerdrop": 0.0, "apply_spec_augment": False}
_CONVOLUTIONS = _SPEECH | {
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
    "GPT2LMHeadModel": (batches.text, {}),
    "GPTNeoForCausalLM": (batches.text, {"attention_types": [[["global", "local"], 1]]}),
    "GPTNeoXForCausalLM": (batches.text, {}),
    "GPTJForCausalLM": (batches.text, {"rotary_dim": 4}),
    "GPTBigCodeForCausalLM": (batches.text, {}),
    "OPTForCausalLM": (batches.text, {"word_embed_proj_dim": 32}),
    "BloomForCausalLM": (batches.text, {}),
    "LlamaForCausalLM": (batches.text, {}),
    "MistralForCausalLM": (batches.text, {}),
    "MixtralForCausalLM": (batches.text, {}),
    "Qwen2ForCausalLM": (batches.text, {}),
    "Qwen2MoeForCausalLM": (batches.text, {}),
    "Qwen3ForCausalLM": (batches.text, {}),
    "Qwen3NextForCausalLM": (
        batches.text,
        {
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "GemmaForCausalLM": (batches.text, {}),
    "Gemma2ForCausalLM": (batches.text, {}),
    "Gemma3ForCausalLM": (batches.text, {}),
    "PhiForCausalLM": (batches.text, {}),
    "Phi3ForCausalLM": (batches.text, {}),
    "FalconForCausalLM": (batches.text, {}),
    "MptForCausalLM": (batches.text, {}),
    "StableLmForCausalLM": (batches.text, {}),
    "Starcoder2ForCausalLM": (batches.text, {}),
    "CohereForCausalLM": (batches.text, {}),
    "Olmo2ForCausalLM": (batches.text, {}),
    "OlmoeForCausalLM": (batches.text, {}),
    "GraniteMoeForCausalLM": (batches.text, {}),
    "DeepseekV3ForCausalLM": (
        batches.text,
        _LORA | {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1},
    ),
    "GptOssForCausalLM": (batches.text, {}),
    "MambaForCausalLM": (batches.text, {}),
    "Mamba2ForCausalLM": (batches.text, {"num_heads": 8, "n_groups": 2, "chunk_size": 8}),
    "FalconMambaForCausalLM": (batches.text, {}),
    "JambaForCausalLM": (batches.text, {"attn_layer_period": 2, "attn_layer_offset": 1}),
    "RecurrentGemmaForCausalLM": (batches.text, {"lru_width": 32, "num_hidden_layers": 3}),
    "RwkvForCausalLM": (batches.without_mask, {"attention_hidden_size": 32}),
    "XGLMForCausalLM": (batches.text, {"attention_heads": 4}),
    "CodeGenForCausalLM": (batches.text, {"rotary_dim": 4}),
    "CTRLLMHeadModel": (batches.text, {"dff": 64}),
    "BioGptForCausalLM": (batches.text, {}),
    "PersimmonForCausalLM": (batches.text, {}),
    "NemotronForCausalLM": (batches.text, {}),
    "DiffLlamaForCausalLM": (batches.text, {}),
    "Lfm2ForCausalLM": (batches.text, {"layer_types": ["conv", "full_attention"]}),
    # Encoders of text.
    "BertForMaskedLM": (batches.text, {}),
    "RobertaForMaskedLM": (batches.text, {}),
    "ElectraForMaskedLM": (batches.text, {}),
    "AlbertForMaskedLM": (batches.text, {}),
    "DistilBertForMaskedLM": (batches.text, {}),
    "DebertaForMaskedLM": (
        batches.text,
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "DebertaV2ForMaskedLM": (
        batches.text,
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    ),
    "ConvBertForMaskedLM": (batches.text, {}),
    "MobileBertForMaskedLM": (
        batches.text,
        {"intra_bottleneck_size": 32, "hidden_size": 64, "true_hidden_size": 32},
    ),
    "SqueezeBertForMaskedLM": (batches.text, {}),
    "MPNetForMaskedLM": (batches.text, {}),
    "FunnelForMaskedLM": (batches.text, {"block_sizes": [1, 1], "num_decoder_layers": 1}),
    "NystromformerForMaskedLM": (batches.text, {"num_landmarks": 16, "segment_means_seq_len": 16}),
    "YosoForMaskedLM": (batches.text, {}),
    "LongformerForMaskedLM": (batches.text, {"attention_window": 8}),
    "BigBirdForMaskedLM": (batches.long, {"block_size": 4, "num_random_blocks": 2}),
    "ReformerForMaskedLM": (
        batches.long,
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
    "FNetForMaskedLM": (batches.without_mask, {}),
    "IBertForMaskedLM": (batches.text, {}),
    "RoFormerForMaskedLM": (batches.text, {}),
    "RemBertForMaskedLM": (batches.text, {"input_embedding_size": 16, "output_embedding_size": 32}),
    "XLNetLMHeadModel": (batches.text, {}),
    "XLMWithLMHeadModel": (batches.text, {}),
    "ModernBertForMaskedLM": (batches.text, {}),
    "EsmForMaskedLM": (batches.text, {"pad_token_id": 1, "mask_token_id": 4, "vocab_size": 128}),
    "CanineForSequenceClassification": (batches.classified_text, {"num_hash_buckets": 64}),
    "MegatronBertForMaskedLM": (batches.text, {}),
    "LukeForMaskedLM": (batches.text, {"entity_vocab_size": 16, "entity_emb_size": 16}),
    "SplinterForQuestionAnswering": (batches.questions, {}),
    "LayoutLMForMaskedLM": (batches.boxed, {"max_2d_position_embeddings": 128}),
    "TapasForMaskedLM": (batches.table, {}),
    # From text to text.
    "T5ForConditionalGeneration": (batches.text, _STARTS),
    "UMT5ForConditionalGeneration": (batches.text, {}),
    "LongT5ForConditionalGeneration": (batches.text, {"local_radius": 4} | _STARTS),
    "SwitchTransformersForConditionalGeneration": (
        batches.text,
        {"num_sparse_encoder_layers": 1} | _STARTS,
    ),
    "BartForConditionalGeneration": (batches.text, {}),
    "MBartForConditionalGeneration": (batches.text, {}),
    "BlenderbotForConditionalGeneration": (batches.text, {}),
    "PegasusForConditionalGeneration": (batches.text, {}),
    "PegasusXForConditionalGeneration": (batches.text, {"block_size": 8, "num_global_tokens": 4}),
    "MarianMTModel": (batches.text, {}),
    "M2M100ForConditionalGeneration": (
        batches.text,
        {"encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    ),
    "LEDForConditionalGeneration": (
        batches.text,
        {
            "attention_window": 8,
            "max_encoder_position_embeddings": 64,
            "max_decoder_position_embeddings": 64,
        },
    ),
    "BigBirdPegasusForConditionalGeneration": (
        batches.long,
        {"block_size": 4, "num_random_blocks": 1},
    ),
    "ProphetNetForConditionalGeneration": (
        batches.text,
        {
            "num_encoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
        },
    ),
    "FSMTForConditionalGeneration": (
        batches.text,
        {"src_vocab_size": 128, "tgt_vocab_size": 128, "langs": ["en", "de"]},
    ),
    # Images.
    "ViTForImageClassification": (batches.classified_image, {}),
    "BeitForImageClassification": (batches.classified_image, {}),
    "SwinForImageClassification": (
        batches.classified_image,
        {"patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "Swinv2ForImageClassification": (
        batches.classified_image,
        {"patch_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4},
    ),
    "ConvNextV2ForImageClassification": (batches.classified_image, _STAGES | {"image_size": 64}),
    "ResNetForImageClassification": (batches.classified_image, _STAGES),
    "RegNetForImageClassification": (batches.classified_image, _STAGES),
    "SegformerForSemanticSegmentation": (
        batches.segmented_image,
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "decoder_hidden_size": 16},
    ),
    "PoolFormerForImageClassification": (batches.classified_image, _STAGES),
    "MobileViTForImageClassification": (
        batches.classified_image,
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64]}
        | {"image_size": 64, "patch_size": 2},
    ),
    "EfficientNetForImageClassification": (
        batches.classified_image,
        {"width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640},
    ),
    "CvtForImageClassification": (
        batches.classified_image,
        {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 1, 1]}
        | {"drop_path_rate": [0.0, 0.0, 0.1]},
    ),
    "LevitForImageClassification": (batches.classified_image, {"image_size": 64, "patch_size": 16}),
    "PvtV2ForImageClassification": (
        batches.classified_image,
        {"hidden_sizes": [8, 16, 16, 32], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]},
    ),
    "FocalNetForImageClassification": (
        batches.classified_image,
        {"patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32]}
        | {"focal_levels": [2, 2], "focal_windows": [3, 3]},
    ),
    "Dinov2ForImageClassification": (batches.classified_image, {}),
    "ViTMAEForPreTraining": (
        batches.image,
        {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 32}
        | {"decoder_num_attention_heads": 2},
    ),
    "DPTForSemanticSegmentation": (
        batches.segmented_image,
        {
            "backbone_out_indices": [0, 1, 2, 3],
            "num_hidden_layers": 4,
            "neck_hidden_sizes": [8, 8, 16, 16],
        }
        | {"fusion_hidden_size": 16, "image_size": 64, "patch_size": 16},
    ),
    "HieraForImageClassification": (
        batches.classified_image,
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1, 1]},
    ),
    "VideoMAEForVideoClassification": (batches.video, {"num_frames": 4}),
    # Sound.
    "Wav2Vec2ForCTC": (batches.sound, _CONVOLUTIONS),
    "HubertForCTC": (batches.sound, _CONVOLUTIONS),
    "WavLMForCTC": (batches.sound, _CONVOLUTIONS),
    "SEWForCTC": (batches.sound, _CONVOLUTIONS),
    "Wav2Vec2ConformerForCTC": (batches.sound, _CONVOLUTIONS | {"vocab_size": 32}),
    "Wav2Vec2BertForCTC": (
        batches.features,
        _SPEECH | {"feature_projection_input_dim": 20, "vocab_size": 32},
    ),
    "WhisperForConditionalGeneration": (
        batches.spectrogram,
        {"max_source_positions": 32, "max_target_positions": 32, "num_mel_bins": 16},
    ),
    "Speech2TextForConditionalGeneration": (
        batches.filter_banks,
        {"input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 64},
    ),
    "ASTForAudioClassification": (batches.banks, {"max_length": 64, "num_mel_bins": 32}),
    "EncodecModel": (batches.wave, {"num_filters": 4, "hidden_size": 16, "codebook_size": 32}),
    "MoonshineForConditionalGeneration": (
        batches.spoken,
        {
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "pad_token_id": 0,
        },
    ),
    # Several kinds of inputs.
    "CLIPModel": (batches.image_and_text, {}),
    "SiglipModel": (batches.image_and_text, {}),
    "BlipForConditionalGeneration": (batches.captioned, {}),
    "LlavaForConditionalGeneration": (
        batches.pictured,
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
        batches.boxed_and_image,
        {"input_size": 32, "coordinate_size": 5, "shape_size": 6}
        | {"max_2d_position_embeddings": 128},
    ),
    # Series.
    "TimeSeriesTransformerForPrediction": (batches.series, _SERIES),
    "InformerForPrediction": (batches.series, _SERIES),
    "AutoformerForPrediction": (batches.series, _SERIES | {"label_length": 2, "moving_average": 3}),
    "PatchTSTForPrediction": (
        batches.patches,
        {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
        | {"num_input_channels": 2},
    ),
    "PatchTSMixerForPrediction": (
        batches.patches,
        {"context_length": 16, "prediction_length": 4, "patch_length": 4, "patch_stride": 4}
        | {"num_input_channels": 2},
    ),
    "DecisionTransformerModel": (batches.decisions, {"state_dim": 5, "act_dim": 3}),
}


def _loss(output: Any) -> Tensor:
    """The model's own, or else mean squares of all that it returns."""
    own = getattr(output, "loss", None)
    if isinstance(own, Tensor):
        return own
    values = output.values() if isinstance(output, dict) else output
    parts = [v for v in values if isinstance(v, Tensor) and v.requires_grad]
    return torch.stack([part.float().square().mean() for part in parts]).sum()


def families() -> dict[str, Callable[[], Step]]:
    """What builds a model and a batch, by the name of its class."""
    return {name: _builder(name) for name in FAMILIES}


def _builder(name: str) -> Callable[[], Step]:
    def build() -> Step:
        import transformers

        inputs, given = FAMILIES[name]
        kind = getattr(transformers, name)
        config = tiny(kind.config_class, **given)
        batch = inputs(config)
        return Step(kind(config).train(), (), batch, _loss)

    return build
