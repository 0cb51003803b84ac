"""Deep Speech 2: convolutions, recurrent layers with sequence-wise batch normalisation, characters.

Amodei et al., "Deep Speech 2: End-to-End Speech Recognition in English and Mandarin" (2016),
arXiv 1512.02595. Utterances of a batch are padded to one length, and everything here is masked, so
that what is behind the end of an utterance changes neither its outputs nor its gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STRIDE = 2
"""Frames of features per frame of output."""


def clipped_relu(x: Tensor) -> Tensor:
    """min(max(x, 0), 20), elementwise."""
    return x.clamp(0, 20)


def output_lengths(lengths: Tensor) -> Tensor:
    """How many frames `DeepSpeech` returns for utterances of so many frames, elementwise."""
    return (lengths + STRIDE - 1) // STRIDE


def valid(lengths: Tensor, frames: int) -> Tensor:
    """Which frames belong to an utterance: lengths (batch,) to a boolean mask (batch, frames)."""
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


class SequenceNorm(nn.Module):
    """Batch normalisation over the valid frames of all utterances of a batch.

    In training B(x) = weight (x - E[x]) / √(Var[x] + eps) + bias, with mean and (biased)
    variance over batch and time; in inference with their running averages. Features are in the
    last dimension.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, features: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("variance", torch.ones(features))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Normalise.

        Args:
            x: (batch, time, ..., features).
            mask: (batch, time), true where x is valid.
        """
        mean, variance = self.mean, self.variance
        if self.training:
            weights = mask.to(x.dtype).reshape(*mask.shape, *[1] * (x.dim() - 2))
            weights = weights / (weights.sum() * x[0, 0, ..., 0].numel())
            dims = tuple(range(x.dim() - 1))
            mean = (weights * x).sum(dims)
            variance = (weights * (x - mean).square()).sum(dims)
            with torch.no_grad():
                self.mean.lerp_(mean, self.momentum)
                self.variance.lerp_(variance, self.momentum)
        return (x - mean) * ((variance + self.eps).rsqrt() * self.weight) + self.bias


class Convolution(nn.Module):
    """A convolution over time and frequency, with clipped ReLU.

    Frequency is strided by two, time by `stride`. Without normalisation it has a bias instead.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int], stride: int, norm: bool
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.filters = nn.Conv2d(inputs, outputs, kernel, (stride, 2), padding, bias=not norm)
        self.norm = SequenceNorm(outputs) if norm else None
        # So that a network without normalisation has signals of one size in all layers.
        nn.init.kaiming_uniform_(self.filters.weight, nonlinearity="relu")

    def forward(self, x: Tensor, mask: Tensor, mask_out: Tensor) -> Tensor:
        """From (batch, channels, time, frequency) with one mask to the same with the other."""
        # Behind its end an utterance has zeros, as a convolution pads it when it is alone.
        x = self.filters(x * mask[:, None, :, None])
        if self.norm is not None:
            x = self.norm(x.movedim(1, -1), mask_out).movedim(-1, 1)
        return clipped_relu(x)


class Recurrent(nn.Module):
    """A layer of simple recurrences: h_t = f(B(W x_t) + U h_{t-1}), with f = ReLU.

    Only the input's term is normalised, B; without normalisation it has a bias instead. With two
    directions, each has its W, B and U, and their outputs are summed.
    """

    def __init__(self, inputs: int, hidden: int, bidirectional: bool, norm: bool) -> None:
        super().__init__()
        directions = 2 if bidirectional else 1
        self.project = nn.Linear(inputs, directions * hidden, bias=not norm)
        self.norm = SequenceNorm(directions * hidden) if norm else None
        nn.init.kaiming_uniform_(self.project.weight, nonlinearity="relu")
        self.cells = nn.RNN(
            *(directions * hidden, hidden),
            nonlinearity="relu",
            bias=False,
            batch_first=True,
            bidirectional=bidirectional,
        )
        # `nn.RNN` computes one fused operator of all steps, but normalises nothing between W and U.
        # So W is applied before, and its own input weights only select each direction's half.
        for weight, half in zip(
            [p for name, p in self.cells.named_parameters() if name.startswith("weight_ih")],
            torch.split(torch.eye(directions * hidden), hidden),
            strict=True,
        ):
            weight.data.copy_(half)
            weight.requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """From (batch, time, inputs) to (batch, time, hidden)."""
        x = self.project(x)
        if self.norm is not None:
            x = self.norm(x, mask)
        # The backward direction comes to the padding first. From h = 0, a negative input keeps
        # h = 0 there, so the direction begins at the end of the utterance.
        x = x.masked_fill(~mask[..., None], -1.0)
        outputs: Tensor = self.cells(x)[0]
        if self.cells.bidirectional:
            forward, backward = outputs.chunk(2, dim=-1)
            outputs = forward + backward
        return outputs * mask[..., None]


class LookAhead(nn.Module):
    """Row convolution: r_{t,i} = Σ_{j=0..τ} W_{ij} h_{t+j,i}, a look into the future."""

    def __init__(self, features: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.rows = nn.Conv1d(features, features, ahead + 1, groups=features, bias=False)
        # The identity: training begins as without look-ahead.
        nn.init.zeros_(self.rows.weight)
        nn.init.ones_(self.rows.weight[..., 0])

    def forward(self, x: Tensor) -> Tensor:
        """From (batch, time, features), zero behind each end, to the same shape."""
        padded = F.pad(x.transpose(1, 2), (0, self.ahead))
        rows: Tensor = self.rows(padded)
        return rows.transpose(1, 2)


class DeepSpeech(nn.Module):
    """From features of utterances to log-probabilities of characters, for CTC.

    Args:
        bands: of frequency in the features.
        symbols: characters, with CTC's blank.
        layers: recurrent ones.
        hidden: units of each, per direction.
        bidirectional: whether recurrences run in both directions.
        norm: whether convolutions and recurrent layers have batch normalisation.
        ahead: frames of future that a row convolution behind the recurrent layers sees; 0: none.
        channels: of each convolution. The first one halves time, all halve frequency.
    """

    def __init__(
        self,
        bands: int,
        symbols: int,
        *,
        layers: int = 3,
        hidden: int = 64,
        bidirectional: bool = True,
        norm: bool = True,
        ahead: int = 0,
        channels: tuple[int, ...] = (16,),
    ) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList()
        before, frequencies = 1, bands
        for i, now in enumerate(channels):
            kernel, stride = ((11, 7), STRIDE) if i == 0 else ((5, 5), 1)
            self.convolutions.append(Convolution(before, now, kernel, stride, norm))
            before, frequencies = now, (frequencies + 1) // 2
        width = before * frequencies
        self.recurrent = nn.ModuleList(
            Recurrent(hidden if i else width, hidden, bidirectional, norm) for i in range(layers)
        )
        self.look_ahead = LookAhead(hidden, ahead) if ahead else None
        self.output = nn.Linear(hidden, symbols)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities (batch, ⌈time / 2⌉, symbols); valid are the first `output_lengths`.

        Args:
            features: (batch, time, bands); anything behind an utterance's end.
            lengths: (batch,), frames of each utterance.
        """
        mask = valid(lengths, features.shape[1])
        mask_out = valid(output_lengths(lengths), -(-features.shape[1] // STRIDE))
        x = features.unsqueeze(1)
        for convolution in self.convolutions:
            x = convolution(x, mask, mask_out)
            mask = mask_out
        x = x.transpose(1, 2).flatten(2)
        for layer in self.recurrent:
            x = layer(x, mask_out)
        if self.look_ahead is not None:
            x = self.look_ahead(x)
        return F.log_softmax(self.output(x), dim=-1)


def ctc(log_probabilities: Tensor, lengths: Tensor, targets: Tensor, sizes: Tensor) -> Tensor:
    """Mean over utterances of -log P(characters | features) per character.

    P sums over all alignments: sequences of one symbol per frame that give the characters when
    repetitions are merged and blanks (symbol 0) removed.

    Args:
        log_probabilities: (batch, frames, symbols), as `DeepSpeech` returns them.
        lengths: (batch,), frames of *features* of each utterance.
        targets: (batch, characters), anything behind their ends.
        sizes: (batch,), characters of each utterance.
    """
    return F.ctc_loss(
        log_probabilities.transpose(0, 1), targets, output_lengths(lengths), sizes, blank=0
    )
