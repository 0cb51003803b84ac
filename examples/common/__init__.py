"""What the workloads share: command line, training loop, checkpoints, figures, results."""

from graphopt.examples.common.best import Best
from graphopt.examples.common.case import Case
from graphopt.examples.common.checks import check_count, check_labels, check_tensor
from graphopt.examples.common.errors import WorkloadError
from graphopt.examples.common.figure import COLOURS, GREY, panels
from graphopt.examples.common.results import Criterion
from graphopt.examples.common.run import Run
from graphopt.examples.common.workload import Workload

__all__ = [
    "COLOURS",
    "GREY",
    "Best",
    "Case",
    "Criterion",
    "Run",
    "Workload",
    "WorkloadError",
    "check_count",
    "check_labels",
    "check_tensor",
    "panels",
]
