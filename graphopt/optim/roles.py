"""What the parameters of a model are, read from its joint graph, and parameter groups by it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from graphopt.errors import ArgumentError

if TYPE_CHECKING:
    from graphopt.analysis.parameter_roles import ParameterRole


class ParameterRoles(Mapping[str, "ParameterRole"]):
    """The role of every parameter of a model, by name; prints as a table.

    Attributes:
        parameters: the parameters themselves, by name.
    """

    def __init__(
        self, roles: Mapping[str, ParameterRole], parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._roles = dict(roles)
        self.parameters = dict(parameters)

    def __getitem__(self, name: str) -> ParameterRole:
        return self._roles[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roles)

    def __len__(self) -> int:
        return len(self._roles)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "role", "as a matrix", "because")]
        for role in self.values():
            view, shape = role.matrix, " x ".join(str(n) for n in role.shape)
            matrix = ""
            if view is not None:
                several = f"{view.groups} of " if view.groups > 1 else ""
                matrix = f"{several}{view.rows} x {view.columns}"
            rows.append((role.name, shape, role.role, matrix, role.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([*map(str.ljust, row, widths), row[4]]).rstrip() for row in rows]
        count = Counter(role.role for role in self.values())
        total = ", ".join(f"{n} {role}" for role, n in count.most_common())
        return "\n".join([*lines, f"{len(self)} parameters: {total}"])


def parameter_roles(model: nn.Module, *args: Any, **kwargs: Any) -> ParameterRoles:
    """The role of every parameter, from the graph of one call.

    The call is captured, forward and backward, and not run: no value, gradient or random state of
    the model changes. Of a model that `graphopt.optimize` has captured already, that graph is
    taken; without a call, the one captured last. The mode is that of the model: whether it trains,
    and whether autocast is on.

    Args:
        model: any module that can be captured.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Returns:
        Roles by name, in the order of ``model.named_parameters()``. What gets no gradient in this
        call is ``"unused"``.

    Raises:
        CaptureError: the call cannot be captured as one graph.
        ArgumentError: it is no module, has lazy parameters, or none that this call trains.
    """
    from graphopt.analysis.parameter_roles import ParameterRole, find_roles
    from graphopt.capture import capture
    from graphopt.graph import Level
    from graphopt.model.surface import plain_forward

    parameters = _parameters(model)
    found = _known(model, args, kwargs)
    if found is None:
        if not args and not kwargs:
            _refuse_missing(model)
        with torch.enable_grad():
            graph = capture(model, args, kwargs, forward=plain_forward(model)).graph
        if graph.level is not Level.JOINT:
            raise ArgumentError(
                f"no parameter of {type(model).__name__} gets a gradient in this call",
                hint="let requires_grad be True for what is to be trained",
            )
        found = find_roles(graph)
    nothing = "the call does not use it"
    roles = {
        name: found.get(name) or ParameterRole(name, "unused", nothing, tuple(p.shape))
        for name, p in parameters.items()
    }
    return ParameterRoles(roles, parameters)


def roles_of(model: nn.Module | ParameterRoles, inputs: object) -> ParameterRoles:
    """Those given, or those of the call that `inputs` are of, as in ``optimize(model, inputs)``."""
    from graphopt.model.arguments import split_example_inputs

    for given in (model, inputs):
        if isinstance(given, ParameterRoles):
            return given
    args, kwargs = split_example_inputs(inputs) or ((), {})
    return parameter_roles(cast("nn.Module", model), *args, **kwargs)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(
            f"roles are those of an nn.Module, and this is a {type(model).__name__}",
            hint="pass the model, not its parameters",
        )
    parameters = dict(model.named_parameters())
    if lazy := next((n for n, p in parameters.items() if is_lazy(p)), None):
        raise ArgumentError(
            "a lazy module has no parameters before its first call",
            where=f"parameter {lazy!r}",
            hint="call the model once before",
        )
    return parameters


def _known(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, ParameterRole] | None:
    """What an optimized model knows from capturing this call, or any if none is given."""
    from graphopt.model.controller import controller_of

    controller = controller_of(model)
    for variant in controller.variants if controller else ():
        if variant.roles and (not (args or kwargs) or variant.holds(model, *args, **kwargs)):
            return variant.roles
    return None


def _refuse_missing(model: nn.Module) -> None:
    """A model of no inputs may be called so; others need an example."""
    import inspect

    from graphopt.model.surface import plain_forward

    wanted = [
        p.name
        for p in list(inspect.signature(plain_forward(model)).parameters.values())[1:]
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if wanted:
        raise ArgumentError(
            f"{type(model).__name__} is called with {wanted[0]!r}, and there is no example of it",
            hint="pass the arguments of one call: parameter_roles(model, batch)",
        )
