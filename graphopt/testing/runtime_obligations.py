"""The table of what runtime parts owe; `check_runtime` holds a pipeline against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.passbase import REASSOCIATED, PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan
from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.testing.comparison import relative_error
from graphopt.testing.runtime_runs import Run, Subject, batches, first_difference, loss_of

MICRO = 2


def _only_finish_changes_state(subject: Subject) -> None:
    run = Run(subject)
    # State that a part makes when it is built is its initial state.
    for micro in (1, MICRO):
        run.controller.specialise(run.model, run.batches(micro)[0], {})
    with run.session.watch():
        run.steps(2)
        run.steps(2, MICRO)
    trial = run.trial()
    trial = type(trial)(run.model, run.batches()[0], {}, run.session.watched_trial)
    trial.observe(lambda model, *args: model(*args))


def _trials_leave_no_trace(subject: Subject) -> None:
    tried, straight = Run(subject), Run(subject)

    def try_it() -> None:
        before, stream = tried.read(), torch.get_rng_state()
        tried.trial().observe(lambda model, *args: model(*args))
        changed = first_difference(before, tried.read())
        assert not changed, f"a trial changed {changed}"
        assert torch.equal(stream, torch.get_rng_state()), "a trial drew random numbers"

    for run, before in ((tried, try_it), (straight, None)):
        run.steps(2, before=before)
        run.steps(2, MICRO, before=before)
    changed = first_difference(straight.read(), tried.read())
    assert not changed, f"after trials between its steps, training gave another {changed}"
    verified, unverified = Run(subject, verify="full"), Run(subject)
    for run in (verified, unverified):
        run.steps(2)
    changed = first_difference(unverified.read(), verified.read())
    assert not changed, f"after a verified first call, training gave another {changed}"


def _resume_is_bit_equal(subject: Subject) -> None:
    straight, saving = Run(subject), Run(subject)
    for micro in (1, MICRO):
        resumed = Run(subject)
        straight.steps(2, micro)
        saving.steps(2, micro)
        resumed.load(saving.save())
        straight.steps(2, micro)
        resumed.steps(2, micro)
        changed = first_difference(straight.read(), resumed.read())
        assert not changed, f"a run that was saved and loaded has another {changed}"
        saving = resumed


def _copies_are_independent(subject: Subject) -> None:
    run = Run(subject)
    run.steps(2)
    twin = run.copy()
    before = twin.read()
    run.steps(2)
    changed = first_difference(before, twin.read())
    assert not changed, f"steps of the original changed {changed} of a copy"
    after = run.read()
    twin.steps(2)
    changed = first_difference(after, run.read())
    assert not changed, f"steps of a copy changed {changed} of the original"
    changed = first_difference(after, twin.read())
    assert not changed, f"a copy that went on has another {changed} than the original"


def _no_sync_only_accumulates(subject: Subject) -> None:
    run = Run(subject)
    plain, call = _without_parts(subject)
    micro_batches = run.batches(MICRO)
    for model, forward in ((run.model, run.model), (plain, call)):
        torch.manual_seed(0)
        for inputs in micro_batches:
            with run.session.no_sync() if model is run.model else nullcontext():
                loss = loss_of(forward(*inputs))
            loss.backward()
    assert run.session.pending, "after a backward within no_sync nothing is pending"
    wanted = dict(plain.named_parameters())
    for name, parameter in run.model.named_parameters():
        where = f"within no_sync the gradient of {name!r}"
        one, other = wanted[name].grad, parameter.grad
        assert (one is None) == (other is None), f"{where} is {_word(other)}, not {_word(one)}"
        if one is not None and other is not None:
            error = relative_error(one, other)
            bound = REASSOCIATED.bound
            assert error <= bound, f"{where} is off by {error:.2g} from what was accumulated"


def _accumulation_equals_one_batch(subject: Subject) -> None:
    if not _eager_accumulates(subject):
        return  # dropout, or statistics over the batch
    whole, parts = Run(subject), Run(subject)
    whole.steps(3)
    parts.steps(3, MICRO)
    _close(whole.model, parts.model, f"after steps of {MICRO} micro-batches")
    states = [
        {f"{owner}/{name}" for owner, state in run.session.states.items() for name in state}
        for run in (whole, parts)
    ]
    odd = sorted(states[0] ^ states[1])
    assert not odd, f"only {'one batch' if odd[0] in states[0] else 'micro-batches'} leave the " + (
        f"state {odd[0]!r}"
    )


def _ranks_stay_equal(subject: Subject) -> None:
    if subject.world == 1:
        return
    run = Run(subject)
    run.steps(3)
    run.steps(1, MICRO)
    mine = {n: p.detach() for n, p in run.model.named_parameters()}
    found: list[dict[str, Tensor]] = [{} for _ in range(subject.world)]
    dist.all_gather_object(found, mine)
    for rank, theirs in enumerate(found):
        changed = first_difference(found[0], theirs)
        assert not changed, f"after 4 steps parameter {changed!r} of rank {rank} is not rank 0's"


OBLIGATIONS: Mapping[str, Callable[[Subject], None]] = {
    "only-finish-changes-state": _only_finish_changes_state,
    "trials-leave-no-trace": _trials_leave_no_trace,
    "resume-is-bit-equal": _resume_is_bit_equal,
    "copies-are-independent": _copies_are_independent,
    "no-sync-only-accumulates": _no_sync_only_accumulates,
    "accumulation-equals-one-batch": _accumulation_equals_one_batch,
    "ranks-stay-equal": _ranks_stay_equal,
}
"""What runtime parts owe, in the order in which it is checked; the last on several ranks only."""


def _without_parts(subject: Subject) -> tuple[nn.Module, Callable[..., object]]:
    """A plain model, and a call that runs its rewritten graph without any runtime part."""
    from graphopt.runtime.backends import build
    from graphopt.runtime.session import Session

    model, example = subject.start()
    inputs = batches(subject, example, 0, MICRO)[0]
    captured = capture(model, inputs, {}, forward=type(model).forward)
    session = Session([pass_.name for pass_ in subject.passes])
    # On one rank: what is accumulated is a rank's own.
    Pipeline(subject.passes).run(captured.graph, PassContext(states=session.states))
    plan = Plan(
        spec="",
        signature=captured.graph.signature,
        gradient_sources=captured.graph.get(gradient_sources),
        aliases=captured.aliases,
    )
    call = captured.bind(build(captured.graph.module, plan, session))
    return model, lambda *args: call(model, *args)


def _eager_accumulates(subject: Subject) -> bool:
    """Whether the model itself, without graphopt, gives equal gradients in micro-batches."""
    gradients: list[list[Tensor]] = []
    for micro in (1, MICRO):
        model, example = subject.start()
        torch.manual_seed(0)
        for inputs in batches(subject, example, 0, micro):
            (loss_of(model(*inputs)) / micro).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    pairs = zip(*gradients, strict=True)
    return all(relative_error(one, other) <= REASSOCIATED.bound for one, other in pairs)


def _close(wanted: nn.Module, found: nn.Module, when: str) -> None:
    for (name, one), other in zip(wanted.named_parameters(), found.parameters(), strict=True):
        error = relative_error(one, other)
        assert error <= REASSOCIATED.bound, f"{when} parameter {name!r} is off by {error:.2g}"


def _word(gradient: Tensor | None) -> str:
    return "absent" if gradient is None else "there"
