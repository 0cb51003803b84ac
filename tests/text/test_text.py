"""The text form: golden files, bit-exact constants, what is refused and how it is said."""

from __future__ import annotations

import operator
import re
from pathlib import Path

import pytest
import torch
from torch import fx

from graphopt.errors import TextError
from graphopt.graph import Graph, Level, module_of, phase_of, value_of
from graphopt.plan import Phase, Role, Signature, Slot
from graphopt.text import parse_graph, print_graph
from graphopt.text.header import running_torch
from graphopt.verify import verify
from tests.support.graphs import Builder, inference_graph, linear_graph, output

aten = torch.ops.aten
GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> str:
    """A golden text, as the running torch would write it."""
    text = (GOLDEN / f"{name}.gopt").read_text()
    return re.sub(r"torch [\d.]+", f"torch {running_torch()}", text, count=1)


LINEAR = golden("linear")
EVERYTHING = golden("everything")


# -- golden files ----------------------------------------------------------------------------------


def test_a_training_step_prints_as_expected():
    assert print_graph(linear_graph()) == LINEAR


@pytest.mark.parametrize("text", [LINEAR, EVERYTHING], ids=["linear", "everything"])
def test_printing_inverts_reading(text):
    assert print_graph(parse_graph(text)) == text


def test_everything_that_a_text_says_is_in_the_graph():
    graph = parse_graph(EVERYTHING)
    nodes = {node.name: node for node in graph.nodes}
    assert graph.level is Level.JOINT
    assert graph.facts == {"captured", "grouped"}
    assert graph.signature.inputs[4] == Slot(Role.STATE, "kfac.history")
    assert graph.signature.inputs[6] == Slot(Role.PARAM, "late", Phase.BACKWARD)
    assert graph.signature.outputs[0] == Slot(Role.MUTATION, "lin.count")
    assert graph.signature.outputs[-1] == Slot(Role.GRAD, "lin.weight", Phase.BACKWARD)
    assert value_of(nodes["h"]).device == torch.device("cuda:0")
    assert value_of(nodes["x"]).stride() == (8, 1, 1)
    assert value_of(nodes["wide"]).stride() == (5, 0)
    assert module_of(nodes["drop"]) == "lin.0"
    assert module_of(nodes["view"]) == "odd name"
    assert module_of(nodes["gw"]) == "lin"
    assert [phase_of(nodes[name]) for name in ("g", "gw", "last")] == [
        Phase.BACKWARD,
        Phase.BACKWARD,
        Phase.FORWARD,
    ]
    policy = torch.utils.checkpoint.CheckpointPolicy
    assert nodes["drop"].meta["recompute"] is policy.MUST_SAVE
    assert nodes["drop"].meta["ac_graph_id"] == 1
    assert nodes["kept"].meta["recompute"] is policy.MUST_SAVE
    assert "ac_graph_id" not in nodes["kept"].meta
    assert nodes["full"].args == ([2, 4], float("-inf"))
    assert nodes["clone"].kwargs == {"memory_format": torch.contiguous_format}
    assert nodes["cast"].kwargs == {
        "dtype": torch.float32,
        "layout": torch.strided,
        "device": torch.device("cpu"),
    }
    assert isinstance(nodes["cat"].args[0], list)
    assert isinstance(nodes["cond"].args[3], tuple)


@pytest.mark.parametrize("make", [linear_graph, inference_graph], ids=lambda f: f.__name__)
def test_a_parsed_graph_is_legal(make):
    parsed = parse_graph(print_graph(make()))
    verify(parsed, full=True)


def test_sub_graphs_are_run_as_before():
    b = Builder()
    predicate = b.input(Role.INPUT, "p", (), torch.bool)
    x = b.input(Role.INPUT, "x", (2,))
    branches = [b.subgraph("doubled", _branch(2.0)), b.subgraph("halved", _branch(0.5))]
    chosen = b.call(torch.ops.higher_order.cond, predicate, *branches, (x,))
    y = b.call(operator.getitem, chosen, 0)
    parsed = parse_graph(print_graph(b.build({output(): y}, Level.INFERENCE)))
    for flag, expected in ((True, 6.0), (False, 1.5)):
        (result,) = parsed.module(torch.tensor(flag), torch.full((2,), 3.0))
        assert result.tolist() == [expected] * 2


def _branch(factor: float) -> fx.GraphModule:
    b = Builder()
    scaled = b.call(aten.mul.Tensor, b.input(Role.INPUT, "x", (2,)), factor)
    b.fx.output((scaled,))
    return fx.GraphModule(b.module, b.fx)


# -- constants -------------------------------------------------------------------------------------

BITS = {
    "negative zero": torch.tensor([-0.0, 0.0]),
    "nan with a payload": torch.tensor([0x7FC00001, -1], dtype=torch.int32).view(torch.float32),
    "infinities": torch.tensor([float("inf"), float("-inf"), float("nan")]),
    "subnormal": torch.tensor([1e-45, 5e-324], dtype=torch.float64),
    "a third": torch.tensor([1 / 3, 1e30]),
    "half": torch.tensor([1 / 3, 65504.0], dtype=torch.float16),
    "bfloat16": torch.tensor([1 / 3, 3e38], dtype=torch.bfloat16),
    "float8": torch.tensor([0.5, 448.0]).to(torch.float8_e4m3fn),
    "large integers": torch.tensor([2**63 - 1, -(2**63)]),
    "unsigned": torch.tensor([2**64 - 1], dtype=torch.uint64),
    "bytes": torch.tensor([0, 255], dtype=torch.uint8),
    "booleans": torch.tensor([True, False]),
    "complex": torch.tensor([complex(1, -0.0), complex(float("nan"), 2)]),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 3),
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "channels last": torch.arange(16.0).reshape(1, 4, 2, 2).to(memory_format=torch.channels_last),
}


def _with_constant(value: torch.Tensor) -> Graph:
    b = Builder()
    constant = b.constant("c", value)
    return b.build({output(): b.call(aten.clone.default, constant)}, Level.INFERENCE)


@pytest.mark.parametrize("value", BITS.values(), ids=BITS.keys())
def test_small_constants_keep_every_bit(value):
    text = print_graph(_with_constant(value))
    read = parse_graph(text).module.c
    assert (read.dtype, read.shape, read.stride()) == (value.dtype, value.shape, value.stride())
    size = value.dtype.itemsize
    raw = [t.contiguous().flatten().view(torch.uint8).tolist() for t in (read, value)]
    assert raw[0] == raw[1]
    assert len(raw[0]) == value.numel() * size
    assert print_graph(parse_graph(text)) == text


def test_large_constants_are_held_by_reference():
    value = torch.randn(17)
    text = print_graph(_with_constant(value))
    assert '%c = const "c" : f32[17]\n' in text
    assert parse_graph(text, {"c": value, "another": value}).module.c is value
    with pytest.raises(TextError, match='constant "c" is not in the text') as caught:
        parse_graph(text)
    assert 'parse_graph(text, {"c": tensor})' in caught.value.hint
    with pytest.raises(TextError, match=r"%c is f32\[18\], but the text says f32\[17\]"):
        parse_graph(text, {"c": torch.randn(18)})


def test_overlapping_constants_are_held_by_reference():
    assert 'const "c" : f32[3]{0}\n' in print_graph(_with_constant(torch.ones(1).expand(3)))


def test_constants_of_sub_graphs_are_named_by_path():
    text = EVERYTHING.replace(" : f32[1] = [2.0]", " : f32[1]")
    with pytest.raises(TextError, match=r'constant "then\.inner"'):
        parse_graph(text)
    parsed = parse_graph(text, {"then.inner": torch.tensor([2.0])})
    assert parsed.module.then.inner.tolist() == [2.0]


# -- printing --------------------------------------------------------------------------------------


def test_sources_are_comments():
    graph = linear_graph()
    trace = 'File "/home/me/model.py", line 12, in forward\n    return x @ self.w\n'
    next(graph.operators).meta["stack_trace"] = trace
    text = print_graph(graph, sources=True)
    assert "f32[4,2]  # /home/me/model.py:12\n" in text
    assert print_graph(parse_graph(text)) == print_graph(graph)


def test_regions_of_checkpointing_are_numbered_from_zero():
    graph = linear_graph()
    for node, region in zip(graph.operators, (71, 70, 71), strict=True):
        policy = torch.utils.checkpoint.CheckpointPolicy.PREFER_RECOMPUTE
        node.meta.update(recompute=policy, ac_graph_id=region)
    text = print_graph(graph)
    assert re.findall(r"!prefer_recompute:(\d)", text) == ["1", "0", "1"]


def _without_value() -> Graph:
    graph = linear_graph()
    del next(graph.operators).meta["val"]
    return graph


def _function_without_name() -> Graph:
    graph = linear_graph()
    next(graph.operators).target = lambda *values: values[0]
    return Graph(graph.module, graph.signature, Level.FORWARD)


def _python_function() -> Graph:
    graph = linear_graph()
    next(graph.operators).target = torch.nn.functional.linear
    return graph


def _odd_argument() -> Graph:
    graph = linear_graph()
    next(graph.operators).args = (range(1, 2),)
    return graph


def _sparse() -> Graph:
    graph = linear_graph()
    graph.inputs[0].meta["val"] = torch.eye(3).to_sparse()
    return graph


def _odd_tag() -> Graph:
    graph = linear_graph()
    next(graph.operators).meta["partitioner_tag"] = "must_be_in_forward"
    return graph


def _short_signature() -> Graph:
    graph = linear_graph()
    signature = Signature(graph.signature.inputs, graph.signature.outputs[:1])
    return Graph(graph.module, signature, Level.JOINT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_without_value, r"a node without meta\['val'\]"),
        (_function_without_name, "only ATen and other registered operators"),
        (_python_function, "only ATen and other registered operators"),
        (_odd_argument, "an argument of type range"),
        (_sparse, "a tensor with layout torch.sparse_coo"),
        (_odd_tag, "partitioner tag 'must_be_in_forward'"),
        (_short_signature, "the graph returns 2 values, its signature names 1"),
    ],
)
def test_what_has_no_text_form_is_named(make, message):
    with pytest.raises(TextError, match=message):
        print_graph(make())


# -- reading ---------------------------------------------------------------------------------------


def _replaced(old: str, new: str, text: str = LINEAR) -> str:
    assert old in text
    return text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("old", "new", "message", "line", "under", "hint"),
    [
        ("gopt 1", "gopt 2", "has format 2, and this graphopt reads format 1", 1, "2", "print"),
        ("joint", "middle", "`middle` is not a level", 1, "middle", "forward or joint"),
        ("inputs", "input", "no such section", 3, "forward input", "sections are"),
        ("aten.mm.", "aten.mmm.", "no operator aten.mmm.default", 11, "aten.mmm", "aten.mm.d"),
        ("aten.mm.default", "mm", "no operator mm", 11, "mm(", "aten.add.Tensor"),
        ("aten.mm.", "mine.mm.", "no operator mine.mm.default", 11, "mine.mm", "import the mod"),
        ("(%input_0, ", "(%inptu_0, ", "value %inptu_0 is not", 11, "%inptu_0,", "%input_0?"),
        ("%t = ", "%mm = ", "value %mm is already defined on line 11", 14, "%mm", ""),
        ("f32[3,2]", "float32[3,2]", "`float32` is not a type", 4, "float32", "write f32"),
        ("f32[3,2]", "f32[3,-2]", "sizes and strides are whole numbers", 4, "-2", ""),
        ("f32[3,2]", "f32[3,2", "expected `]`", 4, "", ""),
        ("f32[3,2]", "f32[3,2]{1}", "1 strides for 2 dimensions", 4, "{1}", ""),
        ("f32[3,2]", "f32[3,2] gpu", "`gpu` is not a device", 4, "gpu", "cuda:0"),
        ("[3,4]{1,3}", "[3,4]", "%t is f32[3,4]{1,3}, but the text says f32[3,4]", 14, "f32", ""),
        (" : f32[4,2]\n\nback", "\n\nback", "but the text says nothing", 11, "", ""),
        (" : f32[3,2]", "", "an input must be a tensor", 4, "", "write its type"),
        ("param_w)", "input_0)", "aten.mm.default refuses these arguments", 11, "aten", ""),
        ("param_w)", "param_w, out=f33)", "`f33` is not an argument", 11, "f33", "f32?"),
        ("%param_w)", "mat2=%param_w, 1)", "an argument without a name", 11, "1)", ""),
        ("(%input_0, ", "(%input_0 ", "expected `)` but found `%param_w`", 11, "%param_w", ""),
        ('param "w"', 'param "w', "unfinished string", 4, '"w', ""),
        ('param "w"', 'parma "w"', "`parma` is not an input", 4, "parma", "param?"),
        ('input "0"', 'param "w"', 'param "w" already stands on line 4', 5, '"w"', ""),
        ('output "0"', 'outptu "0"', "`outptu` is not an output", 18, "outptu", "output?"),
        ("= %mm_1", "= %mm_2", "the value %mm_2 is not defined", 21, "%mm_2", "%mm_1?"),
        ("%mm = ", "%mm ? ", "unexpected character", 11, "?", ""),
        ("%t = aten.t", "%t aten.t", "expected `=` but found `aten.t.default`", 14, "aten.t", ""),
        ("f32[4,2]\n\nb", "f32[4,2] !must_sav\n\nb", "not a recompute policy", 11, "must", "save?"),
        ("\nend", "\nend\nend", "a text stops at its line `end`", 24, "end", ""),
        ("\nend", "\nfacts\nend", "is not an output", 23, "facts", ""),
        ("\nforward\n", "\nbackward\nforward inputs\n", "inputs cannot follow body", 11, "f", ""),
        ("forward\n", 'forward\n  %z = param "z" : f32[]\n', "an input outside", 11, "param", ""),
        ("forward\n", 'forward\n  %z = graph "z"\n', "expected `{`", 11, "", ""),
        ("forward\n", 'forward\n  %z = const "z" : i64[2] = [1]\n', "1 values for 2", 11, "i6", ""),
        ("forward\n", 'forward\n  %z = const "z" : i64[1] = [.5]\n', "unexpected", 11, ".5", ""),
        ("forward\n", 'forward\n  %z = const "z" : i64[1] = [1.5]\n', "1.5 is not", 11, "i6", ""),
        ("forward\n", 'forward\n  %z = const "a b" : i64[1] = [1]\n', "cannot name", 11, '"a', ""),
        ("forward\n", 'forward\n  %z = const "half" : i64[1] = [1]\n', "cannot name", 11, '"h', ""),
        (
            "forward\n",
            'forward\n  %z = const "z" : f32[1] = bytes "0"\n',
            "bytes are",
            11,
            '"0',
            "",
        ),
    ],
)
def test_errors_point_at_what_is_wrong(old, new, message, line, under, hint):
    text = _replaced(old, new)
    with pytest.raises(TextError) as caught:
        parse_graph(text)
    error = caught.value
    assert message in error.message
    assert hint in error.hint
    place, shown, caret = error.where.split("\n")
    assert place.startswith(f"line {line}, column ")
    assert shown.strip() == text.split("\n")[line - 1].strip()
    assert shown[caret.index("^") :].startswith(under)


def test_a_long_line_is_shown_around_the_caret():
    text = _replaced("(%input_0, %param_w)", f"({', '.join(['%input_0'] * 40)}, %nothing)")
    with pytest.raises(TextError) as caught:
        parse_graph(text)
    _, shown, caret = caught.value.where.split("\n")
    assert len(shown) < 120
    assert shown[caret.index("^") :].startswith("%nothing")


@pytest.mark.parametrize("release", ["2.11", "2.12", "2.13"])
def test_texts_of_supported_releases_are_read(release):
    parse_graph(re.sub(r"torch [\d.]+", f"torch {release}", LINEAR))


@pytest.mark.parametrize("release", ["2.10", "2.14", "3.0"])
def test_texts_of_other_releases_are_refused_naming_both(release):
    with pytest.raises(TextError) as caught:
        parse_graph(re.sub(r"torch [\d.]+", f"torch {release}", LINEAR))
    assert f"torch {release}" in caught.value.message
    assert f"this is torch {running_torch()}" in caught.value.message


@pytest.mark.parametrize("text", [LINEAR, EVERYTHING], ids=["linear", "everything"])
def test_every_truncated_text_is_refused(text):
    lines = text.rstrip().split("\n")
    for kept in range(1, len(lines)):
        said = max(n for n in range(kept) if lines[n]) + 1
        with pytest.raises(TextError) as caught:
            parse_graph("\n".join(lines[:kept]))
        assert caught.value.message == f"the text ends early, after line {said}"


def test_an_empty_text_is_refused():
    with pytest.raises(TextError, match="the text is empty"):
        parse_graph("\n  # nothing\n")


def test_windows_line_ends_and_comments_are_read():
    text = LINEAR.replace("\n", "  # a comment\r\n")
    assert print_graph(parse_graph(text)) == LINEAR


def test_builtin_names_give_way():
    graph = parse_graph(LINEAR.replace("%mm ", "%sum ").replace("%mm\n", "%sum\n"))
    assert [node.name for node in graph.operators] == ["sum_1", "t", "mm_1"]


def test_operators_of_graphopt_and_collectives_are_found():
    text = """gopt 1 inference torch 2.13
forward inputs
  %x = input "x" : f32[4]
forward
  %frozen = graphopt.frozen.default(%x) : f32[4]
  %reduced = _c10d_functional.all_reduce.default(%frozen, "sum", "0") : f32[4]
  %done = _c10d_functional.wait_tensor.default(%reduced) : f32[4]
forward outputs
  output "0" = %done
end
"""
    assert len(parse_graph(text)) == 5


def test_values_that_depend_on_data_are_refused():
    text = """gopt 1 inference torch 2.13
forward inputs
  %x = input "x" : f32[4]
forward
  %found = aten.nonzero.default(%x) : i64[2,1]
forward outputs
  output "0" = %found
end
"""
    with pytest.raises(TextError, match="symbolic sizes"):
        parse_graph(text)
