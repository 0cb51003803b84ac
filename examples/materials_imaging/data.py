"""Simulated convergent-beam electron diffraction of crystals.

A converged electron beam is scanned over a thin crystal; at each position the camera records a
diffraction pattern. With the projected potential V of the crystal (a phase, in radians) cut into
slices, the wave psi is, for every slice,

    psi <- F^-1[ P(k) F[ psi exp(i V / slices) ] ],     P(k) = exp(-i pi d k^2)

and the camera sees ``|F psi|^2`` with Poisson noise. Lengths are in pixels, k in cycles per pixel.

The beam is defocused until each disc is a shadow image of the crystal at a scale of 1 to 1: with
the aberration ``chi = pi z k^2``, a ray of frequency k crosses the crystal at ``z k`` from the scan
position, and it meets the camera at pixel ``N k``. For ``z = N`` these are equal. With the opposite
defocus, ``z = -N``, shadow images are upside down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from graphopt.examples.common import WorkloadError, check_count, check_tensor

SIZE = 32
GRID = 4
POSITIONS = GRID * GRID
DEFOCUS = float(SIZE)
APERTURE = 0.4  # cycles per pixel
SLICES = 3
DISTANCE = 3.0  # between slices, in units of pixels squared per wavelength
DOSE = 2e5  # electrons per pattern
WIDTH = 1.2  # of an atom, pixels
_MOST_ATOMS = 200


@dataclass(frozen=True)
class Specimens:
    """Patterns with what they were recorded of.

    Attributes:
        patterns: [n, 16, 32, 32]: the fourth roots of intensities, by scan position, moved so that
            the scan position is where it is in the specimen; `prepared` for a reconstruction.
        potential: [n, 1, 32, 32], radians.
        atoms: [n, 200, 2], row and column of every atom, pixels; outside of the picture where there
            are fewer.
    """

    patterns: Tensor
    potential: Tensor
    atoms: Tensor

    def __post_init__(self) -> None:
        check_tensor("patterns", self.patterns, (None, POSITIONS, SIZE, SIZE))
        check_tensor("potential", self.potential, (len(self.patterns), 1, SIZE, SIZE))
        check_tensor("atoms", self.atoms, (len(self.patterns), _MOST_ATOMS, 2))

    def prepared(self, centre: Tensor, scale: float) -> Specimens:
        """The same with patterns in units of their contrast, and zero outside of the disc.

        What is outside of the disc are single electrons, whose fourth roots are mostly noise.

        Args:
            centre: mean of patterns in training, [16, 32, 32].
            scale: what they are divided by.
        """
        patterns = (self.patterns - centre) * discs() / scale
        return Specimens(patterns, self.potential, self.atoms)

    def to(self, device: torch.device) -> Specimens:
        """The same on another device."""
        return Specimens(*(t.to(device) for t in (self.patterns, self.potential, self.atoms)))


def make_specimens(count: int, generator: Generator, defocus: float = DEFOCUS) -> Specimens:
    """Draw crystals and record their patterns.

    Args:
        count: how many, above zero.
        generator: on the CPU; the crystals do not depend on the defocus.
        defocus: z, pixels squared; its opposite is the negative control.
    """
    check_count("crystals", count)
    potential, atoms = make_crystals(count, generator)
    parts = [
        record(part, generator, defocus) for part in torch.split(potential, 64)
    ]  # the waves of 64 crystals take 8 MB
    return Specimens(torch.cat(parts), potential[:, None], atoms)


def make_crystals(count: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw lattices of Gaussian atoms with a random cell, rotation, vacancies and two species.

    Returns:
        The potential, [count, 32, 32], and the positions of the atoms, [count, 200, 2].
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    a, b, angle = uniform(5, 8), uniform(5, 8), uniform(0, math.pi)
    # Sites of a grid that covers the picture for every rotation and the smallest cell.
    steps = torch.arange(-6.0, 7.0)
    i, j = (g.flatten()[None] for g in torch.meshgrid(steps, steps, indexing="ij"))
    offset = torch.rand(2, count, 1, generator=generator) - 0.5
    x, y = a * (i + offset[0]), b * (j + offset[1])
    centre = (SIZE - 1) / 2
    jitter = 0.5 * torch.randn(2, count, i.shape[1], generator=generator)
    rows = centre + angle.cos() * x - angle.sin() * y + jitter[0]
    columns = centre + angle.sin() * x + angle.cos() * y + jitter[1]
    species = torch.where((i + j) % 2 == 0, uniform(0.7, 1.0), uniform(0.4, 0.7))
    present = torch.rand(count, i.shape[1], generator=generator) > 0.1
    heights = species * present
    pixels = torch.arange(SIZE)
    along_rows = torch.exp(-((pixels - rows[..., None]) ** 2) / (2 * WIDTH**2))
    along_columns = torch.exp(-((pixels - columns[..., None]) ** 2) / (2 * WIDTH**2))
    potential = torch.einsum("na,nah,naw->nhw", heights, along_rows, along_columns)
    atoms = torch.full((count, _MOST_ATOMS, 2), -100.0)
    inside = torch.stack([rows, columns], 2)
    atoms[:, : i.shape[1]] = torch.where(present[..., None], inside, -100.0)
    return potential, atoms


def record(potential: Tensor, generator: Generator, defocus: float = DEFOCUS) -> Tensor:
    """Simulate the patterns of some crystals.

    Args:
        potential: [n, 32, 32], radians.
        generator: of the Poisson noise.
        defocus: z, pixels squared.

    Returns:
        [n, 16, 32, 32], see `Specimens`.
    """
    check_tensor("potential", potential, (None, SIZE, SIZE))
    if not math.isfinite(defocus):
        raise WorkloadError(f"a defocus of {defocus}", "give it in pixels squared")
    wave = propagate(potential, defocus)
    intensity = torch.fft.fft2(wave).abs().square()
    intensity = intensity / intensity.sum((-2, -1), keepdim=True)
    counts = torch.poisson(DOSE * intensity, generator=generator)
    patterns = (counts / DOSE * SIZE**2) ** 0.25
    shifted = torch.fft.fftshift(patterns, dim=(-2, -1))
    moved = [_to_position(shifted[:, p], place) for p, place in enumerate(scan_positions())]
    return torch.stack(moved, 1)


def scan_positions() -> list[tuple[int, int]]:
    """Row and column of each position of the beam, pixels."""
    step = SIZE // GRID
    places = [step // 2 + step * i for i in range(GRID)]
    return [(row, column) for row in places for column in places]


def probe(defocus: float) -> Tensor:
    """The wave of the beam at row 0 and column 0, [32, 32], complex, with a norm of 1."""
    k = _frequencies()
    spectrum = (k < APERTURE**2) * torch.exp(-1j * math.pi * defocus * k)
    wave = torch.fft.ifft2(spectrum)
    normed: Tensor = wave / wave.abs().square().sum().sqrt()
    return normed


def discs() -> Tensor:
    """Where the beam falls without a specimen, as patterns are moved: [16, 32, 32], 0 or 1."""
    disc = torch.fft.fftshift(_frequencies() < APERTURE**2).float()
    return torch.stack([_to_position(disc, place) for place in scan_positions()])


def propagate(potential: Tensor, defocus: float) -> Tensor:
    """The wave behind each crystal for each beam position, [n, 16, 32, 32]."""
    beam = probe(defocus)
    beams = torch.stack([torch.roll(beam, place, (0, 1)) for place in scan_positions()])
    wave = beams.expand(len(potential), -1, -1, -1)
    transmission = torch.exp(1j * potential / SLICES)[:, None]
    propagator = torch.exp(-1j * math.pi * DISTANCE * _frequencies())
    for _ in range(SLICES):
        wave = torch.fft.ifft2(propagator * torch.fft.fft2(wave * transmission))
    return wave


def _to_position(pattern: Tensor, place: tuple[int, int]) -> Tensor:
    """Move the middle of the camera to a scan position."""
    return torch.roll(pattern, (place[0] - SIZE // 2, place[1] - SIZE // 2), (-2, -1))


def _frequencies() -> Tensor:
    """The squares of all spatial frequencies, [32, 32]."""
    k = torch.fft.fftfreq(SIZE)
    square: Tensor = k[:, None] ** 2 + k[None] ** 2
    return square
