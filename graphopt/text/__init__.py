"""`.gopt`: a graph as text that people read, golden tests hold and the parser reads back.

::

    gopt 1 joint torch 2.13

    forward inputs
      %weight = param "weight" : f32[4,8]
      %x = input "0" : f32[2,8]
    backward inputs
      %tangent_0 = tangent "0" : f32[2,4]

    forward
      %t = aten.t.default(%weight) : f32[8,4]{1,8} @lin
      %mm = aten.mm.default(%x, %t) : f32[2,4] @lin !must_save:0

    backward
      …

    forward outputs
      output "0" = %mm
    backward outputs
      grad "weight" = %t_2

    end

One value a line: name, operator, arguments, type, then what else is known. Types show strides only
where they are not those of a new tensor (``{1,8}``) and the device only where it is not the CPU
(``f32[2] cuda:0``). ``@`` gives the module, ``!`` the recompute policy and region of activation
checkpointing, ``#`` starts a comment. A constant is ``const "name" : i64[2] = [0, 1]``, without
elements if it is large; a sub-graph of a higher-order operator stands in braces where it is first
used.

Not in the text: the side table of annotations, stack traces, autograd's sequence numbers, classes
of modules.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graphopt.graph import Graph
from graphopt.text.build import build_graph
from graphopt.text.header import FORMAT_VERSION
from graphopt.text.lift import lift_graph
from graphopt.text.made_sizes import Known, nothing_known
from graphopt.text.reader import read_program
from graphopt.text.source import Source
from graphopt.text.writer import write_program

__all__ = ["FORMAT_VERSION", "parse_graph", "print_graph"]


def print_graph(graph: Graph, *, sources: bool = False) -> str:
    """The text of a graph.

    Args:
        graph: any graph whose nodes carry fake values and call registered operators; at the level
            ``forward`` also functions of torch and methods of tensors.
        sources: end each line with the user's source line, as a comment.

    Raises:
        TextError: a node cannot be written; names it.
    """
    return write_program(lift_graph(graph, sources=sources))


def parse_graph(
    text: str,
    constants: Mapping[str, Tensor] | None = None,
    *,
    typed: bool = False,
    known: Known = nothing_known,
) -> Graph:
    """The graph that a text says: the inverse of `print_graph`.

    Every node gets its fake value, by running its operator on fake tensors from the types of the
    inputs; the result must have the type that is written.

    Args:
        text: a complete text.
        constants: the tensors that the text holds by reference, by qualified name (those of
            ``dict(graph.module.named_buffers())``); names that the text does not use are ignored.
        typed: take the types that are written for those of the results, and run no operator; for a
            text that `print_graph` has written on this torch.
        known: told torch's shape environment and its symbols by the names of the text before
            anything is made of them, to state there what holds for them beyond their ranges.

    Raises:
        TextError: the text cannot be read, or says something that is not so; shows the line.
    """
    source = Source(text)
    return build_graph(read_program(source), source, constants or {}, typed=typed, known=known)
