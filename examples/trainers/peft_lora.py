"""PEFT: LoRA on a language model, adapters off and on, merged in the end.

Run: ``python -m graphopt.examples.trainers.peft_lora``
"""

from __future__ import annotations

import time
from functools import partial
from typing import Literal

import torch

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
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

STEPS = 4

When = Literal["before", "after"]


def model() -> LlamaForCausalLM:
    """A Llama with one block."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def train(optimized: bool, *, when: When = "after") -> Run:
    """Train adapters; evaluate with them, without them, with them again, and merged.

    Args:
        optimized: whether graphopt is used.
        when: graphopt comes before or after `get_peft_model`.
    """
    set_seed(0)
    base = model()
    if optimized and when == "before":
        graphopt.optimize(base, backend=BACKEND)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=2, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]
    )
    tuned = get_peft_model(base, lora)
    if optimized and when == "after":
        graphopt.optimize(tuned, backend=BACKEND)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1)
    losses = []
    begin = time.perf_counter()
    for step in range(STEPS):
        ids = (torch.arange(4 * 8).view(4, 8) * (step + 1)) % 32
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    seconds = timed(begin)
    tuned.eval()
    with torch.no_grad():
        losses.append(tuned(input_ids=ids, labels=ids).loss.item())
        with tuned.disable_adapter():
            losses.append(tuned(input_ids=ids, labels=ids).loss.item())
        losses.append(tuned(input_ids=ids, labels=ids).loss.item())
        weights = checksum(tuned)
        merged = tuned.merge_and_unload()
        losses.append(merged(input_ids=ids, labels=ids).loss.item())
    held = base if when == "before" else tuned
    return Run(tuple(losses), weights, seconds, held, (checksum(merged),))


def main() -> None:
    for when in ("before", "after"):
        plain, ours = compare(f"optimized {when} get_peft_model", partial(train, when=when))
        if not plain.same(ours):
            raise SystemExit("the two runs differ")
    print(explained(ours))


if __name__ == "__main__":
    main()
