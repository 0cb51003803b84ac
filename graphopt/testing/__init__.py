"""The kit that lets any pass author prove a pass: generated graphs, oracles, a check, a corpus.

Needs the ``testing`` extra (hypothesis); some corpus models need the ``corpus`` extra.
"""

from graphopt.testing.inputs import inputs_for
from graphopt.testing.comparison import assert_same, relative_error
from graphopt.testing.oracles import run_graph, run_graph_fp64
from graphopt.testing.strategies import (
    Program,
    Step,
    build,
    inference_graphs,
    joint_graphs,
    programs,
)

__all__ = [
    "Program",
    "Step",
    "assert_same",
    "build",
    "inference_graphs",
    "inputs_for",
    "joint_graphs",
    "programs",
    "relative_error",
    "run_graph",
    "run_graph_fp64",
]
