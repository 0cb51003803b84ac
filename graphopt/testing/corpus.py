"""About thirty real models in train mode, each small enough for a step of a few milliseconds.

Together they hold what captures and passes get wrong: batch norm and dropout in training, tied and
reused weights, skip connections, checkpointing, in-place writes, structured outputs, control flow,
recurrence, autocast. `CORPUS` lists them by name; nothing is built before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.testing import corpus_forms as forms
from graphopt.testing import corpus_sequences as sequences
from graphopt.testing import corpus_transformers as transformers
from graphopt.testing import corpus_vision as vision

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class CorpusModel:
    """One entry of the corpus.

    Attributes:
        name: its name.
        build: makes the model in train mode and arguments for one call; reads torch's random state.
        loss: from what the call returns to a scalar that can be differentiated.
        without_gradient: trainable parameters that get no gradient, on purpose.
    """

    name: str
    build: Callable[[], Made]
    loss: Callable[[Any], Tensor]
    without_gradient: frozenset[str] = frozenset()

    def make(self) -> Made:
        """A new model with positional and keyword arguments; the same at every call."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.build()


def _mean_square(output: Tensor) -> Tensor:
    return output.float().square().mean()


def _itself(output: Tensor) -> Tensor:
    return output


def _its_loss(output: Any) -> Tensor:
    loss: Tensor = output.loss
    return loss


def _all_entries(output: Any) -> Tensor:
    values = output.values() if isinstance(output, dict) else vars(output).values()
    return torch.stack([_mean_square(value) for value in values]).sum()


_MODELS = (
    CorpusModel("resnet", vision.resnet, _mean_square),
    CorpusModel("densenet", vision.densenet, _mean_square),
    CorpusModel("unet", vision.unet, _mean_square),
    CorpusModel("mobilenet", vision.mobilenet, _mean_square),
    CorpusModel("group_and_instance_norm", vision.group_and_instance_norm, _mean_square),
    CorpusModel("vit", vision.vit, _mean_square),
    CorpusModel("transformer_encoder", sequences.transformer_encoder, _mean_square),
    CorpusModel("tied_language_model", sequences.tied_language_model, _itself),
    CorpusModel("lstm_ctc", sequences.lstm_ctc, _itself),
    CorpusModel("gru_classifier", sequences.gru_classifier, _itself),
    CorpusModel("embedding_bag", sequences.embedding_bag, _mean_square),
    CorpusModel("used_twice", forms.used_twice, _mean_square),
    CorpusModel("checkpointed", forms.checkpointed, _mean_square),
    CorpusModel("in_place", forms.in_place, _mean_square),
    CorpusModel("dict_output", forms.dict_output, _all_entries),
    CorpusModel("dataclass_output", forms.dataclass_output, _all_entries),
    CorpusModel("keyword_input", forms.keyword_input, _mean_square),
    CorpusModel("custom_function", forms.custom_function, _mean_square),
    CorpusModel("branching", forms.branching, _mean_square),
    CorpusModel("parametrised", forms.parametrised, _mean_square),
    CorpusModel("autocast", forms.autocast, _mean_square),
    CorpusModel("running_statistics", forms.running_statistics, _mean_square),
    CorpusModel("partly_frozen", forms.partly_frozen, _mean_square, frozenset({"unused.weight"})),
    CorpusModel("gpt2", transformers.gpt2, _its_loss),
    CorpusModel("llama", transformers.llama, _its_loss),
    CorpusModel("bert", transformers.bert, _its_loss),
    CorpusModel("t5", transformers.t5, _its_loss),
    CorpusModel("hf_vit", transformers.hf_vit, _its_loss),
)

CORPUS: dict[str, CorpusModel] = {model.name: model for model in _MODELS}
"""The corpus by name. Those of the ``transformers`` package need the ``corpus`` extra."""
