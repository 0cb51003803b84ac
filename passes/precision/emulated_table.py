"""Which products run in an emulated format: the figures for tables; nothing is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import fx

from graphopt.analysis.cost import Costs, tensor_bytes
from graphopt.graph import module_of, operator_name, phase_of, value_of
from graphopt.passbase import Declined, Row
from graphopt.passes.precision.formats import Format


def product_rows(
    format: Format, products: Sequence[fx.Node], against: Mapping[fx.Node, Declined], costs: Costs
) -> tuple[Row, ...]:
    """A row for each product, lowered or not, in graph order; to be made before the rewrite."""
    lowered = set(products)
    rows: list[Row] = []
    for node in (n for n in costs.by_node if n in lowered or n in against):
        price, refusal = costs.by_node[node], against.get(node)
        rows.append(
            {
                "site": node.name,
                "module": module_of(node),
                "operator": operator_name(node),
                "phase": str(phase_of(node)),
                "kind": "allow",
                "float32_us": None,
                "low_us": None,
                "flops": price.flops,
                "bytes": price.bytes,
                "bound": None,
                "error": None,
                "change": None,
                "format": format.name if node in lowered else "float32",
                "reason": refusal.reason if refusal else "",
                "detail": refusal.detail if refusal else "",
            }
        )
    return tuple(rows)


def totals_row(
    format: Format, rows: Sequence[Row], quantised: Sequence[fx.Node], costs: Costs, saved: Row
) -> Row:
    """What all products and quantisers come to.

    Args:
        format: of the products.
        rows: of `product_rows`.
        quantised: tensors that are quantised, each as often as it is.
        costs: of the graph in float32.
        saved: bytes saved for backward, ``before`` and ``after``.
    """
    low = [int(row["flops"] or 0) for row in rows if row["format"] == format.name]
    flops = sum(price.flops for price in costs.by_node.values())
    return {
        "format": format.name,
        "operators": len(rows),
        "lowered": len(low),
        "flops": flops,
        "flops_lowered": sum(low) / flops if flops else 0.0,
        "casts": len(quantised),
        "cast_bytes": sum(
            tensor_bytes(value) * (4 + format.dtype.itemsize) // 4
            for value in map(value_of, quantised)
        ),
        "saved_before": saved["before"],
        "saved_after": saved["after"],
        "float32_us": None,
        "chosen_us": None,
        "change": None,
        "budget": None,
        "times": "none",
    }
