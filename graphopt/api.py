"""`optimize`: reads its arguments, and installs what runs the model from then on."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt import registry
from graphopt.compiler.compiler import Compiler
from graphopt.errors import ArgumentError, CaptureError
from graphopt.model.arguments import (
    Example,
    Mesh,
    check_model,
    check_step,
    made_optimizer,
    mesh_of,
    one_of,
    parse_mesh,
    pipeline_of,
    split_example_inputs,
)
from graphopt.model.declared import Declared, Dim
from graphopt.model.levels import Verify
from graphopt.model.parts import name_parts
from graphopt.model.specialiser import Cache, Fallback, OnMismatch
from graphopt.model.surface import install, plain_forward, restore
from graphopt.model.trial import Trial
from graphopt.notices import quiet, warn
from graphopt.passbase import Pass
from graphopt.plan import Plan

if TYPE_CHECKING:
    from graphopt.model.controller import Controller
    from graphopt.runtime.owned_step import OwnedStep
    from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")

M = TypeVar("M", bound=nn.Module)


def optimize(
    model: M,
    example_inputs: object = None,
    *,
    passes: str | Sequence[Pass] = "auto",
    mesh: object = None,
    backend: str = "auto",
    verify: str = "eager",
    fallback: Fallback | None = None,
    on_mismatch: OnMismatch = "raise",
    loss: Callable[[Any, Any], Any] | None = None,
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
    dynamic: bool | Mapping[str, Mapping[int, str | Dim]] | None = None,
    cache: Cache = "verified",
    dry_run: bool = False,
) -> M | Plan:
    """Optimize a model in place and return it.

    The model stays the same object of the same class with the same parameters, keys and signature,
    unless a pass replaces parameters, as ``low_rank`` does; only this instance's forward is another
    one. Each kind of call (shapes, dtypes, training mode,
    grad mode, autocast, …) is captured once, when it first happens, and guarded afterwards. Numbers
    and sizes that change from call to call become inputs of the graph where that can be.

    An error in a call is that call's: the model stays optimized, with its captures and the state of
    its passes, and a call that eager refuses too raises what eager raises.

    Args:
        model: any module that can be captured as one graph.
        example_inputs: capture now instead of at the first call: a tensor, a tuple of positional
            arguments, a dict of keyword arguments, or a pair of both. If that fails, the model is
            given back as it was, not optimized.
        passes: ``"auto"``, a spec such as ``"cleanup,fold_inference"``, or a list of passes.
        mesh: the parallel dimensions: a `torch.distributed.device_mesh.DeviceMesh` with names, a
            process group for ``dp``, or sizes as ``"dp=8"`` or ``{"dp": 8}``. In a running job the
            default is all its ranks as ``dp``.
        backend: ``"eager"``, ``"inductor"``, that of an installed package, or ``"auto"`` for the
            faster of eager and Inductor on the first real step.
        verify: ``"off"``; ``"structure"``: the invariants after every pass; ``"eager"``: also
            compare what will run, after all passes and in the chosen backend, with PyTorch eager,
            once per specialisation, on the first real batch: outputs, gradients and buffers;
            ``"full"``: also each pass on its own; ``"sample{every=1000}"``: as ``"eager"``, and
            again every so many steps, on a copy of the step. In a job, and with passes that have
            several forms of a step, each form is compared when it first runs.
        fallback: what happens to a call that cannot be captured. ``"error"``: it raises;
            ``"eager"``: it runs as plain PyTorch, with one warning per kind of call; by default it
            raises, until the model has trained, so that a later validation does not end the run.
            In a job a training call raises all the same, as its gradients would not be reduced.
        on_mismatch: what happens where `verify` finds that the graph computes something else than
            eager. ``"raise"``: raise; ``"warn"``: warn once and run what is left without the
            guilty pass, backend or form of a step, compared anew, or plain PyTorch where nothing
            is; ``"eager"``: warn and run calls of this kind as plain PyTorch.
        loss: for passes that run whole steps, by ``model.step(*batch)``: of the model's output and
            the last item of the batch; by default the output is, or has, the loss.
        optimizer: for passes that run whole steps: of the model's parameters, or what makes one of
            them; by default a step leaves gradients in ``.grad`` for one of yours.
        dynamic: sizes of arguments that vary, by dimension: ``{"ids": {0: "batch", 1: "length"}}``,
            with `graphopt.Dim` in place of a name for limits. They are symbols of the first graph.
            By default, sizes become symbols when they have changed; ``False``: never, so that each
            size has a graph of its own.
        cache: what later processes find again in the user's cache folder. ``"verified"``: captures,
            and that `verify` found nothing wrong with what ran; ``"captures"``: captures only, and
            each process verifies; ``"off"``: nothing, and nothing is looked for.
        dry_run: return the `Plan` for `example_inputs` and leave the model alone.

    Returns:
        The same model; with ``dry_run`` the plan.

    Raises:
        CaptureError: the model cannot be captured as one graph.
        MismatchError: the graph computes something else than eager; names the pass or backend.
        SpecError: `passes` names something that does not exist.
        PipelineError: the passes are in an impossible order.
        ArgumentError: an argument cannot be used.
    """
    from graphopt.runtime.validation import Validation

    _set_up_logging()
    check_model(model)
    one_of("backend", backend, ("auto", *registry.names(registry.BACKENDS)))
    checks = Verify.parse(verify)
    if fallback is not None:
        one_of("fallback", fallback, get_args(Fallback))
    one_of("on_mismatch", on_mismatch, get_args(OnMismatch))
    one_of("cache", cache, get_args(Cache))
    where = Mesh(parse_mesh(mesh), {}) if dry_run else mesh_of(mesh)
    session = _session(model, passes, where)
    sizes = where.sizes.values() if dry_run else [r.size for r in session.ranks.values()]
    pipeline = pipeline_of(passes, several_ranks=any(size > 1 for size in sizes))
    owns = [pass_ for pass_ in pipeline.passes if pass_.owns_step]
    check_step(model, loss, optimizer, pipeline, where)
    compiler = Compiler(
        pipeline,
        where.sizes,
        backend,
        checks,
        fallback=fallback,
        on_mismatch=on_mismatch,
        dynamic=Declared.of(dynamic, plain_forward(model)),
        cache=cache,
    )
    if checks.compares:
        session.validation = Validation(on_mismatch, checks.every, warn)
    example = split_example_inputs(example_inputs)
    if dry_run:
        if example is None:
            raise ArgumentError(
                "dry_run needs example_inputs", hint="optimize(model, (batch,), dry_run=True)"
            )
        return compiler.plan(model, *example)
    wanting = [pass_.name for pass_ in pipeline.passes if pass_.wants_parameters(model)]
    if wanting and example is None:
        raise ArgumentError(
            f"pass {wanting[0]!r} replaces parameters, and an optimizer made before would "
            "miss them",
            hint="give example_inputs, so that it does so now: optimize(model, (batch,), …)",
        )
    for ranks in session.ranks.values():
        ranks.start(model)
    with _replacing(compiler, model, example, session) as replaced:
        made = made_optimizer(model, optimizer, replaced)
        controller = install(model, compiler, session)
        if owns:
            count = owns[0].micro_batches(where.sizes)
            session.owned = _owned(model, controller, session, loss, made, count)
            controller.called()  # by steps, not by the user
        if example is not None:
            try:
                controller.specialise(model, *example)
            except BaseException as error:
                restore(model)
                if isinstance(error, CaptureError):
                    name_parts(error, model, controller.plain, *example, session.trial)
                raise
    return model


@contextmanager
def _replacing(
    compiler: Compiler, model: nn.Module, example: Example | None, session: Session
) -> Iterator[Mapping[str, Tensor]]:
    """Within, parameters are replaced; gives the old ones, and an error gives them back."""
    if example is None:
        yield {}
        return
    replacement = compiler.replace(model, *example, session)
    try:
        if replacement.made:
            for ranks in session.ranks.values():
                ranks.start(model)  # factors of rank 0 for all
        session.decided.update(replacement.decided)
        replacement.check(raises=compiler.on_mismatch == "raise")
        yield replacement.old
    except BaseException:
        replacement.undo()
        raise
    replacement.settle()


def _owned(
    model: nn.Module,
    controller: Controller,
    session: Session,
    loss: Callable[[Any, Any], Any] | None,
    optimizer: Optimizer | None,
    micro_batches: int,
) -> OwnedStep:
    from graphopt.runtime.owned_step import OwnedStep

    reference = weakref.ref(model)

    def found() -> nn.Module:
        model = reference()
        assert model is not None
        return model

    return OwnedStep(
        model=found,
        loss=loss,
        optimizer=optimizer,
        micro_batches=micro_batches,
        kind_of=lambda args, kwargs: controller.variant(found(), args, kwargs),
        untouched=lambda args, kwargs: Trial(found(), args, kwargs, session.trial).without_trace(),
    )


def _session(model: nn.Module, passes: str | Sequence[Pass], mesh: Mesh) -> Session:
    """What the model keeps, with the ranks of a running job that these passes make use of."""
    from graphopt.runtime.ranks.ranks import Ranks
    from graphopt.runtime.session import Session

    # A preset means the same methods on the model on one rank and on several.
    pipeline = pipeline_of(passes, several_ranks=True).passes
    ranks = {}
    for dimension, group in mesh.groups.items():
        users = [p for p in pipeline if dimension in p.communicates]
        if users and (group.size() > 1 or any(p.on_one_rank for p in users)):
            ranks[dimension] = Ranks.of(model, group)
    return Session([p.name for p in pipeline], ranks).announced(mesh.groups.values(), str(passes))


def _set_up_logging() -> None:
    level = os.environ.get("GRAPHOPT_LOG")
    if level and not quiet() and not log.handlers:
        logging.basicConfig()
        log.setLevel(level.upper())
