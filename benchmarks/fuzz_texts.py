"""Damaged texts of graphs: changed golden files, and calls of operators with random arguments."""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

import graphopt
from graphopt.errors import GraphoptError

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TAKEN, WRONG = "taken", "wrong"
Try = Callable[[random.Random], str]


def texts() -> Try:
    """Golden files with some tokens changed, and calls of any operator of ATen."""
    seeds = [file.read_text() for file in sorted(GOLDEN.glob("*.gopt"))]
    seeds = [re.split(r"(\W)", seed) for seed in seeds if len(seed) < 6000]
    names = sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::"))

    def text(rng: random.Random) -> str:
        if rng.random() < 0.5:
            return call(rng, rng.choice(names))
        tokens = list(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 2, 4])):
            extra = [
                "",
                "0",
                "-1",
                "f32",
                "%",
                '"',
                "(" * 50,
                "}",
                "\n",
                "9" * 400,
                "\ud800",
                "None",
            ]
            tokens[rng.randrange(len(tokens))] = rng.choice([*extra, *rng.choice(seeds)])
        return "".join(tokens)

    def attempt(rng: random.Random) -> str:
        read = graphopt.parse_graph(text(rng))
        again = graphopt.print_graph(read)
        return TAKEN if graphopt.print_graph(graphopt.parse_graph(again)) == again else WRONG

    before = torch.get_rng_state()

    def checked(rng: random.Random) -> str:
        try:
            return attempt(rng)
        finally:
            assert torch.equal(before, torch.get_rng_state()), "the random stream has changed"

    return checked


_INPUTS = """gopt 1 inference torch 2.13
forward inputs
  %x = input "0" : f32[2,3]
  %i = input "1" : i64[2]
  %b = input "2" : bool[2,3]
  %y = input "3" : f32[1,4,5,5]
forward
  %o = """
_WORDS = (
    "%x %x %x %y %i %b 0 1 2 -1 3 9223372036854775807 0.5 nan inf True False None [] [1] [1,1] "
    "[2,2] [%x] [%x,%i] [0] [-1] [1,2,3] f32 i64 cpu cuda:0 strided sparse_coo channels_last "
    'contiguous_format "mean" "" (1,) {"a":1} complex(1,2) aten.mm.default slice(1,2,3) Ellipsis'
)
_ARGUMENTS = tuple(_WORDS.split())


def call(rng: random.Random, name: str) -> str:
    """A text that calls an operator with random arguments."""
    full = name.replace("::", ".")
    full = full if full.count(".") > 1 else f"{full}.default"
    namespace, operator, overload = full.split(".", 2)
    schema = getattr(getattr(getattr(torch.ops, namespace), operator), overload)._schema
    arguments = []
    for argument in schema.arguments:
        if argument.has_default_value() and rng.random() < 0.5:
            if argument.kwarg_only:
                continue
            break
        value = _of_type(rng, str(argument.real_type), argument.N or 0)
        arguments.append(f"{argument.name}={value}" if argument.kwarg_only else value)
    call = f"{full}({', '.join(arguments)}) : f32[2,3]"
    return f'{_INPUTS}{call}\nforward outputs\n  output "0" = %o\nend\n'


def _of_type(rng: random.Random, kind: str, length: int) -> str:
    if rng.random() < 0.15:
        return rng.choice(_ARGUMENTS)
    number = rng.choice(["0", "1", "2", "-1", "3", "7", "4611686018427387904"])
    if kind.startswith("List[Tensor") or "List[Optional[Tensor" in kind:
        return rng.choice(["[%x, %x]", "[%x]", "[]", "[%i, %y]"])
    if "Tensor" in kind:
        return rng.choice(["%x", "%x", "%y", "%i", "%b"])
    if "List" in kind:
        count = length if length > 1 else rng.choice([0, 1, 2, 2, 3, 4])
        return f"[{', '.join(rng.choice(['0', '1', '2', '-1', number]) for _ in range(count))}]"
    if "ool" in kind:
        return rng.choice(["True", "False"])
    if "float" in kind or "number" in kind:
        return rng.choice(["0.5", "1", "-1.0", "nan", "inf"])
    if "str" in kind:
        return rng.choice(['"mean"', '""', '"sum"', '"linear"', '"ij,jk->ik"'])
    return number


def operators() -> Try:
    """Each operator that a text may call, with random arguments; what can be read is run, too.

    `graphopt run` and `graphopt verify` have to end with an answer or with one of our errors.
    """
    from typer.testing import CliRunner

    from graphopt.cli.main import app
    from graphopt.text.operators import is_allowed

    names = []
    for name in sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")):
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if is_allowed(getattr(getattr(torch.ops.aten, packet), overload or "default")):
            names.append(name)
    folder, runner = Path(tempfile.mkdtemp()), CliRunner()
    before = torch.get_rng_state()

    def attempt(rng: random.Random) -> str:
        text = call(rng, rng.choice(names))
        try:
            graphopt.parse_graph(text)
        finally:
            assert torch.equal(before, torch.get_rng_state()), "the random stream has changed"
        file = folder / "read.gopt"
        file.write_text(text)
        for command in ("run", "verify"):
            done = runner.invoke(app, [command, str(file), "-p", "cleanup"])
            torch.set_rng_state(before)
            raised = done.exception
            if raised is not None and not isinstance(raised, (SystemExit, GraphoptError)):
                raise raised
        return TAKEN

    return attempt
