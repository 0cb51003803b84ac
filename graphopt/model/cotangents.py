"""The backward of a trial: random cotangents that nobody holds longer than autograd needs them.

Cotangents are made by a node of autograd, which gives them away. A user's backward begins at a
loss, and what the model returns beside it has no cotangent there: as large ones as logits would be
memory that no step needs. So beside a number, one random row stands for all rows of an output. It
is expanded wherever it is only added to another gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.model.results import Results

Make = Callable[[], Tensor]


def cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    """A random cotangent of an output; its mean is not 0, as sums are common losses."""
    return _random(output.shape, output, generator)


def cotangent_of(index: int, output: Tensor, *, beside_number: bool) -> Tensor:
    """The cotangent of the output with this index among those that are differentiable.

    Args:
        index: as counted.
        output: only its form is read.
        beside_number: whether one of the outputs is a number; then it may be expanded.
    """
    rows = beside_number and output.dim() > 1
    shape = output.shape[-1:] if rows else output.shape
    made = _random(shape, output, torch.Generator().manual_seed(index))
    return made.expand(output.shape) if rows else made


def has_number(outputs: Iterable[Tensor]) -> bool:
    """Whether one of the differentiable outputs is a number, as a loss is."""
    return any(output.dim() == 0 for output in outputs)


def _random(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    # Wherever the default device is, the generator is on the CPU.
    made = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    return made.to(like.device, like.dtype).add_(1)


class Backward:
    """The backward of one call, from all outputs to all sources.

    Args:
        outputs: of the call; not held.
        sources: what receives a gradient, by name.
    """

    def __init__(self, outputs: Sequence[Tensor], sources: Mapping[str, Tensor]) -> None:
        self._sources = sources
        ends = [t for t in outputs if t.requires_grad]
        if not sources or not torch.is_grad_enabled():
            ends = []
        self._only = _only_reaches(ends, list(sources.values()))
        number, reached = has_number(ends), _reached(ends)
        made = [_maker(i, t, number, i in reached) for i, t in enumerate(ends)]
        self._root: Tensor | None = None
        if ends:
            self._root = _Cotangents.apply(made, *ends)  # type: ignore[no-untyped-call]

    def __call__(self, results: Results, *, at_once: bool) -> bool:
        """Run it, outside of autocast like a user's; gradients are results.

        Args:
            results: takes the gradients up.
            at_once: each where it appears, and then nobody holds it.

        Returns:
            Whether all of them are whole: one that arrives in parts cannot be taken up at once.
        """
        if self._root is None:
            return True
        with torch._C._DisableAutocast():
            if not self._only:
                found = torch.autograd.grad(
                    self._root, list(self._sources.values()), allow_unused=True
                )
                for name, gradient in zip(self._sources, found, strict=True):
                    results[f"gradient of {name}"] = gradient
                return True
            # Unlike `autograd.grad` it allows a forward to run a backward of its own in backward.
            taken: Counter[str] = Counter()
            handles = list(self._taking(results, taken)) if at_once else []
            try:
                self._root.backward()  # type: ignore[no-untyped-call]
            finally:
                for handle in handles:
                    handle.remove()
        for name, leaf in self._sources.items():
            if name not in taken:
                results[f"gradient of {name}"] = leaf.grad
            leaf.grad = None
        return all(times == 1 for times in taken.values())

    def _taking(self, results: Results, taken: Counter[str]) -> Iterator[Any]:
        def take(name: str) -> Callable[[Tensor], None]:
            def hook(leaf: Tensor) -> None:
                taken[name] += 1
                results[f"gradient of {name}"] = leaf.grad
                leaf.grad = None

            return hook

        for name, leaf in self._sources.items():
            yield leaf.register_post_accumulate_grad_hook(take(name))  # type: ignore[no-untyped-call]


class _Cotangents(torch.autograd.Function):
    """Its backward makes the cotangents of its inputs."""

    @staticmethod
    def forward(ctx: Any, made: Sequence[Make], *ends: Tensor) -> Tensor:
        ctx.made = made
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        return None, *(make() for make in ctx.made)


def _maker(index: int, output: Tensor, number: bool, only_added: bool) -> Make:
    """Makes a cotangent; does not hold the output."""
    form = torch.empty((), dtype=output.dtype, device=output.device).expand(output.shape)

    def make() -> Tensor:
        made = cotangent_of(index, form, beside_number=number)
        return made if only_added else made.contiguous()

    return make


def _only_reaches(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether no other leaf would get a gradient."""
    own = {id(leaf) for leaf in leaves}
    if any(t.grad_fn is None and id(t) not in own for t in outputs):
        return False
    leaf = (getattr(node, "variable", None) for node in _nodes([t.grad_fn for t in outputs]))
    return all(one is None or id(one) in own for one in leaf)


def _reached(outputs: Sequence[Tensor]) -> set[int]:
    """Outputs whose cotangent is added to the gradient that comes from another output."""
    at = [(t.grad_fn, t.output_nr) for t in outputs]
    arriving: Counter[Any] = Counter(at)
    for node in _nodes([node for node, _ in at]):
        arriving.update(edge for edge in node.next_functions if edge[0] is not None)
    return {
        i
        for i, (node, number) in enumerate(at)
        if node is not None
        # The first edge is that of its own cotangent.
        and (arriving[node, number] > 1 or _takes_any_strides(node))
    }


def _takes_any_strides(node: Any) -> bool:
    """Whether it is the node of a captured step."""
    return getattr(getattr(node, "_forward_cls", None), "takes_any_strides", False)


def _nodes(begin: Sequence[Any]) -> Iterator[Any]:
    """All nodes of autograd that can be reached."""
    queue, seen = list(begin), set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        queue.extend(parent for parent, _ in node.next_functions)
