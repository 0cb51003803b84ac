"""The table of what runtime parts owe; `check_runtime` holds a pipeline against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphopt.analysis.gradient_sources import gradient_sources
from graphopt.capture import capture
from graphopt.model.checkpoint import state_dict
from graphopt.passbase import REASSOCIATED, PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan
from graphopt.testing.comparison import relative_error
from graphopt.testing.runtime_runs import (
    Run,
    Subject,
    batches,
    first_difference,
    loss_of,
    together,
)

MICRO = 2


def _only_finish_changes_state(subject: Subject) -> None:
    run = Run(subject)
    run.prepare()  # state that a part makes when it is built is its initial state
    with run.session.watch():
        run.steps(2)
        run.steps(2, MICRO)
    run.trial(watched=True)


def _trials_leave_no_trace(subject: Subject) -> None:
    tried, straight, verified = Run(subject), Run(subject), Run(subject, verify="full")
    tried.prepare()  # state that is made together with a graph is its initial state

    def try_it() -> None:
        before, stream = tried.read(), torch.get_rng_state()
        tried.trial()
        changed = first_difference(before, tried.read())
        assert not changed, f"a trial changed {changed}"
        assert torch.equal(stream, torch.get_rng_state()), "a trial drew random numbers"

    for run, before in ((tried, try_it), (straight, None), (verified, None)):
        run.steps(2, before=before)
        run.steps(2, MICRO, before=before)
    for run, after in ((tried, "trials between its steps"), (verified, "a verified first call")):
        changed = first_difference(straight.result(), run.result())
        assert not changed, f"after {after}, training gave another {changed}"


def _resume_is_bit_equal(subject: Subject) -> None:
    straight, resumed = Run(subject), Run(subject)
    straight.steps(2)
    for micro in (1, MICRO):
        resumed.load(straight.save())
        for run in (straight, resumed):
            run.steps(2, micro)
        changed = first_difference(straight.result(), resumed.result())
        assert not changed, f"a run that was saved and loaded has another {changed}"


def _copies_are_independent(subject: Subject) -> None:
    run = Run(subject)
    run.steps(2)
    twin = run.copy()
    before = twin.read()
    run.steps(2)
    changed = first_difference(before, twin.read())
    assert not changed, f"steps of the original changed {changed} of a copy"
    after, result = run.read(), run.result()
    twin.steps(2)
    changed = first_difference(after, run.read())
    assert not changed, f"steps of a copy changed {changed} of the original"
    changed = first_difference(result, twin.result())
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
            torch.autograd.backward(loss)
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
    for _ in range(3):
        micro_batches = whole.batches(MICRO)
        whole.step([together(micro_batches)])
        parts.step(micro_batches)
    _close(whole.model, parts.model, f"after steps of {MICRO} micro-batches")
    states = [set(state_dict(run.model)) for run in (whole, parts)]
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
    for whole in (True, False):
        model, example = subject.start()
        torch.manual_seed(0)
        parts = batches(subject, example, 0, MICRO)
        parts = [together(parts)] if whole else parts
        for inputs in parts:
            torch.autograd.backward(loss_of(model(*inputs)) / len(parts))
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    pairs = zip(*gradients, strict=True)
    return all(relative_error(one, other) <= REASSOCIATED.bound for one, other in pairs)


def _close(wanted: nn.Module, found: nn.Module, when: str) -> None:
    for (name, one), other in zip(wanted.named_parameters(), found.parameters(), strict=True):
        error = relative_error(one, other)
        assert error <= REASSOCIATED.bound, f"{when} parameter {name!r} is off by {error:.2g}"


def _word(gradient: Tensor | None) -> str:
    return "absent" if gradient is None else "there"
