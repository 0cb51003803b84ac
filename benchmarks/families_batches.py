"""Small batches for models of transformers, by what they take; a text batch is one of a collator.

Of two examples of text one is padded.
"""

from __future__ import annotations

from typing import Any

import torch

TOKENS, LENGTH = 100, 16
"""Ids of tokens are below the first."""


def text(config: Any) -> dict[str, Any]:
    """Tokens with a mask, of which labels are the same."""
    tokens = torch.randint(5, TOKENS, (2, LENGTH))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, -3:] = 0
    labels = tokens.masked_fill(mask == 0, -100)
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}


def without_mask(config: Any) -> dict[str, Any]:
    """Tokens and labels, for models that take no mask."""
    given = text(config)
    return {name: given[name] for name in ("input_ids", "labels")}


def long(config: Any) -> dict[str, Any]:
    """Four times as many tokens."""
    return {name: value.repeat(1, 4) for name, value in text(config).items()}


def classified_text(config: Any) -> dict[str, Any]:
    """Tokens with one label each."""
    return text(config) | {"labels": torch.tensor([0, 1])}


def image(config: Any) -> dict[str, Any]:
    """Images of the configured size."""
    size = getattr(config, "image_size", None)
    size = size if isinstance(size, int) else 64
    return {"pixel_values": torch.randn(2, 3, size, size)}


def classified_image(config: Any) -> dict[str, Any]:
    """Images with one label each."""
    return image(config) | {"labels": torch.tensor([0, 1])}


def segmented_image(config: Any) -> dict[str, Any]:
    """Images with a label per pixel."""
    images = image(config)
    labels = torch.randint(2, (2, *images["pixel_values"].shape[2:]))
    return images | {"labels": labels}


def image_and_text(config: Any) -> dict[str, Any]:
    """Pairs of images and texts, to be told apart."""
    size = config.vision_config.image_size
    tokens = torch.randint(5, TOKENS, (2, LENGTH))
    images = torch.randn(2, 3, size, size)
    return {"input_ids": tokens, "pixel_values": images, "return_loss": True}


def captioned(config: Any) -> dict[str, Any]:
    """Images with texts about them."""
    given = text(config)
    given["pixel_values"] = torch.randn(2, 3, 32, 32)
    return given


def pictured(config: Any) -> dict[str, Any]:
    """Text with a picture of 16 patches in each example."""
    given = captioned(config)
    picture = torch.full((2, 16), config.image_token_id)
    given["input_ids"] = torch.cat([picture, given["input_ids"]], 1)
    given["attention_mask"] = torch.cat([torch.ones_like(picture), given["attention_mask"]], 1)
    given["labels"] = torch.cat([torch.full_like(picture, -100), given["labels"]], 1)
    return given


def boxed(config: Any) -> dict[str, Any]:
    """Tokens with places on a page."""
    corners = torch.randint(0, 50, (2, LENGTH, 2))
    return text(config) | {"bbox": torch.cat([corners, corners + 20], -1)}


def boxed_and_image(config: Any) -> dict[str, Any]:
    """Tokens with places on a page, and its image."""
    return boxed(config) | {"pixel_values": torch.randn(2, 3, 32, 32), "labels": None}


def sound(config: Any) -> dict[str, Any]:
    """Waves with their tokens."""
    labels = torch.randint(5, 30, (2, 4))
    return {"input_values": torch.randn(2, 2400), "labels": labels}


def spectrogram(config: Any) -> dict[str, Any]:
    """Spectrograms with their tokens."""
    features = torch.randn(2, config.num_mel_bins, 64)
    return {"input_features": features, "labels": torch.randint(5, TOKENS, (2, 8))}


def filter_banks(config: Any) -> dict[str, Any]:
    """Banks of filters over time, with their tokens."""
    features = torch.randn(2, 64, config.input_feat_per_channel)
    return {"input_features": features, "labels": torch.randint(5, TOKENS, (2, 8))}


def features(config: Any) -> dict[str, Any]:
    """Features over time, with their tokens."""
    features = torch.randn(2, 40, config.feature_projection_input_dim)
    return {"input_features": features, "labels": torch.randint(5, 30, (2, 4))}


def banks(config: Any) -> dict[str, Any]:
    """Banks of filters with one label each."""
    values = torch.randn(2, config.max_length, config.num_mel_bins)
    return {"input_values": values, "labels": torch.tensor([0, 1])}


def wave(config: Any) -> dict[str, Any]:
    """Waves alone."""
    return {"input_values": torch.randn(2, config.audio_channels, 960)}


def spoken(config: Any) -> dict[str, Any]:
    """Waves with the text that is spoken."""
    return {"input_values": torch.randn(2, 2400), "labels": torch.randint(5, 50, (2, 8))}


def video(config: Any) -> dict[str, Any]:
    """Frames with one label each."""
    videos = torch.randn(2, config.num_frames, 3, config.image_size, config.image_size)
    return {"pixel_values": videos, "labels": torch.tensor([0, 1])}


def series(config: Any) -> dict[str, Any]:
    """Series with features of time, and how they go on."""
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(2, past),
        "past_time_features": torch.randn(2, past, config.num_time_features),
        "past_observed_mask": torch.ones(2, past),
        "future_values": torch.randn(2, config.prediction_length),
        "future_time_features": torch.randn(2, config.prediction_length, config.num_time_features),
    }


def patches(config: Any) -> dict[str, Any]:
    """Series of several channels, and how they go on."""
    past = torch.randn(2, config.context_length, config.num_input_channels)
    future = torch.randn(2, config.prediction_length, config.num_input_channels)
    return {"past_values": past, "future_values": future}


def decisions(config: Any) -> dict[str, Any]:
    """States, actions and rewards."""
    return {
        "states": torch.randn(2, 8, config.state_dim),
        "actions": torch.randn(2, 8, config.act_dim),
        "rewards": torch.randn(2, 8, 1),
        "returns_to_go": torch.randn(2, 8, 1),
        "timesteps": torch.arange(8).repeat(2, 1),
        "attention_mask": torch.ones(2, 8),
    }


def table(config: Any) -> dict[str, Any]:
    """Tokens of tables."""
    kinds = torch.zeros(2, LENGTH, 7, dtype=torch.long)
    return text(config) | {"token_type_ids": kinds}


def questions(config: Any) -> dict[str, Any]:
    """Tokens with the place of an answer."""
    given = text(config)
    del given["labels"]
    places = torch.tensor([3, 5])
    return given | {"start_positions": places, "end_positions": places + 1}
