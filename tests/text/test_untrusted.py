"""Texts from anywhere: nothing but mathematics is called, and with arguments that it takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from graphopt.cli.main import app
from graphopt.errors import TextError
from graphopt.text import parse_graph

HEAD = """gopt 1 {level} torch 2.13
forward inputs
  %x = input "0" : f32[2,3]
  %i = input "1" : i64[2]
forward
"""
TAIL = '\nforward outputs\n  output "0" = %x\nend\n'


def _refused(line: str, level: str = "inference") -> TextError:
    with pytest.raises(TextError) as caught:
        parse_graph(HEAD.format(level=level) + f"  {line}" + TAIL)
    return caught.value


@pytest.mark.parametrize(
    "call",
    [
        "aten.manual_seed.default(5)",
        'aten.from_file.default("f", True, 4, dtype=f32)',
        "aten.random.from(%x, 0, 1)",
        "aten._foreach_copy.default([], [%i], True)",
        "aten.chalf.default(%i, memory_format=-1)",
        "aten.set_.default(%x)",
        "aten.quantize_per_tensor.default(%x, 0.1, 0, i64)",
        "aten.add.out(%x, %x, out=%x)",
        'print("{}", 3)',
        "quantized.add_relu.default(%x, %x, 1.0, 0)",
        '_c10d_functional.isend.default(%x, 1, 0, "g")',
    ],
)
def test_what_is_no_mathematics_is_not_called(call: str) -> None:
    before = torch.get_rng_state()
    name = call.split("(")[0]
    assert _refused(f"%y = {call} : f32[2,3]").message == f"a text may not call {name}"
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "call",
    [
        'builtins.eval("1")',
        'builtins.open("f")',
        'torch.load("f")',
        'torch.hub.load("a", "b")',
        'operator.methodcaller("x")',
        "Tensor.numpy(%x)",
        "Tensor.backward(%x)",
        'builtins.getattr(%x, "grad_fn")',
        'torch.nn.functional.os.system("true")',
        'torch.from_file("f")',
    ],
)
def test_a_forward_calls_no_python(call: str) -> None:
    said = _refused(f"%y = {call} : f32[2,3]", "forward").message
    name = call.split("(")[0]
    assert said in (f"a text may not call {name}", f"there is no operator {name}")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("aten.relu.default(%x, %x)", "it takes 1 arguments without a name, and there are 2"),
        ("aten.sum.default(%x, dtype=3)", "dtype should be "),
        (
            "aten.randint_like.default(%x, 1, layout=1, memory_format=-1)",
            "layout should be ",
        ),
        ("aten.clone.default(%x, memory_format=-1)", "memory_format should be "),
        ('aten.relu.default("x")', "self should be Tensor, and is str x"),
        ("aten.relu.default()", "the argument self is missing"),
        ("aten.relu.default(%x, other=1)", "it has no argument other"),
        (
            "aten.fractional_max_pool2d_backward.default(%x, %i, [1, 1], [], %x)",
            "output_size should have 2 entries, and has 0",
        ),
        ("aten.unbind.int(aten.mm.default)", "self should be Tensor, and is "),
    ],
)
def test_arguments_are_those_of_the_schema(call: str, said: str) -> None:
    message = _refused(f"%y = {call} : f32[2,3]").message
    assert message.startswith(f"{call.split('(')[0]} refuses these arguments: {said}")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('%y = const "c" : f32[2] = [' + "9" * 5000 + ", 1]", "this number is too large"),
        (f"%y = aten.sum.default({'(' * 2000}%x{')' * 2000}) : f32[]", "more than 32 brackets"),
        (f"%y = aten.relu.default(%x) : {'(' * 100}f32[]", "more than 32 brackets"),
        ("%y = aten.relu.default(%x) : f32[9**9**9]", "a power is 0 to 8"),
        (f"%y = aten.relu.default(%x) : f32[{'1+' * 3000}1]", "`1+1+"),
        ("%y = aten.relu.default(%x) : f32[2] cuda:99999999999999999999", "`cuda:9999"),
        ("%y = aten.relu.default(%x) : f32[2,3] @m !must_save:" + "1" * 5000, "`1111"),
        ('%y = const "\\ud800" : f32[2] = [1.0, 2.0]', "this string has a wrong escape"),
        ("\n".join('%g = graph "a" {' for _ in range(20)), "more than 16 sub-graphs"),
    ],
)
def test_deep_and_huge_things_are_errors(line: str, said: str) -> None:
    assert _refused(line).message.startswith(said)


def test_what_would_be_taken_into_too_many_pieces() -> None:
    text = HEAD.format(level="inference").replace("f32[2,3]", "f32[1000000000]")
    with pytest.raises(TextError, match="it would give 1000000000 tensors"):
        parse_graph(text + "  %y = aten.unbind.int(%x) : (f32[],)" + TAIL)


BODIES = {
    "a terabyte": (
        "%o = aten.full.default([250000000000], 1.0) : f32[250000000000]",
        "o would take 931 GiB",
    ),
    "a group": (
        '%a = _c10d_functional.all_reduce.default(%x, "sum", "nogroup") : f32[2,3]\n'
        "  %o = _c10d_functional.wait_tensor.default(%a) : f32[2,3]",
        "the graph cannot be run on made-up inputs: ",
    ),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_text_that_cannot_run_here_is_one_sentence(name: str, tmp_path: Path) -> None:
    body, said = BODIES[name]
    file = tmp_path / "text.gopt"
    file.write_text(HEAD.format(level="inference") + f"  {body}" + TAIL.replace("%x", "%o"))
    result = CliRunner().invoke(app, ["verify", str(file), "-p", "cleanup"])
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert CliRunner().invoke(app, ["run", str(file), "-p", "cleanup"]).exit_code in (0, 1)
