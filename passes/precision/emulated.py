"""Products whose operands are rounded to a format that the device does not compute in.

Each operand of a lowered product is quantised along its contracted axis, read back as float32, and
multiplied there. Between the halves of the step the quantised values are saved in place of the
float32 ones where nothing else of the backward reads those.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt.analysis.cost import cost
from graphopt.analysis.liveness import liveness
from graphopt.graph import KEPT_META, Graph, operator_name, phase_of, value_of
from graphopt.ops.scaled_mm import has_scaled_mm
from graphopt.passbase import Applied, Declined, Outcome
from graphopt.passes.precision.emulated_table import product_rows, totals_row
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.operands import (
    PRODUCTS,
    Operand,
    Quantised,
    find_operands,
    reason_against,
)
from graphopt.passes.precision.problem import computes_float32, leading_aside
from graphopt.passes.precision.recipes import Recipe
from graphopt.passes.precision.rules import Kind, kinds, packet_of
from graphopt.rewrite import arguments, emit

aten = torch.ops.aten

_SCALED_MM = torch.ops.graphopt.scaled_mm.default


def apply_emulated(
    graph: Graph, format: Format, recipe: Recipe, kept: frozenset[fx.Node]
) -> Outcome:
    """Lower every product that can be, but those of `kept`.

    There is nothing to gain in time where the format is emulated, so no times are asked for.
    """
    products, against = find_products(graph, format, recipe, kept)
    declined = tuple(against.values())
    if reason := _lacking(products, format):
        return Outcome(declined=(*declined, Declined("graph", "not-on-this-device", reason)))
    if not products:
        detail = "there is no product whose operands can be rounded"
        return Outcome(declined=(*declined, Declined("graph", "nothing-to-lower", detail)))
    names = [(node.name, operator_name(node)) for node in products]
    before, costs = graph.get(liveness).saved_bytes, graph.get(cost)
    rows = product_rows(format, products, against, costs)
    tensors = emulate(graph, recipe, products)
    after = graph.get(liveness).saved_bytes
    applied = [Applied(name, f"{target} runs in {format.name}") for name, target in names]
    numbers = {"quantisers": len(tensors), "products": len(products)}
    applied.append(Applied("operands", "quantised, once per tensor and axis", numbers))
    if before:
        wide = sum(tensor.wide for tensor in tensors)
        saved = {"before": before, "after": after, "tensors saved in float32": wide}
        applied.append(Applied("activations", "bytes saved for backward", saved))
    both = {"before": before, "after": after}
    totals = totals_row(format, rows, [t.base for t in tensors], costs, both)
    tables = {"operators": rows, "totals": (totals,)}
    return Outcome(tuple(applied), declined, tables=tables)


def find_products(
    graph: Graph, format: Format, recipe: Recipe, kept: frozenset[fx.Node]
) -> tuple[list[fx.Node], dict[fx.Node, Declined]]:
    """The products that can be lowered, and why others cannot."""
    aside = leading_aside(graph)
    products: list[fx.Node] = []
    against: dict[fx.Node, Declined] = {}
    for node, kind in kinds(graph, format).items():
        if kind is not Kind.ALLOW or node in aside or not computes_float32(node):
            continue
        code, words = reason_against(node, recipe)
        if node in kept:
            against[node] = Declined(node.name, "kept", "its module is kept in float32")
        elif code:
            against[node] = Declined(node.name, code, f"{operator_name(node)}: {words}")
        else:
            products.append(node)
    return products, against


def _lacking(products: Iterable[fx.Node], format: Format) -> str:
    """Why the format cannot be emulated where the products run; ``""`` where it can."""
    for device in dict.fromkeys(value_of(n.all_input_nodes[0]).device for n in products):
        try:
            torch.zeros(1, device=device).to(format.dtype).to(torch.float32)
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return f"{device} does not convert to {format.dtype}: {str(error).splitlines()[0]}"
    return ""


def emulate(graph: Graph, recipe: Recipe, products: Iterable[fx.Node]) -> list[Quantised]:
    """Round the operands of these products; returns what is quantised, in graph order."""
    found = find_operands(graph, recipe, products)
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    for tensor in found:
        _quantise(graph, recipe, tensor, order)
    parts = {(r.product, r.position): (q, r) for q in found for r in q.readers}
    for product in dict.fromkeys(product for product, _ in parts):
        if _has_scaled_mm(product, recipe):
            _multiply_scaled(graph, product, parts)
    read: dict[tuple[object, ...], fx.Node] = {}
    for (product, position), (tensor, operand) in parts.items():
        if not _is_erased(product):
            product.update_arg(position, _wide(graph, recipe, tensor, operand, read))
    _sweep(graph, parts.values())
    graph.changed()
    return found


# -- the rewrite -----------------------------------------------------------------------------------


def _quantise(
    graph: Graph, recipe: Recipe, tensor: Quantised, order: Mapping[fx.Node, int]
) -> None:
    """Right behind its tensor, or in front of its first reader where it is not of that half."""
    base = tensor.base
    first = min((r.product for r in tensor.readers), key=order.__getitem__)
    same_half = phase_of(base) is phase_of(first)
    near = base.op == "call_function" and (tensor.early or same_half)
    like = base if near else first
    place = graph.fx.inserting_after if near else graph.fx.inserting_before
    anchor = _last_part(base) if near else first
    with place(anchor):
        node = emit(graph, recipe.quantise, base, *tensor.arguments, like=like)
    with graph.fx.inserting_after(node):
        values = _item(graph, node, 0)
    with graph.fx.inserting_after(values):
        scales = _item(graph, node, 1)
    tensor.values = values, scales


def _last_part(node: fx.Node) -> fx.Node:
    """The node itself; of a result in parts the last of them, so that they stay together."""
    if node.target is not operator.getitem:
        return node
    parts = [u for u in node.all_input_nodes[0].users if u.target is operator.getitem]
    return max(parts, key=list(node.graph.nodes).index)


def _item(graph: Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.fx.call_function(operator.getitem, (node, index))
    item.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    item.meta["val"] = value_of(node)[index]
    return item


def _wide(
    graph: Graph,
    recipe: Recipe,
    tensor: Quantised,
    operand: Operand,
    read: dict[tuple[object, ...], fx.Node],
) -> fx.Node:
    """The operand read back as float32; once per half of the step."""
    assert tensor.values is not None
    half = phase_of(operand.product)
    key: tuple[object, ...] = (*tensor.values, half)

    def made(target: OpOverload, *args: object) -> Callable[[], fx.Node]:
        return lambda: emit(graph, target, *args, like=operand.product)

    def once(key: tuple[object, ...], make: Callable[[], fx.Node]) -> fx.Node:
        if key not in read:
            with graph.fx.inserting_before(operand.product):
                read[key] = make()
        return read[key]

    axis = (tensor.axis,) if recipe.reads_axis else ()
    node = once(key, made(recipe.dequantise, *tensor.values, *axis))
    for step in operand.steps:
        key = (*key, step.target, *map(str, step.args[1:]))
        node = once(key, made(step.target, node, *step.args[1:]))  # type: ignore[arg-type]
    return node


def _has_scaled_mm(product: fx.Node, recipe: Recipe) -> bool:
    name = packet_of(product)
    if recipe.scaled is None or name not in ("mm", "addmm"):
        return False
    given = arguments(product)
    plain = given.get("alpha", 1) == 1 and given.get("beta", 1) == 1
    return plain and has_scaled_mm(value_of(product).device, recipe.scaled)


def _multiply_scaled(
    graph: Graph,
    product: fx.Node,
    parts: Mapping[tuple[fx.Node, int], tuple[Quantised, Operand]],
) -> None:
    """Replace a product by the one that takes quantised operands."""
    factors: list[fx.Node] = []
    with graph.fx.inserting_before(product):
        for position, _ in PRODUCTS[packet_of(product)]:
            tensor, operand = parts[product, position]
            assert tensor.values is not None
            for node in tensor.values:
                for step in operand.steps if value_of(node).dim() else ():
                    target, rest = step.target, step.args[1:]
                    node = emit(graph, target, node, *rest, like=product)  # type: ignore[arg-type]
                factors.append(node)
        result = emit(graph, _SCALED_MM, *factors, like=product)
        if packet_of(product) == "addmm":
            result = emit(graph, aten.add.Tensor, result, product.args[0], like=product)
    product.replace_all_uses_with(result)
    graph.fx.erase_node(product)


def _is_erased(node: fx.Node) -> bool:
    return bool(node._erased)


def _sweep(graph: Graph, parts: Iterable[tuple[Quantised, Operand]]) -> None:
    """Erase transposes that nothing reads any more."""
    steps = dict.fromkeys(step for _, operand in parts for step in reversed(operand.steps))
    for step in steps:
        if not step.users and not _is_erased(step):
            graph.fx.erase_node(step)
