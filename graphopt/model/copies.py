"""Stand-ins for tensors: equal values, memory of their own only once something writes to them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@dataclass(frozen=True)
class StandIn:
    """What takes a tensor's place.

    Attributes:
        value: what is used instead.
        leaf: where its gradient arrives; `value` itself, or what `value` was made from.
        made: storage of the leaf and versions of both, when they were made.
    """

    value: Tensor
    leaf: Tensor
    made: tuple[object, int, int]

    @property
    def written(self) -> bool:
        """Whether anything has changed the values since."""
        return (_storage(self.leaf), self.leaf._version, self.value._version) != self.made


class StandIns:
    """One stand-in per tensor object; tensors that share memory have ones that share memory."""

    def __init__(self) -> None:
        self._made: dict[int, StandIn] = {}
        self._originals: list[Tensor] = []  # alive, so that no identity is taken twice

    def make(self, tensors: Iterable[Tensor]) -> None:
        """Stand-ins for those that have none, or whose one was written to."""
        together: dict[object, list[Tensor]] = {}
        for tensor in tensors:
            if is_lazy(tensor):
                continue  # a lazy parameter has no values yet
            # What has no storage shares it with nothing.
            together.setdefault(_storage(tensor) or id(tensor), []).append(tensor)
        with torch.inference_mode(False), torch.no_grad():
            for group in together.values():
                made = [self._made.get(id(t)) for t in group]
                if all(m is not None and not m.written for m in made):
                    continue
                copies = [copy_of(group[0])] if len(group) == 1 else _copies(group)
                for tensor, copy in zip(group, copies, strict=True):
                    self._originals.append(tensor)
                    self._made[id(tensor)] = _stand_in(tensor, copy)

    def of(self, tensor: Tensor) -> StandIn | None:
        """The stand-in of a tensor; ``None`` if it has none."""
        return self._made.get(id(tensor))


def _storage(tensor: Tensor) -> object:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse, opaque
        return None


def copy_of(tensor: Tensor) -> Tensor:
    """A copy that shares memory until one side is written, where torch can do that."""
    detached = tensor.detach()
    if type(detached) in (Tensor, nn.Parameter) and not (detached.is_conj() or detached.is_neg()):
        try:
            return torch._lazy_clone(detached)
        except (NotImplementedError, RuntimeError):
            pass  # sparse, nested; shared between processes; memory that NumPy owns
    return detached.clone()


def _copies(group: list[Tensor]) -> list[Tensor]:
    """Copies of tensors that share one storage, which share one, too."""
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_conj() or t.is_neg() for t in group):
        return [copy_of(tensor) for tensor in group]
    whole = torch.empty(0, dtype=torch.uint8, device=group[0].device)
    whole.set_(group[0].untyped_storage())
    storage = copy_of(whole).untyped_storage()
    copies = []
    for tensor in group:
        part = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        place = tensor.storage_offset(), tensor.size(), tensor.stride()
        copies.append(part.set_(storage, *place))
    return copies


def _stand_in(tensor: Tensor, copy: Tensor) -> StandIn:
    """Make a copy look like the tensor: its class, its attributes, its place in autograd."""
    if isinstance(tensor, nn.Parameter) and type(copy) is Tensor:
        copy = torch.Tensor._make_subclass(type(tensor), copy)
    for name, value in vars(tensor).items():
        vars(copy).setdefault(name, value)
    value = copy
    if tensor.requires_grad:
        copy.requires_grad_()
        if tensor.grad_fn is not None:
            # In eager the forward may change it in place; a leaf it may not.
            with torch.enable_grad():
                value = _alike(copy)
    return StandIn(value, copy, (_storage(copy), copy._version, value._version))


def _alike(tensor: Tensor) -> Tensor:
    """A clone with the tensor's strides, which generated code relies on."""
    clone = tensor.clone()
    if clone.is_sparse or clone.is_nested or clone.stride() == tensor.stride():
        return clone
    if any(
        stride == 0 < size - 1 for size, stride in zip(tensor.size(), tensor.stride(), strict=True)
    ):
        return tensor.view_as(tensor)  # expanded: nothing may write to it
    empty = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return empty.copy_(tensor)
