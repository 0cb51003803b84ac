"""A call of a model, and what of it is padded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_unflatten

from graphopt.data.collate import Pad, Side
from graphopt.errors import ArgumentError


class Call:
    """A call of a model, whose tensors can be exchanged by name."""

    def __init__(
        self, model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        self.model = model
        try:
            self._bound = inspect.signature(model.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ArgumentError(
                f"forward of {type(model).__name__} cannot be called with these arguments: {error}"
            ) from error
        kinds = self._bound.signature.parameters
        self._paths, self._tree = tree_flatten_with_path(dict(self._bound.arguments))
        self.names = []
        for path, _ in self._paths:
            keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            various = kinds[keys[0]].kind in (
                inspect.Parameter.VAR_KEYWORD,
                inspect.Parameter.VAR_POSITIONAL,
            )
            self.names.append(".".join(keys[1:] if various else keys))
        self.leaves = {
            name: leaf
            for name, (_, leaf) in zip(self.names, self._paths, strict=True)
            if isinstance(leaf, Tensor)
        }

    def __call__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> object:
        """Call `model` with these tensors in place of those of the same names."""
        pairs = zip(self.names, self._paths, strict=True)
        leaves = [tensors.get(name, leaf) for name, (_, leaf) in pairs]
        leaves = [t.detach().clone() if isinstance(t, Tensor) else t for t in leaves]
        self._bound.arguments.update(tree_unflatten(leaves, self._tree))
        return model(*self._bound.args, **self._bound.kwargs)


def found_pads(call: Call, side: Side) -> dict[str, Pad]:
    """What is padded, as the mask tells.

    Raises:
        ArgumentError: there is no mask.
    """
    masks = [n for n, t in call.leaves.items() if is_mask(n) and t.dim() == 2 and _is_binary(t)]
    if not masks:
        flat = [n for n, t in call.leaves.items() if t.dim() >= 2]
        example = f"{flat[0]}=1" if flat else "NAME=DIM"
        raise ArgumentError(
            "no argument of forward is a mask of shape (batch, length), so what is padded is not "
            f"known; its tensors are {', '.join(call.leaves) or 'none'}",
            hint=f"say what is padded, with --pad {example} on the command line, or pads= in "
            "Python; or have the factory pass the mask",
        )
    shape = call.leaves[masks[0]].shape
    found = {}
    for name, tensor in call.leaves.items():
        if tensor.shape[:2] != shape or not shape[1]:
            continue
        value: float = 0
        if name in masks:
            value = 1.0 - _true(name, tensor)
        elif name.rpartition(".")[2].startswith(("label", "target")):
            value = -100
        found[name] = Pad(value, dim=1, side=side)
    if not found:
        raise ArgumentError(
            "the mask has no positions", where=masks[0], hint="pass a batch that is not empty"
        )
    return found


def checked_pads(call: Call, pads: dict[str, Pad]) -> dict[str, Pad]:
    """The same, if it can be done.

    Raises:
        ArgumentError: see `graphopt.data.check_padding`.
    """
    if not pads:
        raise ArgumentError("pads is empty", hint='pass such as pads={"ids": Pad(0, dim=1)}')
    lengths: dict[int, str] = {}
    for name, pad in pads.items():
        if name not in call.leaves:
            raise ArgumentError(
                f"the call has no tensor {name!r}; it has {', '.join(call.leaves) or 'none'}",
                hint="name arguments of forward as its signature does",
            )
        tensor = call.leaves[name]
        pad.check(tensor.dtype, name)
        lengths.setdefault(pad.length(tensor, name), name)
    if len(lengths) > 1:
        (one, a), (two, b), *_ = lengths.items()
        raise ArgumentError(
            f"{a} has {one} positions and {b} has {two}",
            hint="name dimensions that are padded together, in a batch of one length",
        )
    if 0 in lengths:
        raise ArgumentError(f"{lengths[0]} has no positions", hint="pass a batch that is not empty")
    if len({pad.side for pad in pads.values()}) > 1:
        raise ArgumentError("pads are on two sides", hint="pass one side for all")
    return pads


def is_mask(name: str) -> bool:
    """Whether an argument of this name is taken for a mask."""
    return "mask" in name.rpartition(".")[2].lower()


def _is_binary(mask: Tensor) -> bool:
    return not mask.is_complex() and bool(((mask == 0) | (mask == 1)).all())


def _true(name: str, mask: Tensor) -> float:
    """What means a true position."""
    return 0.0 if "pad" in name.rpartition(".")[2].lower() else 1.0


def all_true(name: str, tensor: Tensor, pad: Pad) -> Tensor:
    """A mask that hides nothing; other tensors as they are."""
    if is_mask(name) and pad.value in (0, 1) and _is_binary(tensor):
        return torch.full_like(tensor, 1 - pad.value)
    return tensor
