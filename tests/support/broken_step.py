"""Well-formed graphs that are no training steps, or whose recorded values are false."""

from __future__ import annotations

import operator

import torch

from graphopt.graph import Graph
from graphopt.plan import Phase, Role, Slot
from tests.support.breaking import Broken, breaks, named, one_input
from tests.support.graphs import Builder, aten, grad, linear_graph, mutation, output
from tests.support.legal_graphs import branch, collective, cond, frozen


@breaks("phase-order")
def forward_uses_tangent() -> Broken:
    b = Builder()
    tangent = b.input(Role.TANGENT, "0", (4,))
    tangent.meta["partitioner_tag"] = "is_forward"
    y = b.call(aten.neg.default, tangent)
    return b.build({output(): y}), "neg", "uses 'tangent_0' of the backward half"


@breaks("phase-order")
def forward_uses_backward() -> Broken:
    b, x = one_input()
    y = b.call(aten.neg.default, b.backward(aten.neg.default, x))
    return b.build({output(): y}), "neg_1", "uses 'neg' of the backward half"


@breaks("forward-outputs")
def forward_output_from_backward() -> Broken:
    b, x = one_input()
    y = b.backward(aten.neg.default, x)
    return b.build({output(): y}), "neg", "output '0' comes from the backward half"


@breaks("forward-outputs")
def forward_output_is_tangent() -> Broken:
    b = Builder()
    tangent = b.input(Role.TANGENT, "0", (4,))
    return b.build({output(): tangent}), "tangent_0", "output '0' comes from the backward half"


@breaks("mutations")
def mutation_by_a_tuple() -> Broken:
    b, x = one_input()
    pair = b.call(aten.sort.default, x)
    return b.build({mutation("0"): pair}), "sort", "but the input is float32[4]"


def _with_owner(slot: Slot, shape: tuple[int, ...], dtype: torch.dtype, sentence: str) -> Broken:
    b = Builder()
    role = Role.PARAM if slot.role is Role.GRAD else Role.BUFFER
    owner = b.input(role, "a", shape, dtype)
    x = b.input(Role.INPUT, "0", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    value = b.call(aten.neg.default, tangent if slot.role is Role.GRAD else x, phase=slot.phase)
    outputs = {slot: value, output(): owner}
    ordered = dict(sorted(outputs.items(), key=lambda item: item[0].phase is Phase.BACKWARD))
    return b.build(ordered), "neg", sentence


@breaks("mutations")
def mutation_of_nothing() -> Broken:
    sentence = "mutation 'b' names no input"
    return _with_owner(mutation("b"), (4,), torch.float32, sentence)


@breaks("mutations")
def mutation_of_other_shape() -> Broken:
    sentence = "mutation 'a' is float32[4], but the input is float32[4, 1]"
    return _with_owner(mutation("a"), (4, 1), torch.float32, sentence)


@breaks("mutations")
def mutation_of_other_dtype() -> Broken:
    sentence = "mutation 'a' is float32[4], but the input is int64[4]"
    return _with_owner(mutation("a"), (4,), torch.int64, sentence)


@breaks("gradients")
def gradient_of_nothing() -> Broken:
    return _with_owner(grad("b"), (4,), torch.float32, "grad 'b' names no input")


@breaks("gradients")
def gradient_of_other_shape() -> Broken:
    sentence = "grad 'a' is float32[4], but the input is float32[2, 2]"
    return _with_owner(grad("a"), (2, 2), torch.float32, sentence)


@breaks("gradients")
def gradient_of_other_dtype() -> Broken:
    sentence = "grad 'a' is float32[4], but the input is bfloat16[4]"
    return _with_owner(grad("a"), (4,), torch.bfloat16, sentence)


# -- memory ----------------------------------------------------------------------------------------


@breaks("in-place")
def overwrites_what_is_read_later() -> Broken:
    b, x = one_input()
    fresh = b.call(aten.neg.default, x)
    added = b.call(aten.add_.Tensor, fresh, 1)
    y = b.call(aten.mul.Tensor, added, fresh)
    return b.build({output(): y}), "add_", "it overwrites 'neg', which 'mul' reads later"


@breaks("in-place")
def overwrites_what_is_returned() -> Broken:
    b, x = one_input()
    fresh = b.call(aten.neg.default, x)
    b.call(aten.add_.Tensor, fresh, 1)
    return b.build({output(): fresh}), "add_", "it overwrites 'neg', which 'output' reads later"


@breaks("in-place")
def overwrites_the_base_of_a_view() -> Broken:
    b, x = one_input()
    fresh = b.call(aten.neg.default, x)
    view = b.call(aten.view.default, fresh, [2, 2])
    added = b.call(aten.add_.Tensor, fresh, 1)
    return (
        b.build({output(): view, output("1"): added}),
        "add_",
        "it overwrites 'view', which 'output' reads later",
    )


@breaks("in-place")
def overwrites_a_view() -> Broken:
    b, x = one_input()
    fresh = b.call(aten.neg.default, x)
    part = b.call(operator.getitem, b.call(aten.split.Tensor, fresh, 2), 1)
    added = b.call(aten.add_.Tensor, part, 1)
    y = b.call(aten.sum.default, fresh)
    return (
        b.build({output(): added, output("1"): y}),
        "add_",
        "it overwrites 'neg', which 'sum_1' reads later",
    )


@breaks("in-place")
def overwrites_through_a_hidden_view() -> Broken:
    b, x = one_input()
    fresh = b.call(aten.neg.default, x)
    view = b.call(aten._unsafe_view.default, fresh, [2, 2])
    added = b.call(aten.add_.Tensor, view, 1)
    return (
        b.build({output(): added, output("1"): fresh}),
        "add_",
        "it overwrites 'neg', which 'output' reads later",
    )


@breaks("in-place")
def overwrites_an_out_argument() -> Broken:
    b, x = one_input()
    fresh = b.call(aten.neg.default, x)
    y = b.call(aten.add.out, x, x, out=fresh)
    return (
        b.build({output(): fresh, output("1"): y}),
        "add",
        "it overwrites 'neg', which 'output' reads later",
    )


@breaks("in-place")
def overwrites_an_input() -> Broken:
    b, x = one_input()
    y = b.call(aten.add_.Tensor, b.call(aten.view.default, x, [2, 2]), 1)
    return (
        b.build({output(): y}),
        "add_",
        "it overwrites input '0', which no mutation output declares",
    )


@breaks("in-place")
def overwrites_a_constant() -> Broken:
    b = Builder()
    y = b.call(aten.add_.Tensor, b.constant("c", torch.ones(4)), 1)
    return b.build({output(): y}), "add_", "it overwrites the constant 'c'"


# -- frozen values ---------------------------------------------------------------------------------


@breaks("frozen")
def frozen_input() -> Broken:
    b, x = one_input()
    y = b.call(frozen, b.call(aten.neg.default, x))
    return b.build({output(): y}), "frozen", "it depends on 'input_0', which is input '0' and no"


@breaks("frozen")
def frozen_state() -> Broken:
    b = Builder()
    y = b.call(frozen, b.input(Role.STATE, "s", (4,)))
    return b.build({output(): y}), "frozen", "it depends on 'state_s', which is state 's' and no"


@breaks("frozen")
def frozen_mutated_buffer() -> Broken:
    b = Builder()
    buffer = b.input(Role.BUFFER, "a", (4,))
    y = b.call(frozen, buffer)
    new = b.call(aten.neg.default, buffer)
    return (
        b.build({mutation("a"): new, output(): y}),
        "frozen",
        "it depends on 'buffer_a', and the graph mutates buffer 'a'",
    )


@breaks("frozen")
def frozen_random() -> Broken:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    y = b.call(frozen, b.call(aten.bernoulli.default, w))
    return b.build({output(): y}), "frozen", "it depends on 'bernoulli', which is random"


@breaks("frozen")
def frozen_random_branch() -> Broken:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    positive = b.call(aten.gt.Scalar, b.call(aten.sum.default, w), 0)
    yes = b.subgraph("yes", branch(aten.bernoulli.default))
    no = b.subgraph("no", branch(aten.neg.default))
    chosen = b.call(cond, positive, yes, no, (w,))
    y = b.call(frozen, b.call(operator.getitem, chosen, 0))
    return b.build({output(): y}), "frozen", "it depends on 'yes', which is random"


# -- collectives -----------------------------------------------------------------------------------


@breaks("collectives")
def never_waited_on() -> Broken:
    b, x = one_input()
    sent = b.call(collective.all_reduce.default, x, "sum", "g")
    return b.build({output(): sent}), "all_reduce", "it is never waited on"


@breaks("collectives")
def waited_on_twice() -> Broken:
    b, x = one_input()
    sent = b.call(collective.all_reduce.default, x, "sum", "g")
    one, two = (b.call(collective.wait_tensor.default, sent) for _ in range(2))
    return b.build({output(): one, output("1"): two}), "all_reduce", "it is waited on 2 times"


@breaks("collectives")
def read_without_waiting() -> Broken:
    b, x = one_input()
    sent = b.call(collective.all_reduce.default, x, "sum", "g")
    y = b.call(aten.add.Tensor, sent, b.call(collective.wait_tensor.default, sent))
    return b.build({output(): y}), "all_reduce", "it is read without waiting"


def _coalesced(waited: list[int], *, also_read: bool = False) -> Graph:
    b, x = one_input()
    sent = b.call(collective.all_reduce_coalesced.default, [x, x], "sum", "g")
    parts = [b.call(operator.getitem, sent, index) for index in waited]
    results = [b.call(collective.wait_tensor.default, part) for part in parts]
    if also_read:
        results.append(b.call(aten.cat.default, sent))
    return b.build({output(str(i)): node for i, node in enumerate(results)})


@breaks("collectives")
def one_of_two_never_waited_on() -> Broken:
    return _coalesced([0]), "all_reduce_coalesced", "its result 1 is taken 0 times"


@breaks("collectives")
def one_of_two_waited_on_twice() -> Broken:
    return _coalesced([0, 1, 0]), "all_reduce_coalesced", "its result 0 is taken 2 times"


@breaks("collectives")
def element_returned_without_waiting() -> Broken:
    b, x = one_input()
    sent = b.call(collective.all_reduce_coalesced.default, [x], "sum", "g")
    part = b.call(operator.getitem, sent, 0)
    return b.build({output(): part}), "getitem", "it is never waited on"


@breaks("collectives")
def both_read_without_waiting() -> Broken:
    graph = _coalesced([0, 1], also_read=True)
    return graph, "all_reduce_coalesced", "its results are read without waiting"


@breaks("collectives-everywhere")
def collective_in_a_branch() -> Broken:
    b, x = one_input()
    positive = b.call(aten.gt.Scalar, b.call(aten.sum.default, x), 0)
    reduce = (collective.all_reduce.default, ("sum", "g"))
    yes = b.subgraph("yes", branch(reduce, collective.wait_tensor.default))
    no = b.subgraph("no", branch(aten.neg.default))
    chosen = b.call(cond, positive, yes, no, (x,))
    y = b.call(operator.getitem, chosen, 0)
    return b.build({output(): y}), "yes", "contains the collective 'all_reduce_default'"


# -- values ----------------------------------------------------------------------------------------


def _with_false_value(value: torch.Tensor, sentence: str) -> Broken:
    b = Builder()
    node = b.call(aten.t.default, b.input(Role.INPUT, "0", (4, 2)))
    node.meta["val"] = b.mode.from_tensor(value)
    return b.build({output(): node}), "t", f"its recorded value has {sentence}"


@breaks("true-values")
def false_shape() -> Broken:
    return _with_false_value(torch.empty(4, 2), "shape (4, 2) instead of (2, 4)")


@breaks("true-values")
def false_dtype() -> Broken:
    value = torch.empty(4, 2, dtype=torch.float16).t()
    return _with_false_value(value, "dtype torch.float16 instead of torch.float32")


@breaks("true-values")
def false_stride() -> Broken:
    return _with_false_value(torch.empty(2, 4), "stride (4, 1) instead of (1, 2)")


@breaks("true-values")
def false_device() -> Broken:
    b, x = one_input()
    node = b.call(aten.neg.default, x)
    with b.mode:
        node.meta["val"] = torch.empty(4, device="meta")
    return b.build({output(): node}), "neg", "device meta instead of cpu"


@breaks("true-values")
def false_element() -> Broken:
    b, x = one_input()
    element = b.call(operator.getitem, b.call(aten.sort.default, x), 0)
    element.args = (element.args[0], 1)
    return b.build({output(): element}), "getitem", "dtype torch.float32 instead of torch.int64"


@breaks("true-values")
def false_number_of_elements() -> Broken:
    b, x = one_input()
    source = b.call(aten.split.Tensor, x, 2)
    element = b.call(operator.getitem, source, 0)
    source.meta["val"] = source.meta["val"][:1]
    return b.build({output(): element}), "split", "1 elements instead of 2"


@breaks("true-values")
def false_kind() -> Broken:
    b, x = one_input()
    source = b.call(aten.sort.default, x)
    source.meta["val"] = source.meta["val"][0]
    return b.build({output(): x}), "sort", "type FakeTensor instead of tuple"


@breaks("true-values")
def false_constant() -> Broken:
    b = Builder()
    constant = b.constant("c", torch.ones(2))
    constant.meta["val"] = b.mode.from_tensor(torch.ones(3))
    return b.build({output(): constant}), "c", "shape (3,) instead of (2,)"


@breaks("true-values")
def impossible_arguments() -> Broken:
    graph = linear_graph()
    node = named(graph, "mm")
    node.args = (node.args[0], node.args[0])
    return graph, "mm", "its operator refuses these arguments"
