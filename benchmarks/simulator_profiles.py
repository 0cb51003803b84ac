"""Gradients of published networks in the order in which backward makes them, from their shapes.

Only architecture facts: shapes of the layers and multiply-adds. The share of the backward pass that
a layer takes is assumed to be its share of the multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from graphopt.plan.grouping import Ready


@dataclass
class Network:
    """Layers in forward order: tensors of parameters, and multiply-adds of one sample."""

    layers: list[tuple[tuple[int, ...], float]] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        return sum(sum(tensors) for tensors, _ in self.layers)

    def conv(
        self, cin: int, cout: int, kernel: tuple[int, int] | int, side: int, norm: bool = True
    ) -> int:
        """A convolution with batch norm or bias; `side` is that of its output. Returns `cout`."""
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        weight = cin * cout * height * width
        self.layers.append(((weight,) if norm else (weight, cout), float(weight * side * side)))
        if norm:
            self.norm(cout)
        return cout

    def norm(self, channels: int) -> None:
        self.layers.append(((channels, channels), 0.0))

    def linear(self, cin: int, cout: int, rows: int = 1) -> None:
        self.layers.append(((cin * cout, cout), float(cin * cout * rows)))

    def chain(self, cin: int, side: int, *steps: tuple[int, tuple[int, int] | int]) -> int:
        """Convolutions behind each other at one resolution; returns the channels of the last."""
        for cout, kernel in steps:
            cin = self.conv(cin, cout, kernel, side)
        return cin

    def ready(self, backward: float, scale: float = 4.0) -> list[Ready]:
        """Gradients in ready order, for a backward pass of that many seconds.

        `scale` is the number of bytes of one parameter on the wire.
        """
        total = sum(work for _, work in self.layers)
        done, result = 0.0, []
        for index, (tensors, work) in reversed(list(enumerate(self.layers))):
            done += work
            at = backward * done / total
            result += [Ready(f"{index}.{i}", int(scale * n), at) for i, n in enumerate(tensors)]
        return result


def vgg16() -> Network:
    net, cin = Network(), 3
    for side, widths in zip(
        (224, 112, 56, 28, 14),
        ((64,) * 2, (128,) * 2, (256,) * 3, (512,) * 3, (512,) * 3),
        strict=True,
    ):
        for cout in widths:
            cin = net.conv(cin, cout, 3, side, norm=False)
    for shape in ((512 * 49, 4096), (4096, 4096), (4096, 1000)):
        net.linear(*shape)
    return net


def resnet(blocks: Iterable[int]) -> Network:
    net = Network()
    cin = net.conv(3, 64, 7, 112)
    for stage, count in enumerate(blocks):
        width, side = 64 << stage, 56 >> stage
        for block in range(count):
            before = side * 2 if stage and not block else side
            net.conv(cin, width, 1, before)
            net.chain(width, side, (width, 3), (4 * width, 1))
            if not block:
                net.conv(cin, 4 * width, 1, side)
            cin = 4 * width
    net.linear(cin, 1000)
    return net


def densenet201() -> Network:
    net = Network()
    cin = net.conv(3, 64, 7, 112)
    for stage, count in enumerate((6, 12, 48, 32)):
        side = 56 >> stage
        for _ in range(count):
            net.norm(cin)
            net.conv(cin, 128, 1, side)
            net.layers.append(((128 * 32 * 9,), float(128 * 32 * 9 * side * side)))
            cin += 32
        net.norm(cin)
        if stage < 3:
            net.layers.append(((cin * cin // 2,), float(cin * cin // 2 * side * side)))
            cin //= 2
    net.linear(cin, 1000)
    return net


H, V, SHORT_H, SHORT_V = (1, 7), (7, 1), (1, 3), (3, 1)


def inception_v3() -> Network:
    net = Network()
    for shape in ((3, 32, 3, 149), (32, 32, 3, 147), (32, 64, 3, 147), (64, 80, 1, 73)):
        net.conv(*shape)
    net.conv(80, 192, 3, 71)
    for cin, pool in ((192, 32), (256, 64), (288, 64)):
        net.chain(cin, 35, (64, 1))
        net.chain(cin, 35, (48, 1), (64, 5))
        net.chain(cin, 35, (64, 1), (96, 3), (96, 3))
        net.chain(cin, 35, (pool, 1))
    net.conv(288, 384, 3, 17)
    net.conv(net.chain(288, 35, (64, 1), (96, 3)), 96, 3, 17)
    for c in (128, 160, 160, 192):
        net.chain(768, 17, (192, 1))
        net.chain(768, 17, (c, 1), (c, H), (192, V))
        net.chain(768, 17, (c, 1), (c, V), (c, H), (c, V), (192, H))
        net.chain(768, 17, (192, 1))
    net.conv(net.chain(768, 17, (192, 1)), 320, 3, 8)
    net.conv(net.chain(768, 17, (192, 1), (192, H), (192, V)), 192, 3, 8)
    for cin in (1280, 2048):
        net.chain(cin, 8, (320, 1))
        _fork(net, net.chain(cin, 8, (384, 1)), 384)
        _fork(net, net.chain(cin, 8, (448, 1), (384, 3)), 384)
        net.chain(cin, 8, (192, 1))
    net.linear(2048, 1000)
    return net


def inception_v4() -> Network:
    net = Network()
    for shape in ((3, 32, 3, 149), (32, 32, 3, 147), (32, 64, 3, 147), (64, 96, 3, 73)):
        net.conv(*shape)
    net.conv(net.chain(160, 73, (64, 1)), 96, 3, 71)
    net.conv(net.chain(160, 73, (64, 1), (64, H), (64, V)), 96, 3, 71)
    net.conv(192, 192, 3, 35)
    for _ in range(4):
        net.chain(384, 35, (96, 1))
        net.chain(384, 35, (64, 1), (96, 3))
        net.chain(384, 35, (64, 1), (96, 3), (96, 3))
        net.chain(384, 35, (96, 1))
    net.conv(384, 384, 3, 17)
    net.conv(net.chain(384, 35, (192, 1), (224, 3)), 256, 3, 17)
    for _ in range(7):
        net.chain(1024, 17, (384, 1))
        net.chain(1024, 17, (192, 1), (224, H), (256, V))
        net.chain(1024, 17, (192, 1), (192, V), (224, H), (224, V), (256, H))
        net.chain(1024, 17, (128, 1))
    net.conv(net.chain(1024, 17, (192, 1)), 192, 3, 8)
    net.conv(net.chain(1024, 17, (256, 1), (256, H), (320, V)), 320, 3, 8)
    for _ in range(3):
        net.chain(1536, 8, (256, 1))
        _fork(net, net.chain(1536, 8, (384, 1)), 256)
        _fork(net, net.chain(1536, 8, (384, 1), (448, SHORT_V), (512, SHORT_H)), 256)
        net.chain(1536, 8, (256, 1))
    net.linear(1536, 1000)
    return net


def bert_base() -> Network:
    net, width = Network(), 768
    net.layers.append(((30522 * width, 512 * width, 2 * width), 0.0))
    net.norm(width)
    for _ in range(12):
        for _ in range(4):
            net.linear(width, width)
        net.norm(width)
        net.linear(width, 4 * width)
        net.linear(4 * width, width)
        net.norm(width)
    net.linear(width, width)
    return net


NETWORKS: dict[str, Callable[[], Network]] = {
    "VGG-16": vgg16,
    "ResNet-101": lambda: resnet((3, 4, 23, 3)),
    "ResNet-152": lambda: resnet((3, 8, 36, 3)),
    "DenseNet-201": densenet201,
    "Inception-V3": inception_v3,
    "Inception-v4": inception_v4,
    "BERT-Base": bert_base,
}


def _fork(net: Network, cin: int, cout: int) -> None:
    for kernel in (SHORT_H, SHORT_V):
        net.conv(cin, cout, kernel, 8)
