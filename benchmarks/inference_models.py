"""Models whose inference is measured, with random weights and statistics: nobody tuned for them.

Those that `transformers` has are built from its configurations; the others are written here with
the layers and sizes of their papers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: Any = nn.ReLU
) -> nn.Sequential:
    """Convolution, batch norm and a function."""
    padding = kernel // 2
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([act()] if act is not None else []))


# -- MobileNetV3 (Howard et al. 2019), small -------------------------------------------------------


class Squeeze(nn.Module):
    """Squeeze and excitation with a hard sigmoid."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(8, channels // 4 // 8 * 8)
        self.down, self.up = nn.Conv2d(channels, inner, 1), nn.Conv2d(inner, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(self.down(F.adaptive_avg_pool2d(x, 1)).relu()))


class Inverted(nn.Module):
    """Expand, filter by channel, project."""

    def __init__(
        self, inputs: int, kernel: int, inner: int, outputs: int, se: bool, act: Any, stride: int
    ) -> None:
        super().__init__()
        layers = [conv(inputs, inner, 1, act=act)] if inner != inputs else []
        layers.append(conv(inner, inner, kernel, stride, groups=inner, act=act))
        squeeze = [Squeeze(inner)] if se else []
        self.layers = nn.Sequential(*layers, *squeeze, conv(inner, outputs, 1, act=None))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.adds else y


def mobilenet_v3() -> nn.Module:
    """MobileNetV3 small."""
    relu, hard = nn.ReLU, nn.Hardswish
    rows = [
        *((3, 16, 16, True, relu, 2), (3, 72, 24, False, relu, 2), (3, 88, 24, False, relu, 1)),
        *((5, 96, 40, True, hard, 2), (5, 240, 40, True, hard, 1), (5, 240, 40, True, hard, 1)),
        *((5, 120, 48, True, hard, 1), (5, 144, 48, True, hard, 1), (5, 288, 96, True, hard, 2)),
        *((5, 576, 96, True, hard, 1), (5, 576, 96, True, hard, 1)),
    ]
    blocks, channels = [], 16
    for kernel, inner, outputs, se, act, stride in rows:
        blocks.append(Inverted(channels, kernel, inner, outputs, se, act, stride))
        channels = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(576, 1024), nn.Hardswish()]
    body = [conv(3, 16, 3, 2, act=hard), *blocks, conv(96, 576, 1, act=hard)]
    return nn.Sequential(*body, *head, nn.Linear(1024, 1000))


# -- DenseNet-121 (Huang et al. 2017) --------------------------------------------------------------


class Dense(nn.Module):
    """Norm, ReLU and convolution twice; the result is put behind the input."""

    def __init__(self, inputs: int, growth: int = 32) -> None:
        super().__init__()
        self.one, self.two = nn.BatchNorm2d(inputs), nn.BatchNorm2d(4 * growth)
        self.first = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.second = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(self.one(x).relu())
        return torch.cat([x, self.second(self.two(y).relu())], 1)


def densenet(blocks: Sequence[int] = (6, 12, 24, 16)) -> nn.Module:
    """DenseNet-121."""
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for index, count in enumerate(blocks):
        for _ in range(count):
            layers.append(Dense(channels))
            channels += 32
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if index < len(blocks) - 1:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


# -- ShuffleNetV2 (Ma et al. 2018), SqueezeNet (Iandola et al. 2016) -------------------------------


class Shuffle(nn.Module):
    """Half of the channels goes through; the two halves are shuffled."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, outputs // 2
        start = inputs if stride == 2 else half
        self.main = nn.Sequential(
            conv(start, half, 1), conv(half, half, 3, stride, half, None), conv(half, half, 1)
        )
        if stride == 2:
            self.other = nn.Sequential(
                conv(inputs, inputs, 3, 2, inputs, None), conv(inputs, half, 1)
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            a, b = self.other(x), self.main(x)
        else:
            a, rest = x.chunk(2, 1)
            b = self.main(rest)
        y = torch.cat([a, b], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet() -> nn.Module:
    """ShuffleNetV2 1.0."""
    layers: list[nn.Module] = [conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 24
    for outputs, count in ((116, 4), (232, 8), (464, 4)):
        layers += [
            Shuffle(channels, outputs, 2),
            *(Shuffle(outputs, outputs, 1) for _ in range(count - 1)),
        ]
        channels = outputs
    head = [conv(464, 1024, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000)]
    return nn.Sequential(*layers, *head)


class Fire(nn.Module):
    """Squeeze to few channels, expand by two kernels."""

    def __init__(self, inputs: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, inner, 1)
        self.one, self.three = nn.Conv2d(inner, outputs, 1), nn.Conv2d(inner, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.squeeze(x).relu()
        return torch.cat([self.one(y).relu(), self.three(y).relu()], 1)


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1."""
    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    layers = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, Fire(64, 16, 64), Fire(128, 16, 64), pool]
    layers += [Fire(128, 32, 128), Fire(256, 32, 128), pool, Fire(256, 48, 192), Fire(384, 48, 192)]
    layers += [Fire(384, 64, 256), Fire(512, 64, 256), nn.Conv2d(512, 1000, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# -- Inception (Szegedy et al. 2015), U-Net (Ronneberger et al. 2015), DeepLab (Chen et al. 2017) --


class Inception(nn.Module):
    """Four branches, put behind each other."""

    def __init__(self, inputs: int, a: int, b: tuple[int, int], c: tuple[int, int], d: int) -> None:
        super().__init__()
        self.one, self.pooled = conv(inputs, a, 1), conv(inputs, d, 1)
        self.three = nn.Sequential(conv(inputs, b[0], 1), conv(*b))
        self.five = nn.Sequential(conv(inputs, c[0], 1), conv(*c), conv(c[1], c[1]))

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.pooled(F.max_pool2d(x, 3, 1, 1))
        return torch.cat([self.one(x), self.three(x), self.five(x), pooled], 1)


def inception() -> nn.Module:
    """GoogLeNet with batch norm."""
    stem = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), conv(64, 64, 1), conv(64, 192)]
    body: list[nn.Module] = [
        *(nn.MaxPool2d(3, 2, 1), Inception(192, 64, (96, 128), (16, 32), 32)),
        *(Inception(256, 128, (128, 192), (32, 96), 64), nn.MaxPool2d(3, 2, 1)),
        *(
            Inception(480, 192, (96, 208), (16, 48), 64),
            Inception(512, 160, (112, 224), (24, 64), 64),
        ),
        *(
            Inception(512, 128, (128, 256), (24, 64), 64),
            Inception(512, 256, (160, 320), (32, 128), 128),
        ),
        *(nn.MaxPool2d(3, 2, 1), Inception(832, 384, (192, 384), (48, 128), 128)),
    ]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))


class UNet(nn.Module):
    """Down and up again, with what was there on the way down."""

    def __init__(self, widths: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        before = (3, *widths[:-1])
        self.down = nn.ModuleList(
            nn.Sequential(conv(a, b), conv(b, b)) for a, b in zip(before, widths, strict=True)
        )
        pairs = list(zip(widths[1:], widths[:-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.join = nn.ModuleList(nn.Sequential(conv(2 * b, b), conv(b, b)) for _, b in pairs)
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            kept.append(x)
        for index in reversed(range(len(self.up))):
            x = self.join[index](torch.cat([kept[index], self.up[index](x)], 1))
        y: Tensor = self.head(x)
        return y


class Atrous(nn.Module):
    """A pyramid of dilated convolutions behind a small backbone, resampled to the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(3, 32, 3, 2), conv(32, 64, 3, 2), conv(64, 256, 3, 2))
        self.rates = nn.ModuleList(
            nn.Conv2d(256, 64, 3, padding=rate, dilation=rate, bias=False) for rate in (6, 12, 18)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(64) for _ in range(3))
        self.pooled, self.join, self.head = conv(256, 64, 1), conv(256, 64), nn.Conv2d(64, 21, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        size = y.shape[-2:]
        parts = [norm(rate(y)).relu() for rate, norm in zip(self.rates, self.norms, strict=True)]
        mean = F.interpolate(self.pooled(F.adaptive_avg_pool2d(y, 1)), size=size, mode="bilinear")
        z = self.head(self.join(torch.cat([*parts, mean], 1)))
        return F.interpolate(z, size=x.shape[-2:], mode="bilinear")


# -- what `transformers` has -----------------------------------------------------------------------


class Hidden(nn.Module):
    """The last hidden state of a model of `transformers`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        state: Tensor = self.model(x, return_dict=False)[0]
        return state


def of_transformers(name: str, **config: Any) -> nn.Module:
    """A model of `transformers` from its configuration."""
    import transformers

    made = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**config))
    return Hidden(made)


def shaken(model: nn.Module) -> nn.Module:
    """In evaluation mode, with statistics as training leaves them: not zero and one."""
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            nn.init.normal_(value, 0.0, 0.1)
        elif name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 1.5)
    return model.eval()


RESNET = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
GPT2 = {"n_layer": 6, "n_embd": 384, "n_head": 6, "use_cache": False}
SMALL = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
BERT = {**SMALL, "intermediate_size": 1536}

CNNS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3": mobilenet_v3,
    "densenet121": densenet,
    "resnet18": lambda: of_transformers("ResNet", embedding_size=64, **RESNET),
    "regnet": lambda: of_transformers("RegNet"),
    "convnext": lambda: of_transformers("ConvNext"),
    "mobilenet_v2": lambda: of_transformers("MobileNetV2"),
    "mobilenet_v1": lambda: of_transformers("MobileNetV1"),
    "efficientnet": lambda: of_transformers(
        "EfficientNet", width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280
    ),
    "shufflenet": shufflenet,
    "squeezenet": squeezenet,
    "inception": inception,
    "unet": UNet,
    "deeplab": Atrous,
}
TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: of_transformers("ViT", **BERT),
    "swin": lambda: of_transformers("Swin"),
    "bert": lambda: of_transformers("Bert", **BERT),
    "gpt2": lambda: of_transformers("GPT2", **GPT2),
}
ON_TOKENS = {"bert", "gpt2"}


def make(name: str, batch: int) -> tuple[nn.Module, Tensor]:
    """A model and a batch for it."""
    torch.manual_seed(0)
    model = shaken({**CNNS, **TRANSFORMERS}[name]())
    if name in ON_TOKENS:
        return model, torch.randint(1000, (batch, 128))
    return model, torch.randn(batch, 3, 224, 224)
