"""Forward takes, makes or returns what is no tensor of a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.support.refusals.example import Example, Refusal, Small, Way, results, small, train


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Masked(Packed):
    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        inside = torch.arange(x.shape[1])[None] < lengths[:, None]
        return self.rnn(x)[0] * inside[:, :, None]


def _sentences(model: nn.Module) -> object:
    return train(model, torch.tensor([3, 2]), x=torch.randn(2, 3, 4))


def _packed_sentences(model: nn.Module) -> object:
    x, lengths = torch.randn(2, 3, 4), torch.tensor([3, 2])
    y = model(pack_padded_sequence(x, lengths, batch_first=True))[0]
    y.data.sum().backward()
    return results(model)


def _padded_sentences(model: nn.Module) -> object:
    model(torch.randn(2, 3, 4))[0].sum().backward()
    return results(model)


PACKED = Refusal(
    "packed",
    "packs sequences, or takes packed ones",
    "how a recurrent network runs on them depends on data",
    "pad, and mask what is padded",
    (
        Example(
            "GRU",
            Packed,
            "forward packs sequences",
            "packed = pack_padded_sequence",
            "^pad the sequences",
            _sentences,
            way=Way(Masked, _sentences),
        ),
        Example(
            "input",
            lambda: nn.GRU(4, 3, batch_first=True),
            "a value or a size that depends on data",
            hint="^pad the sequences",
            step=_packed_sentences,
            way=Way(lambda: nn.GRU(4, 3, batch_first=True), _padded_sentences, same=False),
        ),
    ),
)


def keeps_numpy(s: Small, h: Tensor) -> Tensor:
    s.kept.append(h.detach().numpy().sum())
    return h


def keeps_number(s: Small, h: Tensor) -> Tensor:
    s.kept.append(float(h.detach().numpy().sum()))
    return h


def interpolates(s: Small, h: Tensor) -> Tensor:
    return h * torch.from_numpy(np.interp(h.detach().numpy(), [0.0, 1.0], [0.0, 1.0])).float()


NUMPY = Refusal(
    "numpy",
    "returns or keeps a NumPy scalar, or calls NumPy functions that have no like in torch",
    "it would come back as another type; Dynamo runs NumPy by torch",
    "`float(…)`; compute by torch",
    (
        Example(
            "scalar", small(keeps_numpy), "NumPy scalar", hint="float", way=Way(small(keeps_number))
        ),
        Example(
            "function",
            small(interpolates),
            "numpy function",
            "np.interp",
            "by torch",
            way=Way(small(lambda s, h: h * h.detach().clamp(0, 1))),
        ),
    ),
)


class Sums(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, parts: Any) -> Tensor:
        total = 0
        for part in parts:
            total = total + self.lin(part)
        return total


def _lazily(model: nn.Module) -> object:
    model(torch.ones(3, 4) * i for i in range(2)).sum().backward()
    return results(model)


def _at_once(model: nn.Module) -> object:
    model([torch.ones(3, 4) * i for i in range(2)]).sum().backward()
    return results(model)


def _listed(model: nn.Module) -> object:
    (y,) = model(torch.randn(3, 4))
    y.sum().backward()
    return results(model)


GENERATORS = Refusal(
    "generators",
    "takes or returns a generator",
    "what it yields later is no part of the graph",
    "a list or a tuple",
    (
        Example(
            "returned",
            small(lambda s, h: (k for k in [h])),
            "generator is returned",
            hint="list",
            step=_listed,
            way=Way(small(lambda s, h: [h]), _listed),
        ),
        Example(
            "taken", Sums, "tp_iter", "for part in parts", "list", _lazily, way=Way(Sums, _at_once)
        ),
    ),
)


def _dense(body: Any) -> Way:
    return Way(small(body))


LAYOUTS = Refusal(
    "layouts",
    "makes sparse or nested tensors",
    "Dynamo has no graph for them",
    "dense tensors; or make them outside",
    (
        Example(
            "sparse",
            small(lambda s, h: torch.sparse.mm(torch.eye(3).to_sparse(), h)),
            "sparse",
            "to_sparse()",
            "dense",
            way=_dense(lambda s, h: torch.eye(3) @ h),
        ),
        Example(
            "nested",
            small(lambda s, h: torch.nested.nested_tensor([h[0], h[1]]).to_padded_tensor(0.0)),
            "fake tensors",
            "nested_tensor",
            "dense",
            step=lambda m: m(torch.randn(3, 4)).detach(),
            way=Way(small(lambda s, h: h[:2]), lambda m: m(torch.randn(3, 4)).detach()),
        ),
    ),
)

ALL = (PACKED, NUMPY, GENERATORS, LAYOUTS)
