"""Run steps of the user's own model on the user's own batch and leave no trace.

Both the comparison with eager and the choice between backends need real steps. A trial runs on
stand-ins for all tensors that forward can reach (`graphopt.model.reach`), outside of what surrounds
the call (`graphopt.model.caller`), with random streams of its own; afterwards every container and
attribute is put back as it was. What forward does elsewhere, to files or to objects of other
packages, cannot be undone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graphopt.model import streams
from graphopt.model.caller import finally_all, set_aside
from graphopt.model.comparison import Observed
from graphopt.model.copies import StandIns
from graphopt.model.cotangents import Backward
from graphopt.model.reach import Reach
from graphopt.model.results import Filed, Marks, Results
from graphopt.model.tensors import tensors_of

Call = Callable[..., object]
R = TypeVar("R", bound=Results)


class Trial:
    """One call of a model, repeatable from the same state.

    Args:
        model: the module whose ``forward`` is tried.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        around: what each run takes place in, beside the restoring of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        self._around = around
        arguments = named_arguments(model, args, kwargs)
        devices = {t.device for t in (*model.parameters(), *(t for _, t in tensors_of(arguments)))}
        self.devices = [d for d in devices if d.type == "cuda"]
        self._reach: Reach | None = None
        self._stand_ins = StandIns()

    def observe(self, call: Call) -> Observed:
        """Run forward and backward once, with random cotangents, and read everything.

        Values lie in a temporary file, but for those on devices, which have no memory for two
        steps less than a file would cost time.
        """
        if self.devices:
            whole: dict[str, Tensor | None] = {}
            return Observed(whole, *self._observe(call, lambda: whole)[1:])
        return Observed(*self._observe(call, Filed))

    def marks(self, call: Call) -> tuple[Mapping[str, object], Mapping[str, object]] | None:
        """Hashes in place of the values of `observe`, and where random streams are left.

        ``None`` where some value has none.
        """
        if self.devices:
            return None
        marks, _, after, _ = self._observe(call, Marks)
        return None if marks.found is None else (marks.found, after)

    def _observe(
        self, call: Call, make: Callable[[], R]
    ) -> tuple[R, dict[str, Tensor], dict[str, object], frozenset[str]]:
        """Results, tensors that could have been written, streams, and those that moved."""
        # Gradients that arrive in parts need a second run, in which they stay until the end.
        for at_once in (False,) if self.devices else (True, False):
            results = make()
            with self.untouched(), self._state():
                before = streams.marks()
                _, whole = self._run(call, results, at_once=at_once)
                after = streams.marks()
                for name, buffer in self.model.named_buffers():
                    results[f"buffer {name}"] = buffer.detach()
                parameters = {
                    f"parameter {n}": p.detach() for n, p in self.model.named_parameters()
                }
                for name in self._written():
                    results[f"parameter {name}"] = parameters[f"parameter {name}"]
                others, changed = self._others()
                for name, value in changed.items():
                    results[name] = value
            if whole:
                break
        moved = frozenset(name for name in after if after[name] != before.get(name))
        return results, {**parameters, **others}, after, moved

    @contextmanager
    def without_trace(self) -> Iterator[None]:
        """Within, one call may run; nothing of it is left outside."""
        with self.untouched(), self._state():
            yield

    def step(self, call: Call) -> float:
        """Seconds that forward and backward take; inside `untouched`, where memory is kept."""
        with self._state():
            return self._run(call, {})[0]

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Within, steps run; nothing of them is left outside."""
        with self.outside(), streams.isolated(self.devices):
            self._reach = Reach(self.model, named_arguments(self.model, self.args, self.kwargs))
            self._stand_ins = StandIns()
            try:
                yield
            finally:
                self._reach, self._stand_ins = None, StandIns()

    def outside(self) -> AbstractContextManager[None]:
        """Within, what surrounds the call is set aside."""
        return set_aside()

    def same_states(self) -> AbstractContextManager[None]:
        """Within, tensors of passes are those that all steps begin with; outside as they were."""
        return self._around()

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """Within, random numbers are those of all steps; outside nobody notices."""
        return streams.isolated(self.devices)

    @contextmanager
    def _state(self) -> Iterator[None]:
        """Within, the model and the arguments are in the state of the call, to be used up."""
        assert self._reach is not None
        reach = self._reach
        self._stand_ins.make(reach.tensors.values())
        try:
            reach.exchange(self._stand_ins)
            reach.hide_backward_hooks()
            streams.begin(self.devices)
            with self._around():
                yield
        finally:
            torch.clear_autocast_cache()  # it may hold casts of stand-ins
            finally_all(reach.restore)

    def _run(self, call: Call, results: Results, *, at_once: bool = False) -> tuple[float, bool]:
        """Run a step and hand its outputs and gradients over.

        Returns:
            Its seconds, and whether `at_once` has handed over whole gradients.
        """
        assert self._reach is not None
        swap = self._reach.swap(self._stand_ins)
        args = [swap(value) for value in self.args]
        kwargs = {name: swap(value) for name, value in self.kwargs.items()}
        sources = self._sources()
        self._synchronize()
        start = time.perf_counter()
        outputs = dict(tensors_of(call(self.model, *args, **kwargs)))
        backward = Backward(list(outputs.values()), sources)
        while outputs:
            name = next(iter(outputs))
            results[f"output {name}"] = outputs.pop(name).detach()
        whole = backward(results, at_once=at_once)
        self._synchronize()
        return time.perf_counter() - start, whole

    def _sources(self) -> dict[str, Tensor]:
        """What receives a gradient, by name."""
        assert self._reach is not None
        stand_ins = {n: self._stand_ins.of(t) for n, t in self._reach.tensors.items()}
        leaves = {n: s.leaf for n, s in stand_ins.items() if s is not None}
        names = {id(p): n for n, p in self.model.named_parameters()}
        return {names.get(id(t), n): t for n, t in leaves.items() if t.requires_grad}

    def _written(self) -> list[str]:
        """Parameters that no longer are what they were at the beginning of the step."""
        assert self._reach is not None
        stand_ins = (self._stand_ins.of(t) for t in self._reach.tensors.values())
        same = {id(s.value) for s in stand_ins if s is not None and not s.written}
        return [n for n, p in self.model.named_parameters() if id(p) not in same]

    def _others(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors that are no state of the model, as its inputs; and those that were written."""
        assert self._reach is not None
        own = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        found = {n: self._stand_ins.of(t) for n, t in self._reach.tensors.items()}
        others = {n: s for n, s in found.items() if s is not None and id(s.value) not in own}
        return (
            {f"what {n} becomes": s.value.detach() for n, s in others.items()},
            {f"what {n} becomes": s.value.detach() for n, s in others.items() if s.written},
        )

    def _synchronize(self) -> None:
        for device in self.devices:
            torch.cuda.synchronize(device)


def named_arguments(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The call's arguments by the names that ``forward`` gives them, without defaults."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}


# A call with more tensors, such as one with a cache of keys and values, names that many.
_NAMED = 12


def describe_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """One line on what kind of call this is: inputs and mode."""
    inputs = [
        f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
        for name, t in tensors_of(named_arguments(model, args, kwargs))
    ]
    if len(inputs) > _NAMED:
        inputs[_NAMED:] = [f"{len(inputs) - _NAMED} more"]
    mode = ["train" if model.training else "eval"]
    mode += [] if torch.is_grad_enabled() else ["no_grad"]
    mode += ["autocast"] if torch.is_autocast_enabled("cpu") else []
    return f"{', '.join(inputs)} ({', '.join(mode)})"
