"""The same filter without a loop over time: T steps by 2 log₂ T batched compositions.

A time step is an *element*: an observation of the state before, with precision J and information η,
followed by a transition h' = A h + b + N(0, C). Two elements in sequence are again one element
(Särkkä and García-Fernández 2021), and that composition is associative, so that all beliefs can be
computed as the prefixes of a product.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.examples.data_assimilation.recursion import (
    Belief,
    matmul,
    matvec,
    predict,
    transposed,
    update,
)


class Element(NamedTuple):
    """p(h', o | h) as a function of h and h': observation (J, η), then transition (A, b, C)."""

    precision: Tensor
    information: Tensor
    transition: Tensor
    offset: Tensor
    noise: Tensor


def apply(belief: Belief, element: Element) -> Belief:
    """The belief after an element."""
    seen = update(belief, element.precision, element.information)
    moved = predict(seen, element.transition, element.noise)
    return Belief(moved.mean + element.offset, moved.covariance)


def compose(first: Element, second: Element) -> Element:
    """The one element that is ``first`` and then ``second``."""
    between = Belief(first.offset, first.noise)
    offset, noise = apply(between, second)
    # Γ = (C⁻¹ + J)⁻¹, so that (I + CJ)⁻¹ = I - ΓJ.
    gamma = update(between, second.precision, second.information).covariance
    seen = matmul(second.precision, first.transition)
    kept = first.transition - matmul(gamma, seen)
    surprise = second.information - matvec(second.precision, first.offset)
    return Element(
        first.precision + matmul(transposed(kept), seen),
        first.information + matvec(transposed(kept), surprise),
        matmul(second.transition, kept),
        offset,
        noise,
    )


def beliefs_in_parallel(initial: Belief, elements: Element) -> Belief:
    """The beliefs before each of m elements and after the last, by 2 log₂ m batched steps.

    Neighbouring elements are composed to half as many, which give every second belief; the others
    are one element further.

    Args:
        initial: before the first element; vectors of shape (2, B, 1, K).
        elements: with time in the dimension before the last, m of them.

    Returns:
        m + 1 beliefs.
    """
    count = elements.information.shape[-2]
    if count == 0:
        return initial
    first = Element(*(part[..., 0::2, :] for part in elements))
    second = Element(*(part[..., 1::2, :] for part in elements))
    pairs = compose(Element(*(part[..., : count // 2, :] for part in first)), second)
    even = beliefs_in_parallel(initial, pairs)
    odd = apply(Belief(*(part[..., : (count + 1) // 2, :] for part in even)), first)
    return Belief(*(_interleaved(*parts) for parts in zip(even, odd, strict=True)))


def _interleaved(even: Tensor, odd: Tensor) -> Tensor:
    """Even and odd entries in their order; there may be one more of the even ones."""
    both = torch.stack([even[..., : odd.shape[-2], :], odd], -2).flatten(-3, -2)
    return torch.cat([both, even[..., odd.shape[-2] :, :]], -2)
