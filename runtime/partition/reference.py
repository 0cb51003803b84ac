"""What a step in stages stands for: the whole graph in one process, operator by operator.

It shares nothing with the stages: neither halves nor what is saved between them, neither sums over
micro-batches nor a backend's code. Random numbers are those that the stages have drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.plan import Plan, Role
from graphopt.runtime.engine.lone_tangents import may_lack
from graphopt.runtime.engine.tangents import Expected

# Where the random numbers of each stage begin, for one micro-batch.
Streams = dict[int, Tensor]


class Reference:
    """One joint graph.

    Args:
        module: the graph.
        plan: names its inputs and outputs.
        stage_of: the stage of its operators by name.

    Attributes:
        draws: whether the forward draws random numbers.
        draws_late: whether the backward does, where no stage says from which on.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, stage_of: Mapping[str, int]) -> None:
        self._module, self._plan, self._stage_of = module, plan, stage_of
        nodes = [n for n in module.graph.nodes if n.op not in ("placeholder", "output")]
        placeholders = module.graph.find_nodes(op="placeholder")
        slots = plan.signature.inputs
        self._given = list(zip(placeholders, slots, strict=True))
        late = {node for node, slot in self._given if slot.role is Role.TANGENT}
        for node in nodes:
            if not late.isdisjoint(node.all_input_nodes):
                late.add(node)
        self._early = [n for n in nodes if n not in late]
        self._late = [n for n in nodes if n in late]
        self.draws = any(map(_draws, self._early))
        self.draws_late = any(map(_draws, self._late))
        returned: Any = module.graph.output_node().args[0]
        self._returned = list(zip(plan.signature.outputs, returned, strict=True))

    def forward(self, values: Sequence[Any], streams: Streams) -> Running:
        """Run what needs no tangents.

        Args:
            values: of the inputs, tangents not counted. Buffers are copied.
            streams: of all stages, where the graph draws; they are moved on.
        """
        running = Running(fx.Interpreter(self._module, garbage_collect_values=False), streams)
        env, rest = running.run.env, iter(values)
        env.clear()
        for node, slot in self._given:
            if slot.role is Role.TANGENT:
                continue
            value = next(rest)
            copies = slot.role in (Role.BUFFER, Role.STATE) and isinstance(value, Tensor)
            env[node] = value.clone() if copies else value
        with torch.no_grad(), torch._C._DisableAutocast():
            for node in self._early:
                self._step(running, node)
        running.outputs = self._of(env, Role.OUTPUT)
        return running

    def backward(
        self, running: Running, tangents: Mapping[str, Tensor | None]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gradients by name, and what buffers have become.

        Args:
            running: what `forward` has given.
            tangents: of the outputs, by name.
        """
        env = running.run.env
        with torch.no_grad(), torch._C._DisableAutocast():
            for node, slot in self._given:
                if slot.role is Role.TANGENT:
                    env[node] = _laid(node, tangents.get(slot.name), running.outputs[slot.name])
            for node in self._late:
                env[node] = running.run.run_node(node)
        return self._of(env, Role.GRAD), self._of(env, Role.MUTATION)

    def _step(self, running: Running, node: fx.Node) -> None:
        stage = self._stage_of.get(node.name, 0)
        if not _draws(node) or stage not in running.streams:
            running.run.env[node] = running.run.run_node(node)
            return
        value: Tensor = (
            node.meta["val"][0] if isinstance(node.meta["val"], tuple) else node.meta["val"]
        )
        set_stream(value.device, running.streams[stage])
        running.run.env[node] = running.run.run_node(node)
        running.streams[stage] = stream_of(value.device)

    def _of(self, env: Mapping[fx.Node, Any], role: Role) -> dict[str, Any]:
        found = {s.name: node for s, node in self._returned if s.role is role}
        return {
            name: env[node] if isinstance(node, fx.Node) else node
            for name, node in found.items()
            if node is not None
        }


class Running:
    """One micro-batch between forward and backward.

    Attributes:
        run: has all values.
        streams: of the stages.
        outputs: of the model, by name.
    """

    def __init__(self, run: fx.Interpreter, streams: Streams) -> None:
        self.run, self.streams = run, dict(streams)
        self.outputs: dict[str, Any] = {}


def stream_of(device: torch.device) -> Tensor:
    """Where the random numbers of a device go on."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_stream(device: torch.device, state: Tensor) -> None:
    """Let them go on there."""
    setter: Callable[..., None] = torch.set_rng_state
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        setter(state)


def _draws(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags


def _laid(node: fx.Node, tangent: Tensor | None, output: Tensor) -> Tensor | None:
    """A tangent as the backward was traced for it."""
    if tangent is None and may_lack(node):
        return None
    expected = Expected.of(node.meta["val"])
    return expected.at((output.shape, output.stride())).coerce(tangent)
