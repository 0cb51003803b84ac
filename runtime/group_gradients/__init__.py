"""Reduce gradients over ranks, in the groups that the plan says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor

from graphopt import registry
from graphopt.errors import ArgumentError
from graphopt.plan import Plan, Role
from graphopt.plan.group_gradients import Reduction
from graphopt.runtime.engine.step import Backward, Half, MakeBackward, Step
from graphopt.runtime.group_gradients import exact
from graphopt.runtime.group_gradients.checked import Checked
from graphopt.runtime.group_gradients.joining import Joining
from graphopt.runtime.group_gradients.messages import Messages
from graphopt.runtime.group_gradients.reducing import LOCAL, Reducing
from graphopt.runtime.group_gradients.stamp import Stamp
from graphopt.runtime.part import RuntimePart
from graphopt.runtime.session import Session

# What begins the names of gradients that wait for the integer wire: micro-batch and parameter.
_WAITING = "waiting/"


class GroupGradients(RuntimePart[Reduction]):
    """Sends the messages of a model's backward passes."""

    name: ClassVar[str] = "group_gradients"
    methods: ClassVar[tuple[str, ...]] = ("no_sync", "noise_scale", "join")

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        ranks = session.ranks.get("dp")
        self.messages = None if ranks is None else Messages(ranks, self.state)

    def noise_scale(self) -> float | None:
        """Gradient noise scale in examples (McCandlish et al., arXiv 1812.06162, eq. 2.9).

        Measured every few steps from the gradients before and after their reduction; ``None`` on
        one rank, with a wire other than ``native``, and before there is an estimate.
        """
        return None if self.messages is None else self.messages.noise.value

    @contextmanager
    def join(self) -> Iterator[None]:
        """Within, ranks may have unequally many batches, as in ``DistributedDataParallel.join``.

        A rank that has left the block early sends zeros in the steps of the others. In the end all
        have the parameters of one that made the last step; buffers and optimizers stay their own.

        Raises:
            ArgumentError: another pass sends messages, too; or a rank leaves without any step.
            RankError: a rank does not answer.
        """
        messages = self.messages
        if messages is None or messages.ranks.size == 1:
            yield
            return
        others = registry.names(registry.RUNTIME_PARTS)
        for name in self.session.passes:
            if name in others and name != self.name:
                raise ArgumentError(
                    f"join() works with {self.name} alone, and these passes include {name!r}",
                    hint="leave it out, or give all ranks as many batches",
                )
        messages.joining = joining = Joining(messages)
        self.session.uneven = True
        try:
            yield
            if not messages.step:
                raise ArgumentError(
                    "this rank leaves join() without a step, and does not know what others send",
                    hint="give every rank a batch at least",
                )
        finally:
            messages.joining, self.session.uneven = None, False
        joining.finish()

    def backward(self, part: Reduction, plan: Plan, below: MakeBackward) -> MakeBackward:
        """Choose between the forms that reduce and those that do not."""
        messages = self.messages
        assert messages is not None, "a plan that reduces gradients needs the ranks"

        def make(half: Half) -> Backward:
            if not any(slot.role is Role.LOCAL for slot in half.slots):
                return below(half)
            return Reducing(self.session, messages, part, plan, half, below)

        return make

    def finishes(self, part: Reduction) -> bool:
        """The integer wire has to keep micro-batches apart; stages have no common backward."""
        return part.wire == "int32" or part.at_end

    def finish(self, part: Reduction, step: Step, gradients: dict[str, Tensor]) -> None:
        """Keep the gradients of this micro-batch, and reduce all of them where the step ends."""
        if part.at_end:
            self._reduce(part, step, gradients)
            return
        local, presence = step.own.pop(LOCAL, ({}, None))
        if presence is None:
            return
        batches = self._waiting()
        batches.append({name: value for name, value in local.items() if value is not None})
        if not step.ends:
            self.state.update(
                {f"{_WAITING}{len(batches) - 1}/{n}": value for n, value in batches[-1].items()}
            )
            return
        for key in [k for k in self.state if k.startswith(_WAITING)]:
            del self.state[key]
        messages = self.messages
        assert messages is not None
        scale = self.session.loss_scale_of(step)
        messages.begin(part, step.parameters, step.examples, scale=scale)
        mine = {name for batch in batches for name in batch}
        question = presence.ask(messages.ranks, mine, messages.waiting)
        whole = [
            {n: b[n] if n in b else torch.zeros_like(step.parameters[n]) for n in local}
            for b in batches
        ]
        checked, form = Checked(self.session, messages, part), "several micro-batches by integers"
        local = {n: torch.stack([batch[n] for batch in whole]).sum(0) for n in local}
        if checked.distrusts(form):
            gradients.update(checked.means(local))
        else:
            means = exact.reduce(messages, part.grouping.groups, whole)
            instead = checked.check(form, local, means) if checked.wants(form) else None
            gradients.update(means if instead is None else instead)
        for name in presence.absent(local.keys() - mine, question):
            gradients.pop(name, None)

    def _reduce(self, part: Reduction, step: Step, gradients: dict[str, Tensor]) -> None:
        """Take the mean over ranks of the gradients that there are, group by group.

        Ranks of one stage have the same ones.
        """
        messages = self.messages
        assert messages is not None
        if not self.session.trying:
            messages.passes += 1
        if not step.ends:
            return
        scale = self.session.loss_scale_of(step)
        messages.begin(part, step.parameters, step.examples, scale=scale)
        checked, form = Checked(self.session, messages, part), "after the stages"
        distrusts, wants = checked.distrusts(form), checked.wants(form)
        local = dict(gradients) if distrusts or wants else {}
        if distrusts:
            gradients.update(checked.means(local))
            return
        sent = []
        for index, group in enumerate(part.grouping.groups):
            by_type: dict[torch.dtype, list[str]] = {}
            for name in group.names:
                if name in gradients:
                    by_type.setdefault(gradients[name].dtype, []).append(name)
            for dtype, names in by_type.items():
                stamp = Stamp(index, dtype, messages.ranks.size, messages.ranks.group.rank())
                mark = stamp.of(messages.number, gradients[names[0]].device)
                flat = torch.cat([*(gradients[n].reshape(-1) for n in names), mark])
                sent.append((names, flat, stamp, messages.start(flat, index)))
        for names, flat, stamp, work in sent:
            with messages.waiting(stamp.index):
                work.wait()
            body = messages.check(stamp, flat, messages.number).div_(messages.ranks.size)
            pieces = torch.split(body, [gradients[n].numel() for n in names])
            for name, piece in zip(names, pieces, strict=True):
                gradients[name] = piece.view(gradients[name].shape)
        if wants:
            gradients.update(checked.check(form, local, gradients) or {})

    def _waiting(self) -> list[dict[str, Tensor]]:
        """Gradients of earlier micro-batches of this step, in order."""
        found: dict[int, dict[str, Tensor]] = {}
        for key, value in self.state.items():
            if key.startswith(_WAITING):
                number, _, name = key.removeprefix(_WAITING).partition("/")
                found.setdefault(int(number), {})[name] = value
        return [found[number] for number in sorted(found)]

    def settle(self) -> None:
        """Wait for messages that belong to the next step.

        Raises:
            RankError: they did not arrive.
        """
        if self.messages is None:
            return
        step = self.messages.step + 1
        what = f"the gradients for step {step} did not arrive"
        with self.messages.ranks.group.waiting(what):
            self.messages.history.settle()

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue from a saved state; what messages have left is overwritten where it lies."""
        if self.messages is not None:
            self.messages.take_expected()  # of a step that is not the one before any more
        for name, tensor in saved.items():
            if name in self.state:
                self.state[name].copy_(tensor)
            else:
                self.state[name] = tensor.clone()

    def notes(self) -> tuple[str, ...]:
        """Gradient noise, and what was not finite."""
        if self.messages is None:
            return ()
        noise = self.messages.noise
        scale: tuple[str, ...] = ()
        if noise.value:
            found = f"{noise.value:.4g} examples, over {noise.steps} measured steps"
            scale = (f"gradient noise scale: {found}",)
        return scale + tuple(f"not finite: {place}" for place in self.messages.nonfinite[:3])
