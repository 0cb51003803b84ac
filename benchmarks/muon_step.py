"""Time of a step of `graphopt.optim.Muon`, which batches equal shapes, against PyTorch's Muon.

Only ``optimizer.step()`` is timed, on given gradients. PyTorch's side is `torch.optim.Muon` for the
same matrices and `torch.optim.AdamW` for the rest, in the same groups; convolutions, which it
refuses, are given to it as the matrices that they are, in the same memory. Both sides make the same
updates; the largest difference of a weight after all steps is kept.

Run ``python -m benchmarks.muon_step [threads ...]`` on an otherwise idle machine. Every round runs
both once, in random order; ratios are medians of paired ones, with 95 % intervals.
"""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from benchmarks.harness import alternate, keep, milliseconds, ratio
from benchmarks.kfac_step_variants import Task, gpt, resnet
from graphopt.optim import Muon, ParameterRoles, parameter_roles

CASES: dict[str, Callable[[], Task]] = {
    "GPT, 6 layers of width 128": lambda: gpt(2, layers=6, width=128),
    "GPT, 6 layers of width 256": lambda: gpt(2, layers=6, width=256),
    "ResNet-20, width 16": lambda: resnet(8, width=16, blocks=3),
    "ResNet-56, width 16": lambda: resnet(8, width=16, blocks=9),
}
ROUNDS = 40
OURS, THEIRS = "graphopt", "PyTorch"
OPTIONS: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def pytorch(roles: ParameterRoles) -> list[torch.optim.Optimizer]:
    """PyTorch's optimizers for the parameters of these roles, which have gradients."""
    matrices: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in roles.parameters.items():
        role = roles[name]
        if role.role in ("matrix", "convolution"):
            flat = nn.Parameter(parameter.detach().flatten(1))  # in the same memory
            if parameter.grad is not None:
                flat.grad = parameter.grad.flatten(1)
            matrices.append(flat)
        else:
            (plain if role.role in ("norm", "bias") or role.vector else decayed).append(parameter)
    rest = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return [torch.optim.Muon(matrices, **OPTIONS), torch.optim.AdamW(rest, lr=OPTIONS["lr"])]


def compare(task: Task, rounds: int) -> dict[str, Any]:
    """Times of both on one model; JSON data."""
    task.loss(task.model(task.x), task.y).backward()
    models = {OURS: task.model, THEIRS: copy.deepcopy(task.model)}
    for own, copied in zip(task.model.parameters(), models[THEIRS].parameters(), strict=True):
        copied.grad = None if own.grad is None else own.grad.clone()
    roles = parameter_roles(task.model, task.x)
    others = ParameterRoles(roles, dict(models[THEIRS].named_parameters()))
    optimizers = {OURS: [Muon(roles, **OPTIONS)], THEIRS: pytorch(others)}

    def stepped(name: str) -> Callable[[], None]:
        def step() -> None:
            for optimizer in optimizers[name]:
                optimizer.step()

        return step

    times = alternate({name: stepped(name) for name in models}, rounds)
    pairs = zip(models[OURS].parameters(), models[THEIRS].parameters(), strict=True)
    shapes = Counter(
        (role.matrix.rows, role.matrix.columns)
        for role in roles.values()
        if role.role in ("matrix", "convolution") and role.matrix
    )
    return {
        "matrices": {f"{rows} x {columns}": count for (rows, columns), count in shapes.items()},
        "milliseconds": milliseconds(times),
        "graphopt over PyTorch": ratio(times, OURS, THEIRS),
        "largest difference": max(float((a - b).detach().abs().max()) for a, b in pairs),
    }


def main() -> None:
    """Measure and keep."""
    results: dict[str, Any] = {}
    for threads in [int(word) for word in sys.argv[1:]] or [1, 2]:
        torch.set_num_threads(threads)
        for name, make in CASES.items():
            found = compare(make(), ROUNDS)
            results.setdefault(name, {})[f"{threads} threads"] = found
            print(name, threads, found["milliseconds"], found["graphopt over PyTorch"], flush=True)
    print("kept in", keep("muon_step", results).name)


if __name__ == "__main__":
    main()
