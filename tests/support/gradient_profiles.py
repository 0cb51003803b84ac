"""When the gradients of well-known networks are ready, from their published architectures.

Times are proportional to floating-point operations: backward takes twice forward's, layer after
layer from the last to the first, and all gradients of a layer are ready when it is done. Sizes are
those of float32. Multiply-adds count as two operations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from graphopt.plan.grouping import Ready


@dataclass
class Network:
    """Layers in forward order: name, elements of each parameter, forward operations per sample."""

    layers: list[tuple[str, dict[str, int], float]] = field(default_factory=list)

    def add(self, name: str, flops: float, **parameters: int) -> None:
        self.layers.append((name, parameters, flops))

    def conv(self, name: str, cin: int, cout: int, kernel: int, side: int, bias: int = 0) -> None:
        """A square convolution whose output is `side` by `side`."""
        weight = cin * cout * kernel**2
        extra = {"bias": cout} if bias else {}
        self.add(name, 2.0 * weight * side**2, weight=weight, **extra)

    def norm(self, name: str, channels: int, pixels: int) -> None:
        self.add(name, 8.0 * channels * pixels, weight=channels, bias=channels)

    def linear(self, name: str, cin: int, cout: int, rows: int = 1) -> None:
        self.add(name, 2.0 * cin * cout * rows, weight=cin * cout, bias=cout)

    @property
    def parameters(self) -> int:
        return sum(sum(parameters.values()) for _, parameters, _ in self.layers)

    def profile(self, batch: int, rate: float) -> tuple[list[Ready], float]:
        """Gradients in ready order and seconds of backward, at `rate` operations per second."""
        clock, ready = 0.0, []
        for name, parameters, flops in reversed(self.layers):
            clock += 2 * flops * batch / rate
            for kind, elements in reversed(parameters.items()):
                ready.append(Ready(f"{name}.{kind}", 4 * elements, clock, module=name))
        return ready, clock


def resnet50() -> Network:
    net = Network()
    net.conv("conv1", 3, 64, 7, 112)
    net.norm("bn1", 64, 112**2)
    cin, side = 64, 56
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            first = side
            if block == 0 and stage > 1:
                side //= 2  # the 3x3 convolution has the stride
            for i, (a, b, kernel, out) in enumerate(
                ((cin, width, 1, first), (width, width, 3, side), (width, 4 * width, 1, side)), 1
            ):
                net.conv(f"{at}.conv{i}", a, b, kernel, out)
                net.norm(f"{at}.bn{i}", b, out**2)
            if block == 0:
                net.conv(f"{at}.downsample.0", cin, 4 * width, 1, side)
                net.norm(f"{at}.downsample.1", 4 * width, side**2)
            cin = 4 * width
    net.linear("fc", 2048, 1000)
    return net


def densenet121() -> Network:
    net = Network()
    net.conv("conv0", 3, 64, 7, 112)
    net.norm("norm0", 64, 112**2)
    channels, side, growth = 64, 56, 32
    for block, layers in enumerate((6, 12, 24, 16), start=1):
        for layer in range(layers):
            at = f"block{block}.{layer}"
            net.norm(f"{at}.norm1", channels, side**2)
            net.conv(f"{at}.conv1", channels, 4 * growth, 1, side)
            net.norm(f"{at}.norm2", 4 * growth, side**2)
            net.conv(f"{at}.conv2", 4 * growth, growth, 3, side)
            channels += growth
        if block < 4:
            net.norm(f"transition{block}.norm", channels, side**2)
            net.conv(f"transition{block}.conv", channels, channels // 2, 1, side)
            channels, side = channels // 2, side // 2
    net.norm("norm5", channels, side**2)
    net.linear("classifier", channels, 1000)
    return net


def fc_densenet103(side: int = 224, classes: int = 11) -> Network:
    """The Tiramisu with 103 layers: a DenseNet down and up, with skips across."""
    net, growth, channels, skips = Network(), 16, 48, []

    def dense(at: str, layers: int, cin: int) -> int:
        for layer in range(layers):
            net.norm(f"{at}.{layer}.norm", cin, side**2)
            net.conv(f"{at}.{layer}.conv", cin, growth, 3, side, bias=1)
            cin += growth
        return cin

    net.conv("first", 3, channels, 3, side, bias=1)
    for level, layers in enumerate((4, 5, 7, 10, 12)):
        channels = dense(f"down{level}", layers, channels)
        skips.append(channels)
        net.norm(f"down{level}.transition.norm", channels, side**2)
        net.conv(f"down{level}.transition.conv", channels, channels, 1, side, bias=1)
        side //= 2
    dense("bottleneck", 15, channels)
    new = 15 * growth
    for level, layers in enumerate((12, 10, 7, 5, 4)):
        # A transposed convolution does its work once per input pixel.
        net.conv(f"up{level}.transition", new, new, 3, side, bias=1)
        side *= 2
        channels = dense(f"up{level}", layers, new + skips.pop())
        new = layers * growth
    net.conv("classifier", channels, classes, 1, side, bias=1)
    return net


def gpt2_small(tokens: int = 1024) -> Network:
    net, width, words = Network(), 768, 50257
    # The embedding is also the output layer: its gradient is complete with its first use, which is
    # the last that backward comes to. The output layer's own work is counted where it happens.
    net.add("wte", 0.0, weight=words * width)
    net.add("wpe", 0.0, weight=1024 * width)
    for layer in range(12):
        at = f"h.{layer}"
        net.norm(f"{at}.ln_1", width, tokens)
        net.linear(f"{at}.attn.c_attn", width, 3 * width, tokens)
        net.add(f"{at}.attn.scores", 4.0 * tokens**2 * width)
        net.linear(f"{at}.attn.c_proj", width, width, tokens)
        net.norm(f"{at}.ln_2", width, tokens)
        net.linear(f"{at}.mlp.c_fc", width, 4 * width, tokens)
        net.linear(f"{at}.mlp.c_proj", 4 * width, width, tokens)
    net.norm("ln_f", width, tokens)
    net.add("lm_head", 2.0 * words * width * tokens)
    return net


# Network, samples per step and rank.
NETWORKS: dict[str, tuple[Callable[[], Network], int]] = {
    "resnet50": (resnet50, 32),
    "densenet121": (densenet121, 32),
    "fc_densenet103": (fc_densenet103, 3),
    "gpt2_small": (gpt2_small, 4),
}
