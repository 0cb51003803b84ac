"""What is done with a model: it is wrapped before, or called in a way that a method rules out."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

import graphopt
from graphopt.errors import ArgumentError
from tests.support.refusals.example import Example, Refusal, Small, Way, small, train


def by_ddp(model: nn.Module) -> nn.Module:
    """Wrapped in a job of one process, which ends here."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return DistributedDataParallel(model)
    finally:
        dist.destroy_process_group()


def by_compile(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def _wrapped(model: nn.Module) -> object:
    return train(DataParallel(model))


def doubled(s: Small, h: Tensor) -> Tensor:
    return h * 2


def _wrap(name: str, wrap: Callable[[nn.Module], nn.Module], words: str, hint: str) -> Example:
    return Example(
        name,
        small(doubled),
        words,
        hint=hint,
        step=lambda model: graphopt.optimize(wrap(model), backend="eager"),
        error=ArgumentError,
        plain=False,
        way=Way(small(doubled), _wrapped, same=False),
    )


WRAPPED = Refusal(
    "wrapped",
    "`optimize(DistributedDataParallel(m))`, also `DataParallel` and `torch.compile`",
    "the wrapper's forward is no step of a model",
    "optimize the model itself; wrap afterwards",
    (
        _wrap("DDP", by_ddp, "wrapped in DistributedDataParallel", "^optimize first"),
        _wrap("DataParallel", DataParallel, "wrapped in DataParallel", "^optimize first"),
        _wrap("compile", by_compile, r"wrapped by torch\.compile", "^optimize the model itself"),
    ),
)


def repairs(s: Small, h: Tensor) -> Tensor:
    if torch.isnan(h).any():
        h = h.nan_to_num(0.0)
    return h.tanh()


def _a_bad_batch(model: nn.Module) -> object:
    model(torch.randn(3, 4)).square().mean().backward()
    x = torch.randn(3, 4)
    x[0] = float("nan")
    return model(x).detach()


CHECKS = Refusal(
    "checks",
    "a call in which a check fails (`if isnan(h).any(): …`), with `kfac` or `group_gradients`",
    "such calls run plain, and the method has to see every step",
    '`passes="cleanup"`; leave bad batches out',
    (
        Example(
            "kfac",
            small(repairs),
            "not one that the graph was captured for",
            hint="need no runtime part",
            step=_a_bad_batch,
            options={"passes": "cleanup,kfac{damping=0.01}"},
            plain=False,
            way=Way(small(repairs), _a_bad_batch),
        ),
    ),
)

PLAIN = Refusal(
    "plain",
    "a training call that cannot be captured, in a job of several ranks",
    "run plain, it would leave gradients that are not reduced",
    'its own row above; or `passes="cleanup", fallback="eager"` in DistributedDataParallel',
    tested_by="tests/model/test_fallback.py::test_a_plain_training_call_never_leaves_gradients_unreduced",
)

SPARSE = Refusal(
    "sparse",
    "an embedding with `sparse=True`, in a job of several ranks with `group_gradients`",
    "sparse gradients have no place in a group",
    '`sparse=False`; `passes="cleanup"` in DistributedDataParallel',
    tested_by="tests/group_gradients/test_sparse.py::test_several_ranks",
)

EMPTY = Refusal(
    "empty",
    "`optimize(m)` where `m` has no parameters (a loss, an activation)",
    "there is no training step to optimize",
    "optimize the model that holds the parameters",
    tested_by="tests/model/test_bad_input.py::test_model_without_parameters",
)

NO_FORWARD = Refusal(
    "no forward",
    "`optimize(m)` where `m` has no forward (a `LightningModule` that calls its parts)",
    "there is no call to optimize",
    "optimize the network in it, as the error names it",
    tested_by="tests/model/test_unrun.py::test_a_model_without_forward_is_refused",
)

META = Refusal(
    "meta",
    "`optimize(m)` where parameters are on the meta device",
    "they have no values",
    "`m.to_empty(device=…)` and load weights before",
    tested_by="tests/model/test_bad_input.py::test_model_on_meta",
)

SCRIPT = Refusal(
    "script",
    "`torch.jit.script(m)` where `m`, or a module inside of it, is optimized",
    "a script is compiled from the source of forward, and there is none of the graph's",
    "`torch.export.export(m, inputs)`; or script a copy before `optimize`",
    tested_by="tests/model/test_tools.py::test_a_script_is_refused",
)

ALL = (WRAPPED, EMPTY, NO_FORWARD, META, SCRIPT, CHECKS, PLAIN, SPARSE)
