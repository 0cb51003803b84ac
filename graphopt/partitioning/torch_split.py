"""Stages for ``torch.distributed.pipelining``, which otherwise has to be told where to cut.

torch's stages cannot train through a value that skips a stage. With relays there are no such
values, so that its schedules run whatever cuts are best.
"""

from __future__ import annotations

from torch import fx

from graphopt.analysis.gradient_order import Device
from graphopt.errors import ArgumentError
from graphopt.network.clusters import cluster
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.from_exported import ExportedProblem
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Link
from graphopt.partitioning.relays import STAGE, relayed
from graphopt.partitioning.result import Partition


class SplitPolicy:
    """A `split_policy` of ``torch.distributed.pipelining.pipeline``.

    Attributes:
        found: the stages of the last model that was split, with their certificate.
    """

    def __init__(
        self, stages: int, objective: Objective, device: Device | None, link: Link
    ) -> None:
        self.stages, self.objective, self.device, self.link = stages, objective, device, link
        self.found: Partition | None = None

    def __call__(self, module: fx.GraphModule) -> fx.GraphModule:
        """Cut what torch exported, in place.

        Raises:
            ArgumentError: there cannot be so many stages, or PyTorch cannot run it in stages.
        """
        exported = ExportedProblem(module, self.device, self.link)
        separate = len(atoms_of(exported.problem))
        if exported.tied and separate < self.stages <= len(exported.problem.operators):
            raise ArgumentError(
                f"the operators that share {', '.join(map(repr, exported.tied))} have to be in one "
                f"stage, since PyTorch does not add up the gradients of its copies; what can be "
                f"separated then is {separate} pieces for {self.stages} stages",
                where="stages",
                hint=f"ask for at most {separate}, or give each operator a parameter of its own",
            )
        self.found = plan(exported.problem, self.stages, self.objective)
        split_at(module, exported.stages(self.found.assignment))
        return module


def split_policy(
    stages: int,
    objective: Objective | None = None,
    *,
    device: Device | None = None,
    link: str = "10gbe",
) -> SplitPolicy:
    """The best stages, for ``pipeline(model, example, split_policy=split_policy(4))``.

    The example counts as one micro-batch. Times are the roofline of each operator and of its own
    backward. Operators that share a trained parameter are in one stage; views and what writes in
    place never straddle a cut.

    Args:
        stages: how many; none is empty.
        objective: what to minimise, and the limit of memory; by default the slowest stage.
        device: for the roofline; by default the assumed one of the kind that the model is on.
        link: a machine of `graphopt.network.clusters`, whose messages between ranks are assumed.
    """
    hop = cluster(link).hop(max(stages, 2))
    between = Link(hop.per_byte, hop.latency)
    return SplitPolicy(stages, objective or Objective(), device, between)


def split_at(module: fx.GraphModule, stage: dict[fx.Node, int]) -> None:
    """Put relays and torch's marks between stages into a graph.

    Args:
        module: what torch exported; it is changed.
        stage: of every function, as `graphopt.partitioning.relays.relayed` wants it.
    """
    import torch.distributed.pipelining  # has the operator that marks a cut

    graph = relayed(module.graph, stage)
    number = 0
    for node in list(graph.nodes):
        if node.meta.get(STAGE, number) > number:
            number = node.meta[STAGE]
            with graph.inserting_before(node):
                mark = graph.call_function(torch.ops.pippy._pipe_split.default)
            mark.meta["nn_module_stack"] = node.meta["nn_module_stack"]
    module.graph = graph
