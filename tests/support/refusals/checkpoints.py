"""Forward is run a second time, in the backward, and eager changes things a second time."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.support.refusals.example import Example, Refusal, Small, Step, Way, results, small


def _checkpointed(reentrant: bool) -> Step:
    def step(model: nn.Module) -> object:
        x = torch.randn(3, 4, requires_grad=True)
        y = checkpoint(model, x, use_reentrant=reentrant)
        assert isinstance(y, Tensor)
        y.square().sum().backward()
        return [y.detach().clone(), x.grad, *results(model)]

    return step


def keeps(s: Small, h: Tensor) -> Tensor:
    s.kept.append(h.detach())
    return h.tanh() * len(s.kept)


KEEPS = Refusal(
    "changes objects in a checkpoint",
    "`checkpoint(m, x, use_reentrant=False)` where forward keeps or counts (or has lazy layers)",
    "eager breaks off the second run at the last saved tensor, and so changes some of it twice",
    "`use_reentrant=True`; keep the state outside",
    (
        Example(
            "kept",
            small(keeps),
            "changes Python objects",
            "def forward",
            "use_reentrant=True",
            _checkpointed(reentrant=False),
            way=Way(small(keeps), _checkpointed(reentrant=True), same=False),
        ),
    ),
)


class Normalised(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.lin, self.norm, self.inside = nn.Linear(4, 4), nn.BatchNorm1d(4), inside

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        run: Callable[[Tensor], Tensor] = self.norm if self.inside else torch.tanh
        y: Tensor = checkpoint(run, h, use_reentrant=False)
        return y if self.inside else self.norm(y)


class Counted(nn.Module):
    """Counts what is checkpointed: inside of that, or outside."""

    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.lin, self.calls, self.inside = nn.Linear(4, 4), 0, inside

    def _counts(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.lin(x)
        return y

    def forward(self, x: Tensor) -> Tensor:
        if not self.inside:
            self.calls += 1
        run = self._counts if self.inside else self.lin
        y: Tensor = checkpoint(run, x, use_reentrant=False)
        return y


NORMS = Refusal(
    "writes in a checkpoint",
    "checkpoints a part of itself that writes a buffer (a batch norm in train mode) or counts",
    "eager writes it once more in the backward",
    "leave such layers out of the checkpoint, or in eval mode",
    (
        Example(
            "batch norm",
            lambda: Normalised(inside=True),
            "changes buffer 'norm",
            "checkpoint(run",
            "without running statistics",
            way=Way(lambda: Normalised(inside=False), same=False),
        ),
        Example(
            "counter",
            lambda: Counted(inside=True),
            "side effect",
            "checkpoint(run",
            "outside of what is checkpointed",
            way=Way(lambda: Counted(inside=False)),
        ),
    ),
)


class Dropped(nn.Module):
    def __init__(self, preserve: bool) -> None:
        super().__init__()
        self.lin, self.drop, self.preserve = nn.Linear(4, 4), nn.Dropout(0.5), preserve

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        y: Tensor = checkpoint(self.drop, h, use_reentrant=False, preserve_rng_state=self.preserve)
        return y


DRAWS = Refusal(
    "draws anew in a checkpoint",
    "checkpoints a part that draws (dropout) with `preserve_rng_state=False`",
    "eager's gradient is that of other random numbers than the output",
    "leave `preserve_rng_state` out",
    (
        Example(
            "dropout",
            lambda: Dropped(preserve=False),
            "preserve_rng_state=False",
            hint="leave preserve_rng_state out",
            way=Way(lambda: Dropped(preserve=True), same=False),
        ),
    ),
)


class InMode(nn.Module):
    """Computes a part in a mode of its own."""

    def __init__(self, mode: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.lin, self.mode = nn.Linear(4, 4), mode

    def forward(self, x: Tensor) -> Tensor:
        with self.mode():
            y: Tensor = self.lin(x)
        return y


def _validates(model: nn.Module) -> object:
    with torch.no_grad():
        y = model(torch.randn(3, 4))
    return [y.detach(), y.requires_grad]


def _infers(model: nn.Module) -> object:
    return model(torch.randn(3, 4)).clone()


MODES = Refusal(
    "modes of outputs",
    "returns what it computes under `inference_mode()`, or under `enable_grad()` in a call without",
    "a graph keeps the values, and not how autograd may use them",
    "`torch.no_grad()` in forward; call it with gradients",
    (
        Example(
            "inference_mode",
            lambda: InMode(torch.inference_mode),
            "inference_mode",
            "self.lin(x)",
            "no_grad",
            _infers,
            way=Way(lambda: InMode(torch.no_grad), _infers),
        ),
        Example(
            "enable_grad",
            lambda: InMode(torch.enable_grad),
            "turns gradients on",
            "self.lin(x)",
            "without torch.no_grad",
            _validates,
            way=Way(lambda: InMode(torch.enable_grad), same=False),
        ),
    ),
)


def _first_only(model: nn.Module) -> object:
    x = torch.randn(3, 4)
    y, z = model(x)
    with torch.no_grad():
        z.mul_(2)
    y.sum().backward()
    return results(model)


CHANGED = Refusal(
    "changes an output",
    "changes an output in place before its backward, where another output needs it",
    "the whole step is one node of autograd, which raises PyTorch's own error",
    "work on a clone",
    (
        Example(
            "mul_",
            small(lambda s, h: (h.sin(), h.exp())),
            "modified by an inplace operation",
            step=_first_only,
            error=RuntimeError,
            plain=False,
            way=Way(small(lambda s, h: (h.sin(), h.exp().clone())), _first_only, same=False),
        ),
    ),
)


class Segments(nn.Module):
    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.parts = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.at_once = at_once

    def forward(self, x: Tensor) -> Any:
        if self.at_once:
            return checkpoint_sequential(self.parts, 2, x, use_reentrant=False)
        h = checkpoint(self.parts[:2], x, use_reentrant=False)
        return self.parts[2](h)


SEGMENTS = Refusal(
    "segments",
    "calls `checkpoint_sequential`",
    "Dynamo does not follow it",
    "`checkpoint` for each segment",
    (
        Example(
            "two",
            lambda: Segments(at_once=True),
            "skipped",
            "checkpoint_sequential",
            "^checkpoint each segment",
            way=Way(lambda: Segments(at_once=False)),
        ),
    ),
)


class Encoder(nn.Module):
    """Pads the second of two sequences."""

    def __init__(self, nested: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        self.eval()

    def forward(self, x: Tensor, pads: Tensor) -> Any:
        return self.layers(x, src_key_padding_mask=pads)


def _encodes(model: nn.Module) -> object:
    pads = torch.zeros(2, 3, dtype=torch.bool)
    pads[1, 2] = True
    with torch.no_grad():
        return model(torch.randn(2, 3, 4), pads)


FAST_PATH = Refusal(
    "fast path",
    "takes the fast path of `nn.TransformerEncoder` or `nn.MultiheadAttention` (evaluation without "
    "gradients) under autocast of CPUs, or that of the encoder with `src_key_padding_mask`",
    "that operator casts inside of itself; eager writes 0 where a batch is padded",
    "`torch.backends.mha.set_fastpath_enabled(False)`; `enable_nested_tensor=False`, also in eager",
    (
        Example(
            "padded",
            lambda: Encoder(nested=True),
            "nested tensors of a padded batch",
            "self.layers(x",
            "enable_nested_tensor=False",
            _encodes,
            way=Way(lambda: Encoder(nested=False), _encodes, same=False),
        ),
    ),
    tested_by="tests/capture/test_autocast.py::"
    "test_the_fast_path_of_an_encoder_is_refused_under_autocast",
)

IN_FORWARD = (NORMS, DRAWS, MODES, SEGMENTS, FAST_PATH)
ALL = (KEEPS, CHANGED)
