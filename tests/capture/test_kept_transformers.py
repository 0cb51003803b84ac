"""Models of transformers in a second process: their outputs, their caches, their flags."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import hashlib, torch, transformers, graphopt
from graphopt.model.surface import report

SIZES = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
             num_attention_heads=2, max_position_embeddings=32)

def told(value):
    if isinstance(value, torch.Tensor):
        return value.detach().numpy().tobytes()
    if isinstance(value, (list, tuple)):
        return type(value).__name__, *map(told, value)
    own = list(vars(value).items()) if hasattr(value, "__dict__") else repr(value)
    if isinstance(own, str) or isinstance(value, type):
        return repr(value)
    items = [(k, told(value[k])) for k in value] if isinstance(value, dict) else []
    return type(value).__qualname__, items, [(k, told(v)) for k, v in own]

def run(kind, optimized):
    torch.manual_seed(0)
    model = kind(kind.config_class(**SIZES))
    if optimized:
        graphopt.optimize(model, backend="eager")
    torch.manual_seed(1)
    ids = torch.randint(64, (2, 8))
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    out.loss.backward()
    found = told(out), [None if p.grad is None else told(p.grad) for p in model.parameters()]
    route = report(model).specialisations[-1] if optimized else None
    return hashlib.sha256(repr(found).encode()).hexdigest(), route

for kind in (transformers.BertForMaskedLM, transformers.LlamaForCausalLM):
    eager, _ = run(kind, False)
    ours, said = run(kind, True)
    print(kind.__name__, eager == ours, said.route, said.unkept)
"""


@pytest.mark.slow
def test_a_second_process_starts_warm(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "child.py").write_text(CHILD)
    first, second = (
        subprocess.run(
            [sys.executable, str(tmp_path / "child.py")], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for _ in range(2)
    )
    assert first == ["BertForMaskedLM True dynamo ", "LlamaForCausalLM True dynamo "]
    assert second == ["BertForMaskedLM True kept ", "LlamaForCausalLM True kept "]
