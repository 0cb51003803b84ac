"""Cuts at which stock ``torch.distributed.pipelining`` raises, and the same cuts with relays.

Networks with skip connections are cut into four stages: the best ones for free transfers, and
equal numbers of operators, which cuts inside of blocks. Each is trained for one step of eight
micro-batches under four stock schedules: on four Gloo ranks, or on two with two stages each.
"Stock" marks the same cuts in the same graph with torch's own ``pipe_split`` and nothing else. A
step counts if all gradients equal those of the whole model. Nothing is timed; a step that takes
longer than `SECONDS` does not end.

Run ``python -m benchmarks.pipeline_coverage``; the result goes to
``benchmarks/results/pipeline_coverage.json``.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, fx, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    pipeline,
)

from benchmarks.harness import keep
from benchmarks.partition_models import DenseLayer, FCDenseNet103, ResNet110, UNet
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.from_exported import ExportedProblem
from graphopt.partitioning.planner import plan
from graphopt.partitioning.torch_split import split_at

STAGES, MICRO_BATCHES, SECONDS = 4, 8, 45
SCHEDULES: Mapping[str, Callable[..., Any]] = {
    "GPipe": ScheduleGPipe,
    "1F1B": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero bubble": ScheduleInterleavedZeroBubble,
}
SINGLE, SEVERAL = ("GPipe", "1F1B"), ("interleaved", "zero bubble")
MODELS: Mapping[str, tuple[Callable[[], nn.Module], int]] = {
    "U-Net": (lambda: UNet(width=8), 32),
    "FC-DenseNet": (lambda: FCDenseNet103((2, 3), 2, 4), 16),
    "ResNet-20": (lambda: ResNet110(depth=3), 16),
}


def best(exported: ExportedProblem) -> dict[str, int]:
    """The stages with the least slowest one."""
    return plan(exported.problem, STAGES).assignment


def equal(exported: ExportedProblem) -> dict[str, int]:
    """As many operators in each stage, in the order of the graph."""
    atoms = atoms_of(exported.problem)
    names = exported.problem.operators
    return {
        names[operator].name: place * STAGES // len(atoms)
        for place, members in enumerate(atoms.members)
        for operator in members
    }


CUTS = {"best": best, "equal operators": equal}


def _relayed(cut: str, module: fx.GraphModule) -> fx.GraphModule:
    exported = ExportedProblem(module)
    split_at(module, exported.stages(CUTS[cut](exported)))
    return module


def _stock(cut: str, module: fx.GraphModule) -> fx.GraphModule:
    exported = ExportedProblem(module)
    stage = exported.stages(CUTS[cut](exported))
    graph, copies, number = fx.Graph(), {}, 0
    ends = {"placeholder": -1, "get_attr": -1, "output": STAGES}
    for node in sorted(module.graph.nodes, key=lambda n: ends.get(n.op, stage.get(n, 0))):
        if node in stage and stage[node] > number:
            graph.call_function(torch.ops.pippy._pipe_split.default)
            number = stage[node]
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.set_codegen(module.graph._codegen)
    module.graph = graph
    return module


POLICIES = {"stock": _stock, "with relays": _relayed}


def main() -> None:
    results: dict[str, object] = {}
    for model in MODELS:
        for cut in CUTS:
            row: dict[str, dict[str, str]] = {"stock": {}, "with relays": {}}
            for kind in SCHEDULES:
                row["stock"] |= _outcomes(model, cut, "stock", (kind,))
            for kinds in (SINGLE, SEVERAL):
                row["with relays"] |= _outcomes(model, cut, "with relays", kinds)
            results[f"{model}, {cut}"] = row
            print(model, cut, row, flush=True)
    print("kept in", keep("pipeline_coverage", results).name)


def _outcomes(model: str, cut: str, policy: str, kinds: Sequence[str]) -> dict[str, str]:
    """What becomes of a step under each schedule; all of the same number of ranks."""
    world = STAGES if kinds[0] in SINGLE else STAGES // 2
    with tempfile.TemporaryDirectory() as folder:
        args = (world, Path(folder), model, cut, policy, kinds)
        context = mp.start_processes(_rank, args, world, join=False, start_method="fork")
        try:
            end = time.monotonic() + SECONDS
            while not context.join(timeout=max(end - time.monotonic(), 0)):
                if time.monotonic() > end:
                    return dict.fromkeys(kinds, "does not end")
        except mp.ProcessRaisedException as error:
            return dict.fromkeys(kinds, "raises: " + str(error).strip().splitlines()[-1])
        finally:
            for process in context.processes:
                process.kill()
        return {k: max(f.read_text() for f in Path(folder).glob(f"{k} *")) for k in kinds}


def _rank(
    rank: int, world: int, folder: Path, model: str, cut: str, policy: str, kinds: Sequence[str]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=SECONDS),
    )
    x, wanted, target = _wanted(model)
    policy_of_cut = partial(POLICIES[policy], cut)
    pipe = pipeline(_made(model)[0], (x[:2],), split_policy=policy_of_cut)
    stages = [pipe.build_stage(n, torch.device("cpu")) for n in range(rank, STAGES, world)]
    for kind in kinds:
        schedule = SCHEDULES[kind](
            stages[0] if kind in SINGLE else stages, MICRO_BATCHES, loss_fn=_loss
        )
        schedule.step(*(x,) if rank == 0 else (), target=target if rank == world - 1 else None)
        same = True
        for stage in stages:
            for name, parameter in stage.submod.named_parameters():
                found, parameter.grad = parameter.grad, None
                same &= found is not None and torch.allclose(found, wanted[name], 1e-3, 1e-5)
        (folder / f"{kind} {rank}").write_text("trains" if same else "wrong gradients")
    dist.barrier()


def _made(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    make, size = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, DenseLayer | nn.Dropout):
            module.training = False  # drops nothing, so that there is something to compare with
    return model, size


def _wanted(name: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Inputs, the gradients of the whole model, micro-batch by micro-batch, and targets."""
    model, size = _made(name)
    x = torch.randn(2 * MICRO_BATCHES, 3, size, size)
    outputs = []
    for batch in x.chunk(MICRO_BATCHES):
        outputs.append(model(batch))
        (_loss(outputs[-1], torch.full_like(outputs[-1], 0.3)) / MICRO_BATCHES).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return x, gradients, torch.full_like(torch.cat(outputs), 0.3)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


if __name__ == "__main__":
    main()
