"""Saved weights and saved factors, one from the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graphopt.errors import ArgumentError, StateError
from graphopt.model.parametrize import Replaced, named_parameters
from graphopt.structured import StructuredWeight, form_of_shapes
from graphopt.structured.weight import relative_error

_FOLDER = "parametrizations"


class _Structured(NamedTuple):
    """One weight in factors, with the names that it and its factors have in a `state_dict`."""

    name: str
    keys: tuple[str, ...]
    by: StructuredWeight
    module: nn.Module


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` that the model would have with weights in the place of their factors.

    Each weight is the product of its factors as the model computes it, so a plain model that loads
    this computes the same. Copies; a model without factors gives a copy of its `state_dict`.
    """
    state = {k: v.detach().clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    for found in _structured(model):
        factors = [state.pop(key) for key in found.keys]
        with torch.no_grad():
            state[found.name] = found.by(*factors)
    return state


def load_dense_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], *, tolerance: float | None = None
) -> dict[str, float]:
    """Load weights into a model that has factors: each gets those nearest to it in its form.

    Parameters stay the same objects, so an optimizer made of them goes on.

    Args:
        model: a model in which optimize has replaced weights.
        state: what `dense_state_dict` or a plain model's `state_dict` gives.
        tolerance: the largest relative error of a weight, in the Frobenius norm; by default the one
            of the pass. ``float("inf")`` takes any.

    Returns:
        The error by name of the weight.

    Raises:
        StateError: a weight is missing, has another shape, or its error is beyond the tolerance;
            nothing was loaded.
    """
    rest, errors = dict(state), {}
    for found in _structured(model):
        weight = rest.pop(found.name, None)
        form = found.by.form
        if weight is None or tuple(weight.shape) != (form.rows, form.cols):
            here = "no such weight" if weight is None else f"shape {tuple(weight.shape)}"
            raise StateError(
                f"{found.name!r} is {form.rows} x {form.cols} here, and the state has {here}",
                hint="give the state_dict of a plain model of this class",
            )
        if not weight.isfinite().all():
            raise StateError(f"{found.name!r} is not finite in the state, so it has no factors")
        factors = form.factors(weight)
        errors[found.name] = relative_error(form, factors, weight)
        allowed = found.by.tolerance if tolerance is None else tolerance
        if errors[found.name] > allowed * 1.01:
            raise StateError(
                f"{found.name!r} is off by {errors[found.name]:.2g} in the form {form}, and "
                f"{allowed:g} is allowed",
                hint="load it into a plain model and optimize that, so that forms are chosen anew; "
                "or give a larger tolerance",
            )
        rest.update(zip(found.keys, factors, strict=True))
    try:
        _check_keys(model, rest)
        model.load_state_dict(rest)
    except RuntimeError as error:
        raise StateError(str(error), hint="give the state_dict of this model's class") from error
    return errors


def restructure(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Give a plain model the factors that a saved `state_dict` has, so that it can be loaded.

    Values are still those of the model. `optimize` with ``low_rank`` then keeps these forms.

    Returns:
        The weights that are in factors now.

    Raises:
        StateError: factors in the state belong to no weight of the model, or are of no form; the
            model is as it was.
    """
    made: dict[str, nn.Module] = {}
    parameters = named_parameters(model)
    for name, keys in _factors_in(state).items():
        weight = parameters.get(name)
        shapes = [tuple(state[key].shape) for key in keys]
        form = None
        if weight is not None and weight.dim() == 2:
            form = form_of_shapes(weight.shape[0], weight.shape[1], shapes)
        if form is None:
            raise StateError(
                f"the state has factors of {name!r} with shapes {shapes}, which fit no weight here",
                hint="give a plain model of the class that was saved",
            )
        made[name] = StructuredWeight(form, 1.0)
    Replaced(model, made).settle()
    return tuple(made)


def _structured(model: nn.Module) -> Iterator[_Structured]:
    for path, module in model.named_modules():
        inside = module._modules.get(_FOLDER)
        for tensor, entry in inside.named_children() if inside is not None else ():
            by = next(entry.children(), None)
            if not isinstance(by, StructuredWeight):
                continue
            prefix = f"{path}." if path else ""
            count = len(by.form.shapes)
            keys = (f"{prefix}{_FOLDER}.{tensor}.original{i}" for i in range(count))
            yield _Structured(prefix + tensor, tuple(keys), by, module)


def _factors_in(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of factors in a saved state, in order, by the name of their weight."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"restructure needs a state_dict, and got a {type(state).__name__}")
    found: dict[str, dict[int, str]] = {}
    for key in state:
        path, _, rest = key.rpartition(f"{_FOLDER}.")
        tensor, _, number = rest.rpartition(".original")
        if rest != key and tensor and number.isdecimal():
            found.setdefault(path + tensor, {})[int(number)] = key
    return {name: [keys[i] for i in sorted(keys)] for name, keys in found.items()}


def _check_keys(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    wrong = sorted(own.keys() ^ state.keys())
    if wrong:
        which = "has not" if wrong[0] in own else "has"
        raise StateError(f"the state {which} {wrong[0]!r}, unlike the model")
    for key, value in own.items():
        if state[key].shape != value.shape:
            raise StateError(
                f"{key!r} has shape {tuple(state[key].shape)} in the state and "
                f"{tuple(value.shape)} in the model"
            )
