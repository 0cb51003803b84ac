"""The table of what a pass owes for every graph; `check_pass` holds passes against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphopt.graph import Graph, Level
from graphopt.ops.unrounded import unrounded
from graphopt.passbase import REASSOCIATED, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Role, Slot
from graphopt.rewrite import parametrized_name
from graphopt.testing.comparison import amplification_of, assert_same
from graphopt.testing.inputs import inputs_for
from graphopt.testing.oracles import run_graph, run_graph_fp64
from graphopt.testing.sizes import Sizes, at_sizes, conditions, holds
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify


@dataclass(frozen=True)
class Application:
    """One application of a pass.

    Attributes:
        pass_: the pass.
        before: the graph as it was.
        after: the graph that the pass has rewritten.
        outcome: what it says that it did.
        ctx: what it was told.
        inputs: a value for each input of `before`.
        sizes: for which `before` holds beside those of the recorded call; none without symbols.
    """

    pass_: Pass
    before: Graph
    after: Graph
    outcome: Outcome
    ctx: PassContext
    inputs: list[Any] = field(repr=False)
    sizes: Sequence[Sizes] = ()

    @cached_property
    def text_before(self) -> str:
        """The text of `before`."""
        return print_graph(self.before)

    @cached_property
    def text_after(self) -> str:
        """The text of `after`."""
        return print_graph(self.after)

    @cached_property
    def outputs_before(self) -> dict[Slot, Tensor]:
        """What `before` returns."""
        return _outputs(self.before, self.inputs)

    @cached_property
    def outputs_after(self) -> dict[Slot, Tensor]:
        """What `after` returns."""
        return _outputs(self.after, self.inputs_after)

    @cached_property
    def inputs_after(self) -> list[Any]:
        """The same values for the inputs of `after`; those that the pass added are in `ctx`.

        Parameters that it has added are made of those that they take the place of.
        """
        return self.inputs_from(dict(zip(self.before.signature.inputs, self.inputs, strict=True)))

    def inputs_from(self, values: Mapping[Slot, Any]) -> list[Any]:
        """A value for each input of `after`, from those of `before`."""
        values = dict(values)
        for name, made_by in self.outcome.parametrized.items():
            inverse: Any = made_by.right_inverse
            for number, value in enumerate(inverse(self.ctx.parameters[name])):
                values[Slot(Role.PARAM, parametrized_name(name, number))] = value
        return [
            values[slot] if slot in values else self.ctx.state[slot.name.partition("/")[2]]
            for slot in self.after.signature.inputs
        ]


def _verifies(application: Application) -> None:
    verify(application.after, full=True)


def _reports(application: Application) -> None:
    if application.text_before == application.text_after:
        return
    assert application.outcome.applied, (
        "the graph changed, and the outcome lists nothing as applied"
    )
    assert application.after.version > 0, "the graph changed without a call of `graph.changed()`"


def _keeps_signature(application: Application) -> None:
    before, after = application.before.signature, application.after.signature
    if application.pass_.changes_signature:
        lost = [slot for slot in before.outputs if slot not in after.outputs]
        assert not lost, f"{lost[0]} is not returned any more"
        return
    assert after == before, "the signature changed, and `changes_signature` is not declared"
    names = [
        [node.name for node in graph.inputs] for graph in (application.before, application.after)
    ]
    assert names[0] == names[1], f"placeholders were renamed from {names[0]} to {names[1]}"


def _same_results(application: Application) -> None:
    if any(unrounded(node.target) for node in application.after.operators):
        _same_without_rounding(application)
        return
    numerics = application.pass_.numerics
    expected = list(application.outputs_before.values())
    actual = [application.outputs_after[slot] for slot in application.outputs_before]
    amplification = None
    if numerics.kind in ("reassociated", "lowered"):
        amplification = amplification_of(application.before, application.inputs, expected)
    assert_same(expected, actual, numerics, application.before.signature, amplification)


def _same_at_other_sizes(application: Application) -> None:
    """A graph with symbols is rewritten to what graphs of fixed sizes are rewritten to.

    So a size of the recorded call must not be taken for that of all calls.
    """
    if not application.sizes:
        return
    after = application.after
    usable = [sizes for sizes in application.sizes if holds(after, sizes)]
    assert usable, (
        "`symbolic` is declared, and the pass asks of sizes what holds for those of the captured "
        f"call only: {', '.join(conditions(after)[-3:])}"
    )
    for sizes in usable[:2]:
        try:
            _same_at(application, sizes)
        except Exception as error:
            said = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise AssertionError(f"in a call with the sizes {said}: {error}") from error


def _same_at(application: Application, sizes: Sizes) -> None:
    before, after = application.before, application.after
    inputs = inputs_for(before, 0, sizes)
    fixed = at_sizes(before, sizes)
    numbers = [value for value in inputs if isinstance(value, Tensor)]
    again = replace(application, before=fixed, after=fixed.copy(), inputs=numbers, sizes=())
    ctx = replace(application.ctx, states={})
    outcome = application.pass_.apply(again.after, ctx)
    again = replace(again, outcome=outcome, ctx=ctx)
    given = application.inputs_from(dict(zip(before.signature.inputs, inputs, strict=True)))
    exact = any(unrounded(node.target) for node in after.operators)
    run = run_graph_fp64 if exact else run_graph
    found = dict(zip(after.signature.outputs, run(after, given), strict=True))
    wanted = dict(zip(fixed.signature.outputs, run(fixed, numbers), strict=True))
    by_itself = zip(
        again.after.signature.outputs, run(again.after, again.inputs_after), strict=True
    )
    added = {slot: v for slot, v in by_itself if slot in found and slot not in wanted}
    numerics: Numerics = application.pass_.numerics
    for outputs, allowed in (
        (wanted, REASSOCIATED if exact else numerics),
        (added, REASSOCIATED if numerics.kind == "algorithm" else numerics),
    ):
        expected, actual = list(outputs.values()), [found[slot] for slot in outputs]
        amplification = None
        if outputs is wanted and allowed.kind in ("reassociated", "lowered") and not exact:
            amplification = amplification_of(fixed, numbers, expected)
        signature = replace(fixed.signature, outputs=tuple(outputs))
        assert_same(expected, actual, allowed, signature, amplification)


def _same_gradients(application: Application) -> None:
    """Of a forward graph autograd derives the backward, so that it has to be right too."""
    if application.before.level is not Level.FORWARD:
        return
    numerics = application.pass_.numerics
    expected = _gradients(application.before, application.inputs)
    actual = _gradients(application.after, application.inputs_after)
    common = [slot for slot in expected if slot in actual]
    size = max((float(expected[s].abs().max()) for s in common if expected[s].numel()), default=0.0)
    for slot in common:
        off = float((expected[slot] - actual[slot]).abs().max()) if expected[slot].numel() else 0.0
        allowed = max(numerics.bound, 1e-4) * max(size, 1.0)
        assert off <= allowed, f"the gradient of {slot} is off by {off:.3g}, beyond {allowed:.3g}"


def _gradients(graph: Graph, inputs: Sequence[Any]) -> dict[Slot, Tensor]:
    """Of the sum of the cosines of all outputs; 0 where it does not depend on an input."""
    wants = [
        isinstance(t, Tensor) and t.is_floating_point() and slot.role is not Role.BUFFER
        for slot, t in zip(graph.signature.inputs, inputs, strict=True)
    ]
    leaves = [
        t.clone().requires_grad_(w) if isinstance(t, Tensor) else t
        for t, w in zip(inputs, wants, strict=True)
    ]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        outputs = [t for t in graph.module(*leaves) if isinstance(t, Tensor) and t.requires_grad]
        if not outputs:
            return {}
        loss = sum((t.cos() if t.is_floating_point() else t).double().sum() for t in outputs)
        assert isinstance(loss, Tensor)
        wanted = [(s, t) for s, t in zip(graph.signature.inputs, leaves, strict=True)]
        wanted = [(s, t) for s, t in wanted if isinstance(t, Tensor) and t.requires_grad]
        grads = torch.autograd.grad(loss, [t for _, t in wanted], allow_unused=True)
    return {
        slot: torch.zeros_like(leaf) if grad is None else grad
        for (slot, leaf), grad in zip(wanted, grads, strict=True)
    }


def _same_without_rounding(application: Application) -> None:
    """Generated graphs are small and cancel often, where formats of 8 bits leave nothing to hold.

    What is left of the graph without the rounding has to be the graph that it was.
    """
    before, after = application.before, application.after
    expected = run_graph_fp64(before, application.inputs)
    actual = dict(
        zip(after.signature.outputs, run_graph_fp64(after, application.inputs_after), strict=True)
    )
    kept = [actual[slot] for slot in before.signature.outputs]
    assert_same(expected, kept, REASSOCIATED, before.signature)


def _no_new_aliases(application: Application) -> None:
    """An output that begins to share memory could be overwritten by whoever writes to the other.

    Gradients may share, as they do in eager: autograd copies those before it accumulates.
    """
    before = _sharing(application.before, application.inputs, application.outputs_before)
    after = _sharing(application.after, application.inputs_after, application.outputs_after)
    for slot, shared in before.items():
        if new := after[slot] - shared:
            raise AssertionError(f"{slot} now shares memory with {', '.join(sorted(new))}")


def _is_deterministic(application: Application) -> None:
    again = application.before.copy()
    application.pass_.apply(again, replace(application.ctx, states={}))
    text = print_graph(again)
    assert text == application.text_after, (
        f"a second run on the same graph makes another one:\n{text}"
    )


def _is_idempotent(application: Application) -> None:
    if not application.pass_.idempotent:
        return
    again = application.after.copy()
    outcome = application.pass_.apply(again, application.ctx)
    text = print_graph(again)
    assert text == application.text_after, (
        f"a second application changes the graph again, to\n{text}"
    )
    assert not outcome.applied, f"a second application says that it did {outcome.applied[0]}"


def _survives_printing(application: Application) -> None:
    parsed = parse_graph(application.text_after, dict(application.after.module.named_buffers()))
    text = print_graph(parsed)
    assert text == application.text_after, f"its text reads back as\n{text}"


OBLIGATIONS: Mapping[str, Callable[[Application], None]] = {
    "verifies": _verifies,
    "reports": _reports,
    "keeps-signature": _keeps_signature,
    "same-results": _same_results,
    "same-gradients": _same_gradients,
    "same-at-other-sizes": _same_at_other_sizes,
    "no-new-aliases": _no_new_aliases,
    "is-deterministic": _is_deterministic,
    "is-idempotent": _is_idempotent,
    "survives-printing": _survives_printing,
}
"""What a pass owes for every graph, in the order in which it is checked."""


def _outputs(graph: Graph, inputs: list[Any]) -> dict[Slot, Tensor]:
    return dict(zip(graph.signature.outputs, run_graph(graph, inputs), strict=True))


def _sharing(
    graph: Graph, inputs: list[Any], outputs: Mapping[Slot, Tensor]
) -> dict[Slot, set[str]]:
    """For each output but gradients, whose memory it shares.

    That of inputs and constants; for an output to the user, that of other such outputs too.
    """
    given = zip(graph.signature.inputs, inputs, strict=True)
    owners = {str(slot): value for slot, value in given if isinstance(value, Tensor)}
    owners |= {f"constant {name!r}": value for name, value in graph.module.named_buffers()}
    returned = {str(slot): v for slot, v in outputs.items() if slot.role is Role.OUTPUT}
    sharing = {}
    for slot, value in outputs.items():
        if slot.role is not Role.GRAD:
            others = owners | (returned if slot.role is Role.OUTPUT else {})
            others.pop(str(slot), None)
            sharing[slot] = {name for name, v in others.items() if _same_storage(value, v)}
    return sharing


def _same_storage(one: Tensor, other: Tensor) -> bool:
    return (
        one.numel() > 0 and one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    )
