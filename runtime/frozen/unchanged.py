"""Run an executable on kept values while the weights that they come from are what they were."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

# Elements compared per weight. Code that keeps moving averages updates ``.data``, which does not
# bump the version counter; such an update changes every element.
SAMPLE = 16

_UNITS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
_pointer = Tensor.data_ptr
_version = cast("Callable[[Tensor], int]", cast("Any", torch._C.TensorBase)._version.__get__)

Read = Callable[[], Tensor]


class WhileUnchanged:
    """An executable whose prologue runs again when one of its weights has changed.

    Args:
        prologue: from weights to frozen values; both executables empty their argument list.
        main: takes the inputs of the call followed by the frozen values.
        sources: positions of the weights among the inputs.
        constants: tensors that the main executable holds; the last values of the prologue go into
            them instead of to its inputs.
    """

    def __init__(
        self, prologue: Any, main: Any, sources: Sequence[int], constants: Sequence[Tensor] = ()
    ) -> None:
        self.prologue = prologue
        self.main = main
        self.sources = tuple(sources)
        self.constants = tuple(constants)
        self.values: list[Tensor] = []
        self.weights = Weights()

    def __call__(self, arguments: list[Any]) -> Sequence[Any]:
        """Outputs of the main module; empties the list."""
        weights = [arguments[i] for i in self.sources]
        if not self.weights.are(weights):
            values = list(self.prologue(list(weights)))
            passed = len(values) - len(self.constants)
            for constant, value in zip(self.constants, values[passed:], strict=True):
                constant.data = value
            self.values = values[:passed]
        arguments.extend(self.values)
        return cast("Sequence[Any]", self.main(arguments))


class Weights:
    """What some weights were when they were last looked at."""

    def __init__(self) -> None:
        self._tensors: Sequence[Tensor] = ()
        self._places: list[int] = []
        self._versions: list[int] = []
        self._held: list[Tensor] = []
        self._reads: list[tuple[Read, Tensor]] = []

    def are(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors with the same numbers; they are what is known then."""
        if (
            len(tensors) == len(self._tensors)
            and all(map(operator.is_, tensors, self._tensors))
            and list(map(_version, tensors)) == self._versions
            and list(map(_pointer, tensors)) == self._places
            and all(torch.equal(read(), known) for read, known in self._reads)
        ):
            return True
        self._tensors = tuple(tensors)
        self._places = list(map(_pointer, tensors))
        self._versions = list(map(_version, tensors))
        # Their memory stays theirs, also where a weight gets another one: no address comes twice.
        self._held = [tensor.detach() for tensor in tensors]
        self._reads = [(read, read()) for read in _reads(self._held)]
        return False


def _reads(tensors: Sequence[Tensor]) -> list[Read]:
    """What reads some elements of all these tensors, as whole numbers: NaN is not equal to NaN."""
    samples = [_sample(tensor) for tensor in tensors if tensor.numel()]
    here = [sample for sample in samples if sample.device.type == "cpu"]
    reads: dict[torch.device, list[Tensor]] = {}
    for sample in samples:
        if sample.device.type != "cpu":
            reads.setdefault(sample.device, []).append(sample)
    # One concatenation promotes all dtypes to one.
    found: list[Read] = [
        lambda views=views: torch.cat(views).view(torch.uint8)  # type: ignore[misc]
        for views in reads.values()
    ]
    return [*found, _gathering(here)] if here else found


def _sample(tensor: Tensor) -> Tensor:
    """A view of some elements, spread over the memory of a tensor."""
    reach = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    step = max(1, reach // SAMPLE)
    return tensor.as_strided((-(-reach // step),), (step,))


def _gathering(samples: Sequence[Tensor]) -> Read:
    """One gather over the addresses of all samples: a call per tensor would take longer.

    The tensors have to be held, so that there is memory at these addresses.
    """
    places = [sample.data_ptr() for sample in samples]
    unit = math.gcd(4, *places, *(sample.element_size() for sample in samples))
    first = min(places)
    index = torch.cat([_index(p - first, s, unit) for p, s in zip(places, samples, strict=True)])
    memory = (ctypes.c_char * ((int(index.max()) + 1) * unit)).from_address(first)
    numbers = torch.frombuffer(memory, dtype=_UNITS[unit])
    return lambda: numbers.take(index)


def _index(offset: int, sample: Tensor, unit: int) -> Tensor:
    size = sample.element_size()
    elements = offset + torch.arange(sample.numel()) * (sample.stride(0) * size)
    return ((elements[:, None] + torch.arange(0, size, unit)) // unit).flatten()
