"""`optimize`: the only place where capture, passes and runtime meet."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.capture import Capture, capture
from graphopt.errors import ArgumentError, MismatchError
from graphopt.graph import CURVATURE, REDUCTION, Graph
from graphopt.model.arguments import check_model, parse_mesh, split_example_inputs
from graphopt.model.backend_choice import Built, choose
from graphopt.model.controller import Variant, controller_of
from graphopt.model.entries import Specialisation, Verification
from graphopt.model.report import Report
from graphopt.model.surface import install
from graphopt.model.trial import (
    Observed,
    Trial,
    compare,
    named_arguments,
    tensors_of,
    tolerance,
    tolerance_of_pass,
)
from graphopt.passbase import EXACT, Pass, PassContext
from graphopt.pipeline import Pipeline
from graphopt.pipeline.step import PassStep
from graphopt.plan import Plan

if TYPE_CHECKING:
    from graphopt.runtime.accumulation import Alone
    from graphopt.runtime.ranks.workers import Workers

log = logging.getLogger("graphopt")

M = TypeVar("M", bound=nn.Module)
Backend = Literal["auto", "eager", "inductor"]
Verify = Literal["off", "structure", "eager", "full"]

# What a preset stands for, on one rank and in a job of several.
PRESETS = {"auto": ("cleanup", "cleanup,schedule,group_gradients")}


def optimize(
    model: M,
    example_inputs: object = None,
    *,
    passes: str | Sequence[Pass] = "auto",
    mesh: object = None,
    backend: Backend = "auto",
    verify: Verify = "eager",
    dry_run: bool = False,
) -> M | Plan:
    """Optimize a model in place and return it.

    The model stays the same object with the same parameters, keys and signature; only its class
    is swapped for a subclass. Each kind of call (shapes, dtypes, training mode, grad mode,
    autocast, …) is captured once, when it first happens, and guarded afterwards.

    Args:
        model: any module that can be captured as one graph.
        example_inputs: capture now instead of at the first call: a tensor, a tuple of positional
            arguments, a dict of keyword arguments, or a pair of both.
        passes: ``"auto"``, a spec such as ``"cleanup,fold_inference"``, or a list of passes.
        mesh: sizes of the parallel dimensions, as ``"dp=8"`` or ``{"dp": 8}``.
        backend: ``"eager"``, ``"inductor"``, or ``"auto"`` for the faster of the two on the first
            real step.
        verify: ``"off"``; ``"structure"``: the invariants after every pass; ``"eager"``: also
            compare outputs, gradients and buffers of the captured graph with PyTorch eager, once
            per specialisation, on the first real batch; ``"full"``: also after each pass.
        dry_run: return the `Plan` for `example_inputs` and leave the model alone.

    Returns:
        The same model; with ``dry_run`` the plan.

    Raises:
        CaptureError: the model cannot be captured as one graph.
        MismatchError: the captured graph computes something else than eager.
        SpecError: `passes` names something that does not exist.
        PipelineError: the passes are in an impossible order.
        ArgumentError: an argument cannot be used.
    """
    _set_up_logging()
    check_model(model)
    _one_of("backend", backend, Backend)
    _one_of("verify", verify, Verify)
    workers = None if dry_run else _workers(model, passes)
    pipeline = _pipeline(passes, several_ranks=_several(workers))
    compiler = Compiler(pipeline, _mesh(mesh, workers), backend, verify, workers)
    example = split_example_inputs(example_inputs)
    if dry_run:
        if example is None:
            raise ArgumentError(
                "dry_run needs example_inputs", hint="optimize(model, (batch,), dry_run=True)"
            )
        return compiler.plan(model, *example)
    if workers is not None:
        workers.start(model)
    controller = install(model, compiler)
    if example is not None:
        controller.specialise(model, *example)
    return model


@dataclass(frozen=True)
class Compiler:
    """The arguments of one `optimize`, and what it takes to make a specialisation."""

    pipeline: Pipeline
    mesh: Mapping[str, int]
    backend: Backend
    verify: Verify
    workers: Workers | Alone | None = None

    def report(self, model: str) -> Report:
        """An empty report for a model of this class name."""
        return Report(model=model, spec=str(self.pipeline), specialisations=(), notes=self._notes())

    def _notes(self) -> tuple[str, ...]:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if self.workers is not None:
            return self.workers.notes()
        if distributed and torch.distributed.get_world_size() > 1:
            return (
                "gradients are not reduced across ranks: add group_gradients to the passes, or "
                "wrap the optimized model in DistributedDataParallel",
            )
        return ()

    def plan(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Plan:
        """What would be done for one call; runs no step."""
        captured = capture(model, args, kwargs, forward=_own_forward(model))
        self.pipeline.run(captured.graph, PassContext(mesh=self.mesh), verify="structure")
        backend = "eager" if self.backend == "auto" else self.backend
        return self._plan(captured, backend)

    def compile(
        self,
        model: nn.Module,
        forward: Callable[..., object],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        state: dict[str, Tensor],
    ) -> Variant:
        """Capture, rewrite, check and build the variant for one call."""
        captured = capture(model, args, kwargs, forward=forward)
        trial = Trial(model, args, kwargs, state)
        verification = self._check(trial, forward, captured)
        pipeline = self.pipeline
        if self.verify == "full":
            pipeline = replace(pipeline, observers=(_EachPass(self, trial, captured, state),))
        with self._silent():
            steps = pipeline.run(
                captured.graph,
                PassContext(workers=_ranks(self.workers), mesh=self.mesh, state=state),
                verify="structure" if self.verify == "eager" else self.verify,
            )
            choice, built = choose(
                self._backend(), partial(self._build, captured, state), trial, captured.graph
            )
        entry = Specialisation(
            signature=describe_call(model, args, kwargs),
            level=str(captured.graph.level),
            route=captured.route,
            capture_seconds=captured.seconds,
            steps=steps,
            backend=choice,
            verification=verification,
            plan=self._plan(captured, choice.backend),
            notes=captured.notes,
        )
        return Variant(built.call, built.engine, captured.holds, captured.failure, entry)

    def _check(
        self, trial: Trial, forward: Callable[..., object], captured: Capture
    ) -> Verification:
        """Compare the captured graph, before any pass, with eager on the user's batch."""
        if self.verify in ("off", "structure"):
            return Verification(self.verify, "not run")
        start = time.perf_counter()
        reference = trial.observe(forward)
        worst = compare(reference, trial.observe(self.eager_call(captured, {})))
        if worst.error > tolerance(reference, EXACT):
            raise MismatchError(
                f"the captured graph differs from eager: {worst.name} has a relative error of "
                f"{worst.error:.2g}",
                where=describe_call(trial.model, trial.args, trial.kwargs),
                hint="please report this model; verify='structure' runs it nevertheless",
            )
        return Verification(
            level=self.verify,
            result="bit-equal" if worst.equal else "within tolerance",
            worst_name=worst.name,
            worst_error=worst.error,
            seconds=time.perf_counter() - start,
        )

    def _silent(self) -> AbstractContextManager[None]:
        """Trials of one rank must not send messages that the others do not expect."""
        return nullcontext() if self.workers is None else self.workers.silent()

    def _backend(self) -> str:
        """Ranks must not wait for a duel whose rounds they count differently."""
        ranks = _ranks(self.workers)
        if ranks is None or self.backend != "auto":
            return self.backend
        return "inductor" if ranks.device.type == "cuda" else "eager"

    def eager_call(self, captured: Capture, state: dict[str, Tensor]) -> Callable[..., object]:
        """The graph as it is now, runnable as a call of the model."""
        return self._build(captured, state, "eager").call

    def _build(self, captured: Capture, state: dict[str, Tensor], backend: str) -> Built:
        from graphopt.runtime.backends import build

        plan = self._plan(captured, backend)
        engine = build(captured.graph.module, plan, state, cast("Any", self.workers))
        return Built(engine, captured.bind(engine))

    def _plan(self, captured: Capture, backend: str) -> Plan:
        graph: Graph = captured.graph
        reduction = graph.annotation(graph.output, REDUCTION)
        return Plan(
            spec=str(self.pipeline),
            signature=graph.signature,
            backend=backend,
            gradient_sources=graph.get(gradient_sources),
            aliases=captured.aliases,
            facts=tuple(sorted(graph.facts)),
            curvature=graph.annotation(graph.output, CURVATURE),
            **({} if reduction is None else vars(reduction)),
        )


class _EachPass:
    """Observer for ``verify="full"``: each pass on its own, at its numerics class."""

    def __init__(
        self, compiler: Compiler, trial: Trial, captured: Capture, state: dict[str, Tensor]
    ) -> None:
        self.run: Callable[[], Observed] = lambda: trial.observe(
            compiler.eager_call(captured, state)
        )
        self.reference = self.run()

    def __call__(self, index: int, pass_: Pass, graph: Graph, step: PassStep) -> None:
        actual = self.run()
        worst = compare(self.reference, actual)
        if worst.error > tolerance_of_pass(actual, pass_.numerics):
            raise MismatchError(
                f"pass {pass_.name!r} promises {pass_.numerics} and changes {worst.name} by a "
                f"relative error of {worst.error:.2g}",
                where=f"pass {index + 1} of the pipeline",
                hint="run the pipeline without this pass, and report it to its author",
            )
        self.reference = actual


def describe_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """One line on what kind of call this is: inputs and mode."""
    inputs = ", ".join(
        f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
        for name, t in tensors_of(named_arguments(model, args, kwargs))
    )
    mode = ["train" if model.training else "eval"]
    mode += [] if torch.is_grad_enabled() else ["no_grad"]
    mode += ["autocast"] if torch.is_autocast_enabled("cpu") else []
    return f"{inputs} ({', '.join(mode)})"


def _workers(model: nn.Module, passes: str | Sequence[Pass]) -> Workers | Alone | None:
    """The ranks of a running job, if these passes make use of them; alone, who counts steps."""
    pipeline = _pipeline(passes, several_ranks=True).passes
    grouping = [p for p in pipeline if "grouped" in p.provides]
    preconditions = any("preconditioned" in p.provides for p in pipeline)
    if not grouping and not preconditions:
        return None
    from graphopt.runtime.accumulation import Alone
    from graphopt.runtime.ranks.workers import Workers

    # The integer wire gives one rank the bits that many ranks would have.
    workers = Workers.of(model, one=any(getattr(p, "wire", "") == "int32" for p in grouping))
    return Alone() if workers is None and preconditions else workers


def _ranks(workers: Workers | Alone | None) -> Workers | None:
    """The ranks that passes may ask; one that is alone has no link to measure."""
    return cast("Workers", workers) if workers is not None and workers.channel else None


def _several(workers: Workers | Alone | None) -> bool:
    return _ranks(workers) is not None


def _mesh(mesh: object, workers: Workers | Alone | None) -> Mapping[str, int]:
    parsed = parse_mesh(mesh)
    ranks = _ranks(workers)
    if ranks is not None and parsed.get("dp", ranks.size) != ranks.size:
        raise ArgumentError(
            f"mesh says dp={parsed['dp']}, and this job has {ranks.size} ranks",
            hint="leave mesh out: a running job knows its size",
        )
    return parsed


def _pipeline(passes: str | Sequence[Pass], *, several_ranks: bool) -> Pipeline:
    if isinstance(passes, str):
        alone, together = PRESETS.get(passes, (passes, passes))
        return Pipeline.parse(together if several_ranks else alone)
    for item in passes:
        if not isinstance(item, Pass):
            raise ArgumentError(
                f"passes must be a spec or a list of passes, and holds {item!r}",
                hint="passes='cleanup', or passes=[Cleanup()] with an instance of each pass",
            )
    return Pipeline(tuple(passes))


def _own_forward(model: nn.Module) -> Callable[..., object]:
    controller = controller_of(model)
    return (controller.base if controller else type(model)).forward


def _one_of(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ArgumentError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}")


def _set_up_logging() -> None:
    level = os.environ.get("GRAPHOPT_LOG")
    if level and not log.handlers:
        logging.basicConfig()
        log.setLevel(level.upper())
