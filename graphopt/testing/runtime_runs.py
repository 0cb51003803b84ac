"""Training runs that `check_runtime` compares: the same steps, in one go or with interruptions."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.api import optimize
from graphopt.model.checkpoint import load_state_dict, state_dict
from graphopt.model.comparison import same
from graphopt.model.controller import Controller, controller_of
from graphopt.model.tensors import tensors_of
from graphopt.model.trial import Trial
from graphopt.passbase import Pass

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

Factory = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


def small_model() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model that is trained where none is given: three linear layers in double precision."""
    layers = [nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double(), (torch.randn(8, 4, dtype=torch.float64),)


@dataclass(frozen=True)
class Subject:
    """What is checked, and on which rank of how many.

    Attributes:
        passes: the pipeline.
        factory: makes the model and an example batch, from the random stream.
    """

    passes: tuple[Pass, ...]
    factory: Factory
    rank: int = 0
    world: int = 1

    def start(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model, the same each time, and its example batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.factory()


class Run:
    """A model in training by stochastic gradient descent.

    Args:
        subject: what is checked.
        verify: see `graphopt.optimize`.
    """

    def __init__(self, subject: Subject, verify: str = "off") -> None:
        self.subject = subject
        model, self.example = subject.start()
        # In place: what it returns is the same object, or a plan where a plan was asked for.
        optimize(model, passes=list(subject.passes), backend="eager", verify=verify)
        self.model = model
        self.optimizer = _optimizer(self.model)
        self.number = 0

    @property
    def controller(self) -> Controller:
        """Of the model."""
        found = controller_of(self.model)
        assert found is not None, "the model is not optimized any more"
        return found

    @property
    def session(self) -> Session:
        """What the model keeps between its steps."""
        return self.controller.session

    # -- steps -------------------------------------------------------------------------------------

    def batches(self, micro: int = 1) -> list[tuple[Tensor, ...]]:
        """The next micro-batches."""
        return batches(self.subject, self.example, self.number, micro)

    def steps(self, count: int, micro: int = 1, before: Callable[[], None] | None = None) -> None:
        """Train with so many micro-batches per step; `before` is called before each."""
        for _ in range(count):
            self.step(self.batches(micro), before)

    def step(
        self, micro_batches: list[tuple[Tensor, ...]], before: Callable[[], None] | None = None
    ) -> None:
        """One step of the optimizer."""
        self.optimizer.zero_grad()
        torch.manual_seed(self.number)
        for inputs in micro_batches:
            if before is not None:
                before()
            ends = inputs is micro_batches[-1]
            # Not the model's own `no_sync`: a part need not offer that.
            with nullcontext() if ends else self.session.no_sync():
                loss = loss_of(self.model(*inputs)) / len(micro_batches)
            torch.autograd.backward(loss)
        self.optimizer.step()
        self.number += 1

    def prepare(self) -> None:
        """Make the specialisation, without running it."""
        self.controller.specialise(self.model, self.batches()[0], {})

    def trial(self, *, watched: bool = False) -> None:
        """A step that leaves no trace, as verification makes it."""
        around = self.session.watched_trial if watched else self.session.trial
        trial = Trial(self.model, self.batches()[0], {}, around)
        trial.observe(lambda model, *inputs: model(*inputs))

    # -- what is compared --------------------------------------------------------------------------

    def read(self) -> dict[str, Tensor]:
        """Parameters, buffers, gradients, own state and flags, as they are now."""
        named = list(self.model.named_parameters())
        found = {f"parameter {n!r}": p.detach() for n, p in named}
        found |= {f"buffer {n!r}": b for n, b in self.model.named_buffers()}
        found |= {f"gradient of {n!r}": p.grad for n, p in named if p.grad is not None}
        for owner, state in self.session.states.items():
            found |= {f"state '{owner}/{name}'": value for name, value in state.items()}
        copies = {name: value.clone() for name, value in found.items()}
        flags = self.session.synchronise, self.session.pending
        return copies | {"flag of the session": torch.tensor(flags)}

    def result(self) -> dict[str, Tensor]:
        """What two runs of equal steps have in common; ranks may divide their state otherwise."""
        found = self.read()
        if self.subject.world == 1:
            return found
        return {name: value for name, value in found.items() if not name.startswith("state ")}

    # -- saving and copying ------------------------------------------------------------------------

    def save(self) -> bytes:
        """All of a run, as a file has it."""
        file = io.BytesIO()
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "passes": state_dict(self.model),
            "number": self.number,
        }
        torch.save(saved, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Continue from a saved run."""
        found = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        load_state_dict(self.model, found["passes"])
        self.number = found["number"]

    def copy(self) -> Run:
        """A run of its own from here on."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = _optimizer(other.model)
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other


def batches(
    subject: Subject, example: tuple[Tensor, ...], number: int, micro: int
) -> list[tuple[Tensor, ...]]:
    """This rank's micro-batches of a step, each of the example's shape and near it.

    Steps of one and of several micro-batches run the same specialisation.
    """
    first = (number * subject.world + subject.rank) * micro
    return [tuple(_changed(value, first + i) for value in example) for i in range(micro)]


def together(parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """One batch of several micro-batches."""
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _changed(value: Tensor, seed: int) -> Tensor:
    if not value.is_floating_point():
        return value.roll(seed, 0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return value + 0.1 * noise.to(value)


def loss_of(outputs: object) -> Tensor:
    """A mean over the batch, of all that is differentiable."""
    found = [t for _, t in tensors_of(outputs) if t.requires_grad]
    return torch.stack([t.square().mean() + t.mean() for t in found]).sum()


def first_difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    """The name of the first value that is not bit-equal; ``""`` where all are."""
    for name in sorted(one.keys() | other.keys()):
        if name not in one or name not in other or not _equal(one[name], other[name]):
            return name
    return ""


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and same(one, other)


def _optimizer(model: nn.Module) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
