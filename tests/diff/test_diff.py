"""The difference between two graphs: what is found, what is not, and how it is said."""

from __future__ import annotations

import json

import pytest
import torch

from graphopt.diff import Kind, diff_graphs, diff_texts
from graphopt.diff.collapse import Family, collapse
from graphopt.errors import TextError
from graphopt.graph import Graph
from graphopt.plan import Role
from tests.support.graphs import Builder, grad, linear_graph, output

aten = torch.ops.aten

TEXT = """gopt 1 joint torch 2.13

forward inputs
  %w = param "lin.weight" : f32[4,8]
  %v = param "lin.other" : f32[4,8]
  %x = input "x" : f32[2,8]
backward inputs
  %g = tangent "0" : f32[2,4]

forward
  %c = const "c" : f32[2] = [1.0, 2.0]
  %big = const "big" : f32[100]
  %abs_1 = aten.abs.default(%x) : f32[2,8]
  %sin = aten.sin.default(%abs_1) : f32[2,8]
  %cos = aten.cos.default(%sin) : f32[2,8]
  %tanh = aten.tanh.default(%cos) : f32[2,8]
  %t = aten.t.default(%w) : f32[8,4]{1,8} @lin
  %mm = aten.mm.default(%tanh, %t) : f32[2,4] @lin
  %drop = aten.native_dropout.default(%mm, 0.5, True) : (f32[2,4], bool[2,4]) @drop
  %y = getitem(%drop, 0) : f32[2,4] @drop
backward
  %gt = aten.t.default(%g) : f32[4,2]{1,4} @lin
  %gw = aten.mm.default(%gt, %tanh) : f32[4,8] @lin
  %gv = aten.neg.default(%gw) : f32[4,8] @lin

forward outputs
  output "0" = %y
backward outputs
  grad "lin.weight" = %gw
  grad "lin.other" = %gv

end
"""


def changed(*replacements: tuple[str, str]) -> str:
    text = TEXT
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


def found(after: str) -> list[tuple[str, str, str]]:
    """Kind, what and module of all changes."""
    return [(c.kind.value, c.what, c.module) for c in diff_texts(TEXT, after).changes]


# -- what is found ---------------------------------------------------------------------------------


def test_equal_texts_have_no_difference():
    difference = diff_texts(TEXT, TEXT)
    assert not difference
    assert difference.render() == "no difference"


def test_names_of_values_do_not_count():
    renamed = changed(("%tanh", "%u"), ("%mm", "%tanh"), ("%u", "%mm"), ("%sin", "%sin_7"))
    assert not diff_texts(TEXT, renamed)


def test_an_insertion_changes_only_its_neighbour():
    after = changed(
        ("  %sin =", "  %neg = aten.neg.default(%abs_1) : f32[2,8]\n  %sin ="),
        ("sin.default(%abs_1)", "sin.default(%neg)"),
    )
    assert found(after) == [
        ("added", "aten.neg.default", ""),
        ("rewired", "aten.sin.default", ""),
    ]
    assert [c.kind for c in diff_texts(after, TEXT).changes] == [Kind.REMOVED, Kind.REWIRED]


def test_casts_are_called_casts_and_what_they_retype_is_named():
    after = changed(
        (
            "  %mm =",
            "  %low = aten._to_copy.default(%t, dtype=bf16) : bf16[8,4]{1,8} @lin\n  %mm =",
        ),
        ("(%tanh, %t) : f32[2,4]", "(%tanh, %low) : bf16[2,4]"),
    )
    assert found(after) == [
        ("added", "cast f32 -> bf16", "lin"),
        ("retyped", "aten.mm.default f32 -> bf16", "lin"),
    ]


def test_another_shape_is_shown_as_a_type():
    assert found(changed(('"x" : f32[2,8]', '"x" : f32[3,8]'))) == [
        ("retyped", "input x f32[2,8] -> f32[3,8]", "")
    ]


def test_other_arguments_of_the_same_node():
    assert found(changed(("0.5, True", "0.25, True"))) == [
        ("changed", "aten.native_dropout.default", "drop")
    ]


def test_an_integer_is_not_a_float():
    assert found(changed(("0.5, True", "0.5, 1"))) == [
        ("changed", "aten.native_dropout.default", "drop")
    ]


@pytest.mark.parametrize(
    "recompute", ["!must_save", "!must_save:0", "!prefer_recompute:0"], ids=lambda text: text
)
def test_recompute_policies_count(recompute):
    after = changed(
        (
            "mm.default(%tanh, %t) : f32[2,4] @lin",
            f"mm.default(%tanh, %t) : f32[2,4] @lin {recompute}",
        )
    )
    assert found(after) == [("changed", "aten.mm.default", "lin")]


def test_modules_count():
    after = changed(("%t) : f32[2,4] @lin", "%t) : f32[2,4] @other"))
    assert found(after) == [("changed", "aten.mm.default", "other")]


def test_phases_count():
    after = changed(("  %y = getitem", "backward\n  %y = getitem"))
    assert found(after) == [("changed", "getitem", "drop")]
    (change,) = diff_texts(TEXT, after).changes
    assert change.before.endswith(" in forward")
    assert change.after.endswith(" in backward")


def test_swapped_gradients_are_found():
    after = changed(("= %gw\n", "= %tmp\n"), ('" = %gv\n', '" = %gw\n'), ("= %tmp\n", "= %gv\n"))
    assert found(after) == [
        ("rewired", "grad weight", "lin"),
        ("rewired", "grad other", "lin"),
    ]


def test_swapped_operands_are_found():
    text = TEXT.replace("(%tanh, %t)", "(%t, %tanh)")
    assert found(text) == [("rewired", "aten.mm.default", "lin")]


def test_values_of_small_constants_count():
    assert found(changed(("[1.0, 2.0]", "[1.0, 2.5]")))[0][1] == "const"
    assert not diff_texts(TEXT, changed(('const "c"', 'const "renamed"')))


def test_inputs_and_outputs_are_compared_by_name():
    after = changed(
        ('  %x = input "x"', '  %s = state "history" : f32[3]\n  %x = input "x"'),
        ('  grad "lin.other" = %gv\n', ""),
    )
    assert found(after) == [("added", "state history", ""), ("removed", "grad other", "lin")]


def test_merged_nodes_are_removed_and_their_users_rewired():
    b = Builder()
    x = b.input(Role.INPUT, "x", (3,))
    first, second = (b.call(aten.sin.default, x) for _ in range(2))
    total = b.call(aten.add.Tensor, first, second)
    before = b.build({output(): total})
    after = before.copy()
    one, two, _ = after.operators
    two.replace_all_uses_with(one)
    after.fx.erase_node(two)
    kinds = [c.kind for c in diff_graphs(before, after).changes]
    assert kinds == [Kind.REMOVED, Kind.REWIRED]


def test_order_is_counted_and_nothing_else():
    line = "  %gt = aten.t.default(%g) : f32[4,2]{1,4} @lin\n"
    after = changed((line, ""), ("backward\n  %gw", f"backward\n{line}  %gw"))
    assert not diff_texts(TEXT, after)
    line = '  %c = const "c" : f32[2] = [1.0, 2.0]\n'
    after = changed((line, ""), ("  %sin =", f"{line}  %sin ="))
    difference = diff_texts(TEXT, after)
    assert (difference.changes, difference.moved) == ((), 1)
    assert difference.headline == "1 moved"
    assert difference


def test_sub_graphs_are_compared_by_what_they_compute():
    def branch(body: str, name: str) -> str:
        return (
            f'  %{name} = graph "{name}" {{\n    %a = arg : f32[2,4]\n'
            f"    %r = {body} : f32[2,4]\n    return (%r,)\n  }}\n"
        )

    def text(body: str, name: str = "then") -> str:
        lines = (
            branch(body, name)
            + "  %p = aten.any.default(%y) : bool[]\n"
            + f"  %z = cond(%p, %{name}, %{name}, (%y,)) : (f32[2,4],)\n"
        )
        return TEXT.replace("backward\n  %gt", f"{lines}backward\n  %gt")

    sin, cos = text("aten.sin.default(%a)"), text("aten.cos.default(%a)")
    assert not diff_texts(sin, text("aten.sin.default(%a)", "another"))
    assert [(c.kind, c.what) for c in diff_texts(sin, cos).changes] == [(Kind.CHANGED, "graph")]


def test_a_graph_and_its_text_with_other_constants_by_reference():
    difference = diff_texts(TEXT, changed(('const "big"', 'const "huge"')))
    assert [c.what for c in difference.changes] == ["const"]


def test_a_text_that_cannot_be_read_is_refused():
    with pytest.raises(TextError, match="ends early"):
        diff_texts(TEXT, TEXT[:-5])


def test_a_graph_equals_its_copy():
    graph = linear_graph()
    assert not diff_graphs(graph, graph.copy())


# -- how it is said --------------------------------------------------------------------------------


def _stack(layers: int, *, low: bool, skip: int = -1) -> Graph:
    b = Builder()
    value = b.input(Role.INPUT, "x", (2, 4))
    weights = [b.input(Role.PARAM, f"layers.{i}.weight", (4, 4)) for i in range(layers)]
    for index, weight in enumerate(weights):
        nodes = len(b.fx.nodes)
        if low and index != skip:
            weight = b.call(aten._to_copy.default, weight, dtype=torch.bfloat16)
            value = b.call(aten._to_copy.default, value, dtype=torch.bfloat16)
            value = b.call(aten.mm.default, value, weight)
            value = b.call(aten._to_copy.default, value, dtype=torch.float32)
        else:
            value = b.call(aten.mm.default, value, weight)
        for node in list(b.fx.nodes)[nodes:]:
            path = f"layers.{index}"
            node.meta["nn_module_stack"] = {path: (path, "")}
    return b.build({output(): value})


def test_repeated_layers_are_one_entry():
    difference = diff_graphs(_stack(12, low=False), _stack(12, low=True))
    assert (
        difference.render(60)
        == """\
36 added, 12 retyped, 1 rewired

layers.0..11  (12 modules)
  + 12 x cast bf16 -> f32 added
  + 24 x cast f32 -> bf16 added
  ~ 12 x aten.mm.default f32 -> bf16 retyped
      + %_to_copy = aten._to_copy.default(%param_layers_0_w…
      + %_to_copy_1 = aten._to_copy.default(%input_x, dtype…
      - %mm = aten.mm.default(%input_x, %param_layers_0_wei…
      + %mm = aten.mm.default(%_to_copy_1, %_to_copy) : bf1…
      + %_to_copy_2 = aten._to_copy.default(%mm, dtype=f32)…

(root)
  ~ 1 x output 0 rewired
      - output "0" = %mm_11
      + output "0" = %_to_copy_35"""
    )


def test_a_layer_that_differs_is_left_out():
    difference = diff_graphs(_stack(5, low=False), _stack(5, low=True, skip=2))
    assert [family.path for family in difference.families] == ["layers.0..1,3..4", "layers.2", ""]


def test_the_root_has_a_title_and_backward_is_named():
    b = Builder()
    x, g = b.input(Role.INPUT, "x", (2,)), b.input(Role.TANGENT, "0", (2,))
    y = b.call(aten.sin.default, x)
    before = b.build({output(): y, grad("x"): g})
    after = before.copy()
    after.output.args = ([after.outputs[0], _negated(after)],)
    lines = diff_graphs(before, after).render().split("\n")
    assert lines[:5] == [
        "1 added, 1 rewired",
        "",
        "(root)",
        "  + 1 x aten.neg.default added in backward",
        "  ~ 1 x grad x rewired in backward",
    ]


def _negated(graph: Graph) -> torch.fx.Node:
    source = graph.outputs[1]
    with graph.fx.inserting_before(graph.output):
        node = graph.fx.call_function(aten.neg.default, (source,))
    node.meta.update(source.meta)
    return node


def test_as_json():
    data = json.loads(diff_texts(TEXT, changed(("@lin\n  %gv", "@other\n  %gv"))).to_json())
    assert data == {
        "headline": "1 changed",
        "changes": [
            {
                "kind": "changed",
                "what": "aten.mm.default",
                "module": "other",
                "phase": "backward",
                "before": "%gw = aten.mm.default(%gt, %tanh) : f32[4,8] @lin",
                "after": "%gw = aten.mm.default(%gt, %tanh) : f32[4,8] @other",
            }
        ],
        "moved": 0,
    }


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ({}, []),
        ({"": 1}, [("", 1)]),
        ({"a.0": 1, "a.1": 1, "a.2": 1}, [("a.0..2", 3)]),
        ({"a.0": 1, "a.1": 2, "a.2": 1}, [("a.0,2", 2), ("a.1", 1)]),
        ({"a.0.b": 1, "a.0.c": 1, "a.1.b": 1, "a.1.c": 1}, [("a.0..1.b", 2), ("a.0..1.c", 2)]),
        ({f"a.{i}.{j}": 1 for i in range(2) for j in range(3)}, [("a.0..1.0..2", 6)]),
        ({"a.0": 1, "a.1": 1, "b.0": 1}, [("a.0..1", 2), ("b.0", 1)]),
        ({"a.10": 1, "a.9": 1, "a.2": 1}, [("a.2,9..10", 3)]),
        ({"a.0": 1, "a": 1, "a.0.0": 1}, [("a.0", 1), ("a", 1), ("a.0.0", 1)]),
    ],
)
def test_modules_are_put_together(modules, expected):
    families = collapse(modules)
    assert [(family.path, len(family.modules)) for family in families] == expected


def test_members_of_a_family_are_in_order_of_their_numbers():
    assert collapse({"a.10": 1, "a.2": 1}) == (Family("a.2,10", ("a.2", "a.10")),)
