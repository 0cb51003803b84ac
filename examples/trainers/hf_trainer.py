"""Hugging Face's Trainer: mixed precision, checkpointing, accumulation, resuming, `generate`.

Run: ``python -m graphopt.examples.trainers.hf_trainer``
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import graphopt
from graphopt.examples.trainers.beside import (
    BACKEND,
    Run,
    checksum,
    compare,
    explained,
    timed,
)
from graphopt.extras import extra

with extra("harness", "this example"):
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainerControl,
        TrainerState,
        TrainingArguments,
        set_seed,
    )
    from transformers.utils import logging

STEPS = 6
HALF = 3

REENTRANT: dict[str, Any]
REENTRANT, NOT_REENTRANT = (
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": how}}
    for how in (True, False)
)
CASES: dict[str, dict[str, Any]] = {
    "float32, evaluation and generate() in between": {"sample": True},
    "bf16": {"bf16": True},
    "checkpointing, reentrant": REENTRANT,
    "checkpointing, not reentrant": NOT_REENTRANT,
    "two micro-batches": {"gradient_accumulation_steps": 2},
}


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards, from random numbers and in random steps."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        start = torch.randint(0, 32, (count, 1), generator=generator)
        step = torch.randint(1, 4, (count, 1), generator=generator)
        self.ids = (start + step * torch.arange(12)) % 31 + 1

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Sample(TrainerCallback):
    """Lets the model go on with prompts of two lengths after each evaluation."""

    def __init__(self) -> None:
        self.tokens: list[object] = []

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for length in (3, 5):
            prompt = torch.arange(1, 2 * length + 1).view(2, length)
            mask = torch.ones_like(prompt)
            made = kwargs["model"].generate(
                prompt, attention_mask=mask, max_new_tokens=5, do_sample=True
            )
            self.tokens.append(made.tolist())


def model() -> GPT2LMHeadModel:
    """A GPT-2 with one block."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            n_positions=32,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def train(
    optimized: bool, folder: Path, *, sample: bool = False, resume: str = "", **options: Any
) -> Run:
    """Train; evaluation and a checkpoint come every `HALF` steps where samples are wanted.

    Args:
        optimized: whether graphopt is used.
        folder: for checkpoints.
        sample: evaluate and generate in between.
        resume: a checkpoint to go on from.
        options: of `TrainingArguments`.
    """
    set_seed(0)
    net = model()
    if optimized:
        graphopt.optimize(net, backend=BACKEND)
    arguments = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=HALF,
        eval_strategy="steps" if sample else "no",
        eval_steps=HALF,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    sampled = Sample()
    trainer = Trainer(
        net,
        arguments,
        train_dataset=Tokens(32, 1),
        eval_dataset=Tokens(6, 2),  # its last batch is a smaller one
        callbacks=[sampled] if sample else None,
    )
    trainer.remove_callback(PrinterCallback)
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume or None)
    seconds = timed(begin)
    history: list[dict[str, Any]] = trainer.state.log_history
    losses = [h[name] for h in history for name in ("loss", "eval_loss") if name in h]
    trainer.save_model(str(folder / "last"))
    back = GPT2LMHeadModel.from_pretrained(folder / "last")
    return Run(tuple(losses), checksum(net), seconds, net, (*sampled.tokens, checksum(back)))


def resumed(optimized: bool, folder: Path, **options: Any) -> Run:
    """Train once more from the checkpoint in the middle of a run that `train` made there."""
    return train(optimized, folder, resume=str(folder / f"checkpoint-{HALF}"), **options)


def main() -> None:
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for number, (title, options) in enumerate(CASES.items()):
            plain, ours = compare(title, partial(train, folder=folder / str(number), **options))
            if not plain.same(ours):
                raise SystemExit("the two runs differ")
        whole = train(True, folder / "resumed")
        again = resumed(True, folder / "resumed")
        print(f"resumed in the middle: {'equal' if whole.same(again) else 'DIFFERENT'}")
        print(explained(whole))


if __name__ == "__main__":
    main()
