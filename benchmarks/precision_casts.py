"""Casts that each way to lower precision inserts, and the share of the FLOPs that it lowers.

Run ``python -m benchmarks.precision_casts``. Nothing is timed: the graphs of four kinds of models
are lowered for an assumed GPU by the minimum cut, by the rules of TensorFlow's pass, and by a rule
that lowers each operator it can with a cast per argument, as Torch-TensorRT's does; and captured
under ``torch.autocast``. Results go to ``benchmarks/results/precision_casts.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import keep
from graphopt.analysis import gradient_order
from graphopt.analysis.cost import cost, tensor_bytes
from graphopt.capture import capture
from graphopt.graph import Graph, operator_name, value_of
from graphopt.passbase import PassContext
from graphopt.passes.precision import Precision
from graphopt.passes.precision.formats import FORMATS
from graphopt.passes.precision.problem import find_problem
from graphopt.pipeline import Pipeline
from graphopt.plan import Role

BF16 = FORMATS["bf16"]


class Block(nn.Module):
    """A basic block of a ResNet for CIFAR."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.two = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)])
        same = stride == 1 and inside == outside
        self.skip = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](self.one(x)).relu()
        return (self.norms[1](self.two(h)) + self.skip(x)).relu()


def resnet_110() -> nn.Module:
    widths, layers = (16, 32, 64), [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)]
    before = 16
    for stage, width in enumerate(widths):
        for index in range(18):
            layers.append(Block(before, width, 2 if stage and not index else 1))
            before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def gan() -> nn.Module:
    """A generator, and the discriminator that judges what it makes."""

    def up(a: int, b: int) -> list[nn.Module]:
        return [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    def down(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.LeakyReLU(0.2)]

    return nn.Sequential(
        *(nn.Unflatten(1, (64, 1, 1)), nn.ConvTranspose2d(64, 128, 4), nn.ReLU()),
        *up(128, 64),
        *up(64, 32),
        *(nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()),
        *(nn.Conv2d(3, 32, 4, 2, 1), nn.LeakyReLU(0.2)),
        *down(32, 64),
        *down(64, 128),
        *(nn.Conv2d(128, 1, 4), nn.Flatten()),
    )


def transformer() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 4), nn.Linear(256, 64))


def unet() -> nn.Module:
    from graphopt.testing.corpus import CORPUS

    return CORPUS["unet"].make()[0]


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-110": (resnet_110, (16, 3, 32, 32)),
    "transformer": (transformer, (8, 64, 256)),
    "GAN": (gan, (16, 64)),
    "U-Net": (unet, (4, 1, 64, 64)),
}


def casts_of(graph: Graph) -> tuple[int, int]:
    """Casts between float32 and bfloat16, and the bytes that they read and write.

    Those of the model's outputs and of tangents are left out: under autocast they are the loss's.
    """
    tangents = {n for n in graph.inputs if graph.slot(n).role is Role.TANGENT}
    outside = {*graph.outputs[: graph.signature.num_forward_outputs]}
    outside |= {user for tangent in tangents for user in tangent.users}
    found = [
        (value_of(n.all_input_nodes[0]), value_of(n))
        for n in graph.operators
        if operator_name(n) == "aten._to_copy.default" and n not in outside
    ]
    changed = [(a, b) for a, b in found if a.dtype is not b.dtype]
    return len(changed), sum(tensor_bytes(a) + tensor_bytes(b) for a, b in changed)


def lowered_flops(graph: Graph) -> float:
    """Share of the FLOPs of products whose operands are bfloat16."""
    costs = graph.get(cost).by_node
    total = low = 0
    for node in graph.operators:
        total += costs[node].flops
        operands = (value_of(n) for n in node.all_input_nodes)
        if any(isinstance(v, Tensor) and v.dtype is torch.bfloat16 for v in operands):
            low += costs[node].flops
    return low / total


def by_rule(graph: Graph) -> tuple[int, int, float]:
    """Each operator that can be lowered is, with a cast for each argument and each result."""
    problem = find_problem(graph, BF16, frozenset())
    count = size = 0
    for unit in problem.units.values():
        if unit.values == (unit.node,) and not unit.node.all_input_nodes:
            continue
        for value in (*unit.read, *unit.values):
            count += 1
            size += tensor_bytes(value_of(value)) * 3 // 2
    costs = graph.get(cost).by_node
    total = sum(costs[n].flops for n in graph.operators)
    return count, size, sum(costs[n].flops for n in problem.units) / total


def main() -> None:
    # The graphs are captured on the CPU and planned for a GPU. These models are small: without its
    # launches the times are those of larger ones of their kinds.
    gradient_order.ASSUMED["cpu"] = replace(gradient_order.ASSUMED["cuda"], overhead=0.0)
    results: dict[str, Any] = {}
    for name, (make, shape) in MODELS.items():
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        graph = capture(model, (x,)).graph
        Pipeline.parse("cleanup").run(graph, PassContext())
        rows = results[name] = {}
        for label, pass_ in {
            "minimum cut": Precision(cost="roofline"),
            "minimum cut, sums=low": Precision(cost="roofline", sums="low"),
            "rules of TensorFlow": Precision(cost="roofline", policy="tf"),
        }.items():
            lowered = graph.copy()
            pass_.apply(lowered, PassContext())
            rows[label] = (*casts_of(lowered), lowered_flops(lowered))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            captured = capture(model, (x,)).graph
        Pipeline.parse("cleanup").run(captured, PassContext())
        rows["torch.autocast"] = (*casts_of(captured), lowered_flops(captured))
        rows["one cast per argument"] = by_rule(graph)
        for label, (count, size, share) in rows.items():
            megabytes = f"{size / 1e6:8.2f} MB"
            print(f"{name:12} {label:24} {count:5} casts {megabytes}  {share:.1%} of FLOPs")
    print("kept in", keep("precision_casts", results).name)


if __name__ == "__main__":
    main()
