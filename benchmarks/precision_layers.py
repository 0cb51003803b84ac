"""ResNet-50 layer by layer in bfloat16 and float16: what each layer moves alone, and its times.

Run ``python -m benchmarks.precision_layers [--size 64] [--batch 4]``. For each format, every layer
runs alone in it, the others in float32, on a batch of random images; the relative errors of the
outputs and of all gradients are those of one step from the same weights. Beside it stand the change
of the outputs that a calibration on the same batch expects, and the times of the layer's products,
measured operator by operator on this device. Weights are random: of trained ones the errors of
single layers differ, and accuracy on a data set is not measured. Results go to
``benchmarks/results/precision_layers_cpu.json`` (``_cuda`` on a GPU).
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import graphopt
from benchmarks.harness import keep
from graphopt.analysis.accuracy import layer_errors
from graphopt.capture import capture
from graphopt.passbase import PassContext
from graphopt.passes.precision import Precision
from graphopt.pipeline import Pipeline

FORMATS = ("bf16", "fp16")


class Bottleneck(nn.Module):
    """The residual block of ResNet-50, with the stride in its 3x3 convolution."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.norm3 = nn.BatchNorm2d(4 * width)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inside != 4 * width:
            self.down = nn.Sequential(
                nn.Conv2d(inside, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        h = self.norm2(self.conv2(h)).relu()
        return (self.norm3(self.conv3(h)) + self.down(x)).relu()


class ResNet50(nn.Module):
    """ResNet-50 for 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm, self.pool = nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
        inside, stages = 64, []
        for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            made = [Bottleneck(inside, width, stride)]
            inside = 4 * width
            made += [Bottleneck(inside, width, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*made))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inside, 1000)

    def forward(self, x: Tensor) -> Tensor:
        h = self.pool(self.norm(self.stem(x)).relu())
        return self.head(self.stages(h).mean((2, 3)))


def resnet_50(batch: int = 4, size: int = 64) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A factory for the command line, too: ``benchmarks/precision_layers.py:resnet_50``."""
    torch.manual_seed(0)
    return ResNet50(), (torch.randn(batch, 3, size, size),)


def layers_of(format: str, batch: int, size: int, device: str) -> dict[str, Any]:
    model, (x,) = resnet_50(batch, size)
    model, x = model.to(device), x.to(device)
    captured = capture(model, (x,))
    Pipeline.parse("cleanup").run(captured.graph)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        graphopt.calibrate(model, x).save(file)
        rule = Precision(format=format, cost="measure", calibration=str(file))  # type: ignore[arg-type]
        outcome = rule.apply(captured.graph.copy(), PassContext())
    everything = Precision(format=format)  # type: ignore[arg-type]
    errors = {e.layer: e for e in layer_errors(captured.graph, everything, captured.inputs)}
    products = [r for r in outcome.tables["operators"] if r["kind"] == "allow"]
    by_layer: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    for row in products:
        layer = by_layer[str(row["module"])]
        for key in ("float32_us", "low_us", "flops"):
            layer[key] += row[key]
        layer["lowered"] += row["format"] != "float32"
        if row["phase"] == "forward":
            layer["expected"] = row["change"]
            layer["bound"] = row["bound"]
    rows = {
        name: {
            "output": errors[name].output,
            "gradient": errors[name].gradient,
            "expected_change": layer["expected"],
            "float32_us": round(layer["float32_us"], 1),
            "low_us": round(layer["low_us"], 1),
            "flops": layer["flops"],
            "bound": layer["bound"],
            "products_lowered": int(layer["lowered"]),
        }
        for name, layer in by_layer.items()
    }
    known = [r for r in rows.values() if r["output"] is not None and r["expected_change"]]
    ranks = spearmanr([r["output"] for r in known], [r["expected_change"] for r in known])
    faster = [r for r in rows.values() if r["low_us"] < r["float32_us"]]
    refused = defaultdict(int)
    for declined in outcome.declined:
        refused[declined.reason] += 1
    return {
        "layers": rows,
        "all": {"output": errors["all"].output, "gradient": errors["all"].gradient},
        "rank_correlation": round(float(ranks.statistic), 4),
        "layers_faster": len(faster),
        "products_us": {
            key: round(math.fsum(r[key] for r in rows.values()), 1)
            for key in ("float32_us", "low_us")
        },
        "declined": dict(refused),
        "chosen": dict(outcome.tables["totals"][0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {"batch": options.batch, "size": options.size}
    for format in FORMATS:
        found = results[format] = layers_of(format, options.batch, options.size, device)
        for name, row in found["layers"].items():
            print(
                f"{format} {name:22} output {row['output']:.1e} gradient {row['gradient']:.1e} "
                f"float32 {row['float32_us'] / 1e3:7.2f} ms, {row['low_us'] / 1e3:7.2f} ms"
            )
        print(format, {k: v for k, v in found.items() if k != "layers"})
    print("kept in", keep(f"precision_layers_{device}", results).name)


if __name__ == "__main__":
    main()
