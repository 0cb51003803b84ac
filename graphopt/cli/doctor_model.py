"""`graphopt doctor M`: whether a model can be captured, and else which parts of it can."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from graphopt.cli.console import phase

if TYPE_CHECKING:
    from graphopt.model.parts import Part

SECONDS = 120.0
"""For the search for parts; whoever asks wants to know."""


@dataclass(frozen=True)
class Finding:
    """What became of the capture of a model.

    Attributes:
        model: its name.
        state: ``"ok"`` or ``"failed"``.
        detail: what was captured, or why not.
        where: the user's line.
        hint: one thing to try.
        parts: the largest submodules that can be captured, where the model cannot.
    """

    model: str
    state: str
    detail: str
    where: str = ""
    hint: str = ""
    parts: tuple[Part, ...] = ()

    def to_json(self) -> dict[str, object]:
        """As the command answers it."""
        parts = [asdict(part) | {"optimize": part.expression} for part in self.parts]
        return {**asdict(self), "parts": parts}

    def lines(self) -> list[str]:
        """For people."""
        if self.state == "ok":
            return [f"{self.model}: {self.detail}"]
        said = [f"{self.model}: {self.detail}"]
        said += [f"  at: {self.where}"] if self.where else []
        said += [f"  try: {self.hint}"] if self.hint else []
        said += [f"  {part}" for part in self.parts]
        none = "  no submodule of more than one layer can be captured alone"
        return said if self.parts else [*said, none]


def finding(name: str, *, no_grad: bool) -> Finding:
    """Capture the call that the argument M names.

    Raises:
        ArgumentError: `name` leads to no model.
    """
    with phase("importing torch's compiler"):
        from graphopt.capture import capture
        from graphopt.cli.model import blaming_inputs, load_example
        from graphopt.cli.subject import mode
        from graphopt.errors import CaptureError
        from graphopt.model.parts import largest_parts
    with phase(f"making {name}"):
        example = load_example(name)
    with mode(example, no_grad=no_grad):
        try:
            with phase(f"capturing {example.name}"), blaming_inputs(example):
                captured = capture(example.model, example.args, example.kwargs)
        except CaptureError as error:
            with phase("looking for parts that can be captured"):
                parts = largest_parts(
                    example.model,
                    type(example.model).forward,
                    example.args,
                    example.kwargs,
                    nullcontext,
                    SECONDS,
                )
            return Finding(example.name, "failed", error.message, error.where, error.hint, parts)
    operators = sum(1 for _ in captured.graph.operators)
    said = f"captured as one graph of {operators} operators in {captured.seconds:.1f} s"
    return Finding(example.name, "ok", said)
