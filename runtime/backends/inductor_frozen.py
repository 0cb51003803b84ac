"""Inference through Inductor with weights that are kept in the layouts of their kernels.

Inductor takes a reordered weight as a constant only. So the packed form of a graph holds such
tensors itself, and when a weight changes, the prologue's new values go into the same tensors: no
code is generated again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.backends.strides import restore, results_of
from graphopt.runtime.engine.step import Executable
from graphopt.runtime.frozen.contest import Contest
from graphopt.runtime.frozen.fusions import fuse
from graphopt.runtime.frozen.packing import pack
from graphopt.runtime.frozen.products import add_biases_apart, is_product_node
from graphopt.runtime.frozen.prologue import Hoisted, hoist
from graphopt.runtime.frozen.sites import (
    Linear,
    convolution_is_faster,
    linear_is_faster,
    linears,
)
from graphopt.runtime.frozen.unchanged import WhileUnchanged

aten = torch.ops.aten

Prepare = Callable[[fx.GraphModule], fx.GraphModule]
"""Decomposes a module; its inputs stay what they are."""

Finish = Callable[[fx.GraphModule, Sequence[int]], Executable]
"""Compiles a decomposed module, given the positions of the kept values among its inputs."""


def frozen_inference(module: fx.GraphModule, prepare: Prepare, finish: Finish) -> Executable:
    """The fastest executable of an inference module with frozen values; see `Contest`."""
    makers = {
        "plain": lambda: _plain(module, prepare, finish),
        "tuned": lambda: _tuned(module, prepare, finish),
        "packed": lambda: _packed(module, prepare, finish, _Measured()),
        "packed throughout": lambda: _packed(module, prepare, finish, _Throughout()),
    }
    return Contest(makers, module.graph, "inductor", unmeasured="packed")


def _plain(module: fx.GraphModule, prepare: Prepare, finish: Finish) -> Executable:
    return _passed(hoist(module), prepare, finish)


def _tuned(module: fx.GraphModule, prepare: Prepare, finish: Finish) -> Executable | None:
    """With Inductor's search for kernels; it has one for products only."""
    from torch._inductor import config

    if not any(is_product_node(node) for node in module.graph.nodes):
        return None
    hoisted = hoist(module)
    add_biases_apart(hoisted.main.graph)
    with config.patch(max_autotune=True):
        return _passed(hoisted, prepare, finish)


def _passed(hoisted: Hoisted, prepare: Prepare, finish: Finish) -> Executable:
    """Kept values are inputs."""
    hoisted.prune()
    kept = range(hoisted.inputs, hoisted.inputs + len(hoisted.kept))
    main = finish(prepare(hoisted.main), kept)
    return WhileUnchanged(boxed(hoisted.prologue), main, hoisted.sources) if kept else main


class _Measured:
    """The layers whose packed kernel is faster."""

    def convolution(self, arguments: tuple[Any, ...]) -> bool:
        """Whether to pack a fused convolution with these arguments."""
        return _is_possible(arguments) and convolution_is_faster(arguments, is_compiled=True)

    def linear(self, linear: Linear) -> bool:
        """Whether to pack a product with a weight."""
        return linear_is_faster(linear)

    def is_of_its_own(self) -> bool:
        """Whether another selection may be the same."""
        return True


class _Throughout(_Measured):
    """All layers: what is around a kernel can make up for it."""

    def __init__(self) -> None:
        self._is_other = False

    def convolution(self, arguments: tuple[Any, ...]) -> bool:
        """See `_Measured`."""
        is_possible = _is_possible(arguments)
        self._is_other |= is_possible and not super().convolution(arguments)
        return is_possible

    def linear(self, linear: Linear) -> bool:
        """See `_Measured`."""
        self._is_other |= not super().linear(linear)
        return True

    def is_of_its_own(self) -> bool:
        """See `_Measured`."""
        return self._is_other


def _packed(
    module: fx.GraphModule, prepare: Prepare, finish: Finish, choose: _Measured
) -> Executable | None:
    from torch._inductor import config

    hoisted = hoist(module)
    fuse(hoisted.main.graph, hoisted.kept, choose.convolution)
    add_biases_apart(hoisted.main.graph)
    hoisted.main = prepare(hoisted.main)
    recorded = results_of(hoisted.main)
    products = filter(choose.linear, linears(hoisted.main.graph, hoisted.kept))
    packed = pack(hoisted, list(products), sums=False)
    if not packed.weights or not choose.is_of_its_own():
        return None
    hoisted.put_last(packed.weights)
    hoisted.prune()
    constants = _hold(hoisted, [node for node in packed.weights if node.users])
    if not restore(hoisted.main, recorded):
        return None
    kept = range(hoisted.inputs, hoisted.inputs + len(hoisted.kept))
    with config.patch(conv_1x1_as_mm=True):
        main = finish(hoisted.main, kept)
    return WhileUnchanged(boxed(hoisted.prologue), main, hoisted.sources, constants)


def _is_possible(arguments: tuple[Any, ...]) -> bool:
    x = arguments[0].meta["val"]
    # Inductor takes the result of the kernel for contiguous where there is one channel.
    is_static = all(isinstance(n, int) for n in x.shape)
    return is_static or not statically_known_true(x.shape[1] == 1)


def _hold(hoisted: Hoisted, weights: Sequence[fx.Node]) -> list[Tensor]:
    """Make attributes of the inputs for these values, which are the last ones of the prologue."""
    given = [node.meta["val"] for node in hoisted.prologue.graph.find_nodes(op="placeholder")]
    zeros = [
        torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device=v.device).zero_()
        for v in given
    ]
    with torch.no_grad():
        values = list(boxed(hoisted.prologue)(zeros))
    main = hoisted.main
    constants = values[len(values) - len(weights) :]
    last = hoisted.kept[-len(weights) :]
    for index, (node, constant) in enumerate(zip(last, constants, strict=True)):
        # A tensor of its own: a kept value may be the weight itself.
        constant = constant.detach() if constant.is_mkldnn else constant.detach().clone()
        constants[index] = constant
        # The mark says to Inductor's caches that the numbers do not matter.
        cast("Any", constant)._is_frozen_param = True
        name = f"_packed_{index}"
        setattr(main, name, constant)
        with main.graph.inserting_before(node):
            attribute = main.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        main.graph.erase_node(node)
    cast("Any", main)._has_frozen_params = True
    return constants
