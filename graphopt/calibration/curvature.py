"""Diagonals of the loss's curvature at every value of a forward run.

With ``J`` the Jacobian of the outputs with respect to a value and ``H`` the Hessian of the loss
with respect to the outputs, the curvature is taken as ``Jᵀ H J`` (Gauss and Newton). Its diagonal
is estimated by Hutchinson's method: with random signs ``r``, ``E[(Jᵀ r) ∘ (Jᵀ H r)]``. Where the
model computes its loss itself there is no ``H``, and the empirical Fisher matrix stands for it; of
weights it is, as in K-FAC, made of the operands of the weight's gradient: ``n Σ g² (a²)ᵀ`` over the
rows ``a`` of layer inputs and ``g`` of output gradients, which where both vary little is the
product of the traces of the two Kronecker factors.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor, fx

from graphopt.calibration.forward import Recorded, is_float32

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.mm.default, aten.addmm.default, aten.convolution.default})

Values = Sequence[Tensor]


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of a tensor's shape."""
    bits = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * bits - 1).to(like)


def of_outputs(
    outputs: Values, values: Values, samples: int, probes: int, generator: torch.Generator
) -> list[Tensor]:
    """For half the squared change of the outputs per example: ``H`` is the identity over n."""
    total = _zeros(values)
    for _ in range(probes):
        tangents = [signs(output, generator) for output in outputs]
        _add(total, (g.square() for g in _gradients(outputs, values, tangents)))
    return [t / (probes * samples) for t in total]


def of_loss(
    gradients: Values,
    outputs: Values,
    values: Values,
    probes: int,
    generator: torch.Generator,
) -> list[Tensor]:
    """For a loss whose `gradients` with respect to the outputs can be differentiated again."""
    total = _zeros(values)
    for _ in range(probes):
        random = [signs(output, generator) for output in outputs]
        product = sum((g * r).sum() for g, r in zip(gradients, random, strict=True))
        curved = _filled(
            torch.autograd.grad(product, outputs, retain_graph=True, allow_unused=True),  # type: ignore[arg-type]
            outputs,
        )
        left = _gradients(outputs, values, random)
        right = _gradients(outputs, values, curved)
        _add(total, (a * b for a, b in zip(left, right, strict=True)))
    return [t / probes for t in total]


def of_fisher(outputs: Values, tangents: Values, values: Values, samples: int) -> list[Tensor]:
    """``n g²``: of single examples' losses where each element belongs to one example."""
    return [samples * g.square() for g in _gradients(outputs, values, tangents)]


def fisher_of_weights(
    run: Recorded,
    outputs: Values,
    tangents: Values,
    samples: int,
    root: Callable[[fx.Node], fx.Node],
    parameters: Container[fx.Node],
) -> Iterator[tuple[fx.Node, fx.Node, Tensor]]:
    """``n Σ g² (a²)ᵀ`` of every weight in a product, as ``(operand, product, diagonal)``.

    Positions of one example, as in convolutions, are taken as independent.

    Args:
        run: the forward.
        outputs: of the loss.
        tangents: one per output.
        samples: examples in the batch.
        root: of a node the value that it shows through views.
        parameters: the inputs that are weights.
    """
    products = [n for n in run.results if n.target in _PRODUCTS and not n.kwargs]
    results = [run.results[n][0] for n in products]
    found = _gradients(outputs, results, tangents)
    for node, gradient in zip(products, found, strict=True):
        operands = {a: run.reads[a, node] for a in node.all_input_nodes if (a, node) in run.reads}
        weights = {
            a: tensor.detach().requires_grad_()
            for a, tensor in operands.items()
            if root(a) in parameters
        }
        if not weights or len(weights) == len(operands):
            continue
        squared = {a: t.detach().square() for a, t in operands.items()} | weights
        args = fx.map_arg(node.args, squared.__getitem__)
        result = node.target(*args)  # type: ignore[operator]
        diagonals = torch.autograd.grad(result, list(weights.values()), gradient.square())
        for operand, diagonal in zip(weights, diagonals, strict=True):
            yield operand, node, samples * diagonal


def _gradients(outputs: Values, values: Values, tangents: Values) -> list[Tensor]:
    """Of every value; zeros where none arrives."""
    wanted = [v for v in values if v.requires_grad]
    found = iter(
        torch.autograd.grad(outputs, wanted, tangents, retain_graph=True, allow_unused=True)
        if wanted
        else ()
    )
    given = [next(found) if v.requires_grad else None for v in values]
    return _filled(given, values)


def _filled(gradients: Sequence[Tensor | None], like: Values) -> list[Tensor]:
    return [
        torch.zeros_like(v) if g is None else g.detach()
        for g, v in zip(gradients, like, strict=True)
    ]


def _zeros(values: Values) -> list[Tensor]:
    return [torch.zeros_like(v, requires_grad=False) for v in values]


def _add(total: list[Tensor], more: Iterator[Tensor]) -> None:
    for sum_, value in zip(total, more, strict=True):
        sum_ += value


def differentiable(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs that a loss can be differentiated through."""
    return [t for t in outputs if is_float32(t) and t.requires_grad]
