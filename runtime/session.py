"""What one optimized model keeps between its steps, whatever methods it uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from graphopt import registry
from graphopt.errors import PluginError, RankError, SpecError, StateError
from graphopt.plan import Plan, PlanPart, Role
from graphopt.runtime.states import States, Watch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from graphopt.runtime.engine.step import Step
    from graphopt.runtime.owned_step import OwnedStep
    from graphopt.runtime.part import RuntimePart
    from graphopt.runtime.ranks.ranks import Ranks
    from graphopt.runtime.validation import Validation


# Under which ranks agree on what their models call.
_FUNCTIONS = "functions that the models call"


class Scaler(Protocol):
    """What a `torch.amp.GradScaler` is to a session."""

    def get_scale(self) -> float:
        """Factor of the loss."""


class Session:
    """State, ranks, accumulation, loss scale and runtime parts of one model.

    Args:
        passes: names of the pipeline's passes; each owns the namespace of its name.
        ranks: those of a running job by mesh dimension.

    Attributes:
        states: tensors by namespace and name.
        synchronise: whether forward passes made now begin steps that end.
        pending: whether backward passes have run since the last step that ended.
        scaler: multiplies the loss before its backward (mixed precision).
        owned: what a part needs that runs whole steps; ``None`` where there is no such part.
        before_call: brings the model up to date before it is called, where a part has to.
        handles: undo what parts have hung on the model and on the optimizer.
        trying: whether a step is tried, and leaves no trace.
        decided: what passes did when they could replace parameters, by their name.
        steps: how many steps have ended; without runtime parts each backward ends one.
        uneven: whether ranks may have unequally many steps.
        validation: what compares forms of a step when they first run; ``None`` for nothing.
        distrusted: passes and backends that were found wrong and run no more (see
            `MismatchError.guilty`), with what was wrong.
    """

    def __init__(
        self, passes: Sequence[str] = (), ranks: Mapping[str, Ranks] | None = None
    ) -> None:
        self.passes = tuple(passes)
        self.ranks: dict[str, Ranks] = dict(ranks or {})
        self.states = States()
        self.synchronise = True
        self.pending = False
        self.scaler: Scaler | None = None
        self.owned: OwnedStep | None = None
        self.before_call: Callable[[], None] | None = None
        self.trying = False
        self.searched = False  # whether an error has named parts that can be captured
        self.handles: list[Any] = []
        self.decided: dict[str, Any] = {}
        self.steps = 0
        self.uneven = False
        self.validation: Validation | None = None
        self.distrusted: dict[str, str] = {}
        self._runtime: dict[str, RuntimePart[Any]] = {}
        self._plan_parts: list[PlanPart] = []
        self._unchecked: set[str] = set()
        self._watch: Watch | None = None

    # -- parts -------------------------------------------------------------------------------------

    def part(self, name: str) -> RuntimePart[Any]:
        """The runtime part of this name; there is one per model.

        Raises:
            PluginError: there is none.
        """
        if name not in self._runtime:
            try:
                kind = registry.get(name, registry.RUNTIME_PARTS)
            except SpecError as error:
                raise PluginError(
                    f"pass {name!r} leaves a plan part, and no runtime part obeys it",
                    hint=f"its package needs an entry point {name!r} in the group "
                    f"{registry.RUNTIME_PARTS.group!r}",
                ) from error
            self._runtime[name] = kind(self)
        return self._runtime[name]

    @property
    def in_job(self) -> bool:
        """Whether there are several ranks."""
        return any(ranks.size > 1 for ranks in self.ranks.values())

    @property
    def has_parts(self) -> bool:
        """Whether any pass of the pipeline has a runtime part."""
        return any(name in registry.names(registry.RUNTIME_PARTS) for name in self.passes)

    def methods(self) -> tuple[tuple[str, tuple[str, type]], ...]:
        """What runtime parts add to the model: name of the method, of its part, and its class.

        Raises:
            PluginError: two parts add different methods of one name.
        """
        found: dict[str, tuple[str, type]] = {}
        for owner in self.passes:
            if owner not in registry.names(registry.RUNTIME_PARTS):
                continue
            kind = registry.get(owner, registry.RUNTIME_PARTS)
            for name in kind.methods:
                other, theirs = found.setdefault(name, (owner, kind))
                if getattr(theirs, name) is not getattr(kind, name):
                    raise PluginError(
                        f"{other!r} and {owner!r} both add a method {name!r} to the model",
                        hint="leave one of the passes out",
                    )
        return tuple(found.items())

    def parts(self, plan: Plan) -> list[tuple[RuntimePart[Any], PlanPart]]:
        """Runtime and plan parts of a plan, in pipeline order.

        Raises:
            PluginError: a runtime part is missing, or is of another version than its plan part.
            StateError: a state was loaded that is none of this plan.
        """
        found = []
        for part in plan.parts:
            runtime = self.part(part.name)
            if runtime.version != part.version:
                raise PluginError(
                    f"the plan part of {part.name!r} has version {part.version}, and the runtime "
                    f"part that is installed obeys version {runtime.version}",
                    hint="install plan part and runtime part from one release",
                )
            if part.name in self._unchecked:
                runtime.accepts([part], self.state(part.name))
                self._unchecked.discard(part.name)
            if part not in self._plan_parts:
                self._plan_parts.append(part)
                if self.validation is not None:
                    for what, why in runtime.uncompared(part).items():
                        self.validation.expect(part.name, what, unless=why)
            found.append((runtime, part))
        return found

    def agree(self, plan: Plan, functions: str = "") -> None:
        """Compare the decisions of all ranks, before the first message is sent.

        Args:
            plan: of the step.
            functions: what the model calls, where ranks are at the same call; compared once, as
                later captures are made on some ranks only.

        Raises:
            RankError: they differ, naming the first difference; or a rank did not come.
        """
        for ranks in self.ranks.values() if plan.parts else ():
            ranks.agree("plans", plan.outline(), lambda: "")
            if functions and not ranks.agreed_on(_FUNCTIONS):
                ranks.agree(_FUNCTIONS, functions, lambda: "")

    def complaint(self, topic: str, mine: str, along: str | None = None) -> tuple[int, str]:
        """What the first rank that has a complaint says; -1 and nothing where all are content.

        Args:
            topic: equal on all ranks, which all come.
            mine: what this rank complains of; empty for nothing.
            along: the only mesh dimension whose ranks come.

        Raises:
            RankError: a rank did not come.
        """
        found = (0, mine) if mine else (-1, "")
        for dimension, ranks in self.ranks.items():
            if ranks.size > 1 and dimension == (along or dimension):
                found = ranks.complaint(topic, found[1])
        return found

    def content(self, topic: str, *, now: bool = False) -> bool:
        """Whether all ranks have told each other that they have no complaint on this topic.

        Args:
            topic: the topic.
            now: note that they have.
        """
        for ranks in self.ranks.values() if now else ():
            ranks.settle(topic)
        return all(ranks.agreed_on(topic) for ranks in self.ranks.values())

    def announced(self, groups: Iterable[ProcessGroup], spec: str) -> Session:
        """This session; where it sends nothing, other ranks of the job are told, and may object.

        If they wait for this rank in vain, the next call of the model raises.

        Args:
            groups: in which there may be such ranks.
            spec: the passes.
        """
        from graphopt.runtime.ranks.silent import announce

        def refuse(error: RankError) -> None:
            def raises() -> None:
                raise error

            self.before_call = raises

        for group in () if self.ranks else groups:
            if group.size() > 1:
                announce(group, spec, refuse)
        return self

    # -- state -------------------------------------------------------------------------------------

    def state(self, name: str) -> dict[str, Tensor]:
        """The namespace of a pass."""
        return self.states.setdefault(name, {})

    def check_inputs(self, plan: Plan, values: Iterable[Any]) -> None:
        """Whether the ``STATE`` inputs of a plan are there, in the form it was made for.

        Raises:
            StateError: another state was loaded.
        """
        mutated = set(plan.signature.names(Role.MUTATION))
        owners: set[str] = set()
        for slot, value in zip(plan.signature.inputs, values, strict=True):
            if slot.role is not Role.STATE:
                continue
            if slot.name in mutated:
                self.states.written.add(slot.name)
            owner, _, what = slot.name.partition("/")
            found = self.state(owner).get(what)
            owners.add(owner)
            if found is None or found.shape != value.shape:
                here = "nothing" if found is None else f"shape {tuple(found.shape)}"
                raise StateError(
                    f"{slot.name!r} has {here} in the loaded state, and the model needs shape "
                    f"{tuple(value.shape)}",
                    hint="load the state of this model",
                )
            if found.dtype != value.dtype:
                raise StateError(
                    f"{slot.name!r} has dtype {str(found.dtype)[6:]} in the loaded state, and the "
                    f"model needs {str(value.dtype)[6:]}",
                    hint="load the state of this model",
                )
            self.states.needed(slot.name)
        # Inputs are a part of the state; what else there is has to fit, too.
        for part in plan.parts:
            if part.name in self._unchecked:
                self.part(part.name).accepts([part], self.state(part.name))
                owners.add(part.name)
        self._unchecked -= owners

    def state_dict(self) -> dict[str, Tensor]:
        """All tensors as ``"<namespace>/<name>"``; a collective where ranks divide them."""
        self.settle()
        found = {}
        for name, state in self.states.items():
            runtime = self._runtime.get(name)
            whole = state if runtime is None else runtime.gather()
            found.update({f"{name}/{key}": tensor.clone() for key, tensor in whole.items()})
        for runtime in self._runtime.values():
            found = runtime.joined(found)
        return found

    def own_state(self) -> dict[str, Tensor]:
        """What this rank keeps of the state; all ranks' together are `state_dict`."""
        self.settle()
        found = {}
        for name, state in self.states.items():
            runtime = self._runtime.get(name)
            own = state if runtime is None else runtime.own()
            found.update({f"{name}/{key}": tensor for key, tensor in own.items()})
        return found

    def check(self, saved: Mapping[str, Tensor], *, strict: bool = True) -> States:
        """Whether a saved state may be continued from; changes nothing.

        What no call has needed yet is checked when one does.

        Args:
            saved: what `state_dict` has given.
            strict: whether every pass that has a state finds one.

        Returns:
            Copies of its tensors by namespace and name.

        Raises:
            StateError: the state belongs to another model.
        """
        # Where the passes left plan parts, these know what a state must be.
        from graphopt.runtime.part import check_like

        by_owner: dict[str, dict[str, Tensor]] = {}
        for key, tensor in saved.items():
            owner, _, what = key.partition("/")
            if owner not in self.passes or not what:
                raise StateError(
                    f"the saved state has {key!r}, and no pass of this model is called {owner!r}",
                    hint="optimize with the passes that it was saved with",
                )
            by_owner.setdefault(owner, {})[what] = tensor
        self.settle()
        for name, own in self.states.items():
            if own and name not in by_owner and strict:
                raise StateError(
                    f"the saved state has nothing of {name!r}, which has a state here",
                    hint="load the state of this model, or give strict=False to begin anew",
                )
        known = registry.names(registry.RUNTIME_PARTS)
        for name in sorted(by_owner.keys() | self.states.keys()):
            parts = [part for part in self._plan_parts if part.name == name]
            state, own = by_owner.get(name, {}), self.states.get(name, {})
            if not state and not own:
                continue
            early = name in known and registry.get(name, registry.RUNTIME_PARTS).accepts_early
            if parts or (early and not own):
                self.part(name).accepts(parts, state)
            else:
                check_like(name, own, state)
        found = States()
        for name, state in by_owner.items():
            found[name] = {what: tensor.detach().clone() for what, tensor in state.items()}
        return found

    def load(self, saved: States) -> None:
        """Continue from a state that `check` has returned; namespaces that it lacks begin anew."""
        decided = {part.name for part in self._plan_parts}
        for name in saved.keys() | self.states.keys():
            state = saved.get(name, {})
            if name in decided:
                self.part(name).load(state)
                continue
            own = self.state(name)
            if not own:
                self._unchecked.add(name)
            own.clear()
            own.update(state)

    def settle(self) -> None:
        """Have in the state what steps have left to arrive later."""
        for runtime in self._runtime.values():
            runtime.settle()

    def notes(self) -> tuple[str, ...]:
        """Lines for the report."""
        return tuple(note for part in self._runtime.values() for note in part.notes())

    def copy(self, memo: dict[int, Any] | None = None) -> Session:
        """For a copy of the model: state and messages of its own, the same ranks."""
        self.settle()
        ranks = {dimension: ranks.copy() for dimension, ranks in self.ranks.items()}
        other = Session(self.passes, ranks)
        other.states.update(deepcopy(dict(self.states), memo))
        other.pending, other.scaler = self.pending, self.scaler
        other.decided = dict(self.decided)
        other.steps, other.distrusted = self.steps, dict(self.distrusted)
        other.validation = None if self.validation is None else self.validation.copy()
        other._unchecked, other.states.written = set(self._unchecked), set(self.states.written)
        other._plan_parts = list(self._plan_parts)
        other._runtime = {name: part.copy(other) for name, part in self._runtime.items()}
        return other

    # -- steps -------------------------------------------------------------------------------------

    def count(self, step: Step) -> None:
        """Note that a backward is through."""
        if step.ends and not self.trying:
            self.steps += 1

    @property
    def loss_scale(self) -> float:
        """What the loss of this step was multiplied with."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    def loss_scale_of(self, step: Step) -> Callable[[], float] | None:
        """Gives, when asked, what the tangents of a step were multiplied with; ``None`` for 1."""
        scale = step.scale
        if self.scaler is None and scale == 1.0:
            return None
        return lambda: scale * self.loss_scale

    def use_scaler(self, scaler: Scaler) -> None:
        """Know what multiplies the loss; parts that would do so leave it to the scaler."""
        self.scaler = scaler
        for runtime in self._runtime.values():
            runtime.unscaled()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within, forward passes begin micro-batches: their backward only accumulates."""
        before, self.synchronise = self.synchronise, False
        try:
            yield
        finally:
            self.synchronise = before

    def take(self, parameters: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
        """Gradients that micro-batches have accumulated; the parameters have none then.

        This is the only place that reads or changes ``.grad``.
        """
        found = {}
        for name in names if self.pending else ():
            gradient = parameters[name].grad
            if gradient is not None:
                found[name] = gradient
                parameters[name].grad = None
        return found

    def finish(
        self,
        runtime: RuntimePart[Any],
        part: PlanPart,
        step: Step,
        gradients: dict[str, Tensor],
    ) -> None:
        """Call a part's `finish`, the only time at which its state may change."""
        if self._watch is not None:
            self._watch.look()
        runtime.finish(part, step, gradients)
        if self._watch is not None:
            self._watch.look(besides=runtime.name)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, the state of a part must not change outside of its `finish`.

        Raises:
            StateError: it did; names the part and the tensor.
        """
        self._watch = Watch(self.states)
        try:
            yield
            self._watch.look()
        finally:
            self._watch = None

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Within, steps never end, send nothing, and leave no trace in the session."""
        flags = self.synchronise, self.pending, self.trying
        self.synchronise, self.trying = False, True
        try:
            with self.states.restored():
                for runtime in self._runtime.values():
                    runtime.unscaled()
                yield
        finally:
            self.synchronise, self.pending, self.trying = flags

    @contextmanager
    def silently(self) -> Iterator[None]:
        """Within, a backward runs once more: it counts for nothing, and draws nothing."""
        before, self.trying = self.trying, True
        try:
            with torch.random.fork_rng():
                yield
        finally:
            self.trying = before

    @contextmanager
    def watched_trial(self) -> Iterator[None]:
        """A `trial` that also watches over what changes state."""
        with self.trial(), self.watch():
            yield
