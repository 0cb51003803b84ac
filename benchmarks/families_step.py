"""Two training steps of one model, by PyTorch eager and by graphopt, compared bit by bit.

The model is built anew for each, from the same seed. Compared are what it returns, the loss, all
gradients and buffers, and torch's random stream behind both steps. Plain SGD stands between the
steps, so that a second one shows whether the graph holds for it as well.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import graphopt
from benchmarks.zoo import Step
from graphopt.errors import GraphoptError, MismatchError
from graphopt.model.surface import report

Values = dict[str, Tensor]


def row(build: Callable[[], Step]) -> dict[str, Any]:
    """What became of one family: ``status``, and what belongs to it."""
    warnings.simplefilter("ignore")
    try:
        family = _made(build)
        start = time.process_time()
        wanted = _steps(family)
        eager = time.process_time() - start
        if not all(value.isfinite().all() for name, value in wanted.items() if "loss" in name):
            raise ValueError("the loss is not finite")
    except Exception as error:  # whatever a library raises
        return {"status": "fails in eager", "reason": _line(error), "traceback": _tail()}
    size = sum(p.numel() for p in family.model.parameters())
    found: dict[str, Any] = {
        "parameters": size,
        "gradients": sum(name.startswith("1 gradient") for name in wanted),
    }
    del family
    ours = _made(build)
    start = time.process_time()
    try:
        graphopt.optimize(ours.model, backend="eager")
        actual = _steps(ours)
    except MismatchError as error:
        return found | {"status": "different"} | _told(error)
    except GraphoptError as error:
        return found | {"status": "refused"} | _told(error)
    except Exception as error:
        return found | {"status": "crashed", "reason": _line(error), "traceback": _tail()}
    found["CPU seconds"] = {
        "two eager steps": round(eager, 2),
        "two steps with capture": round(time.process_time() - start, 2),
    }
    entries = report(ours.model).specialisations
    found["captures"] = len(entries)
    found["verified"] = [entry.verification.result for entry in entries]
    del ours
    worst, name = _worst(wanted, actual)
    if worst:
        itself, where = _worst(wanted, _steps(_made(build)))
        found["eager against eager"] = {"error": itself, "of": where}
    return found | {"status": _status(worst), "error": worst, "worst": name}


def _status(error: float) -> str:
    if error == 0:
        return "bit-equal"
    limits = {1e-6: "within 1e-6", 1e-5: "within 1e-5"}
    return next((words for limit, words in limits.items() if error <= limit), "different")


def _made(build: Callable[[], Step]) -> Step:
    torch.manual_seed(0)
    return build()


def _steps(family: Step) -> Values:
    """Everything that two steps leave, by name; tensors are copies."""
    values: Values = {}
    torch.manual_seed(1)
    for step in "12":
        family.model.zero_grad()
        output = family.model(*family.args, **family.kwargs)
        loss = family.loss(output)
        values[f"{step} loss"] = loss.detach().clone()
        values |= {f"{step} output {name}": value for name, value in _tensors(output)}
        loss.backward()
        with torch.no_grad():
            for name, parameter in family.model.named_parameters():
                if parameter.grad is not None:
                    values[f"{step} gradient {name}"] = parameter.grad.clone()
                    parameter -= 1e-3 * parameter.grad
        for name, buffer in family.model.named_buffers():
            values[f"{step} buffer {name}"] = buffer.detach().clone()
    values["random stream"] = torch.get_rng_state().double()
    return values


def _tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output by where they are in it, also within objects."""
    for path, value in pytree.tree_flatten_with_path(output)[0]:
        if isinstance(value, Tensor):
            yield pytree.keystr(path), value.detach().clone()
        elif hasattr(value, "__dict__"):
            for name, part in vars(value).items():
                if isinstance(part, Tensor):
                    yield f"{pytree.keystr(path)}.{name}", part.detach().clone()


def _worst(wanted: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest error relative to the largest magnitude of its tensor, and whose it is."""
    if missing := sorted(wanted.keys() ^ actual.keys()):
        return float("inf"), f"{missing[0]} is not there in both"
    errors = {name: _error(value, actual[name]) for name, value in wanted.items()}
    name = max(errors, key=errors.__getitem__)
    return errors[name], name if errors[name] else ""


def _error(wanted: Tensor, actual: Tensor) -> float:
    if wanted.shape != actual.shape or wanted.dtype != actual.dtype:
        return float("inf")
    if torch.equal(wanted, actual):
        return 0.0
    if not (wanted.is_floating_point() or wanted.is_complex()):
        return float("inf")
    differ = (wanted != actual) & ~(wanted.isnan() & actual.isnan())
    if not differ.any():
        return 0.0
    wide = torch.complex128 if wanted.is_complex() else torch.float64
    a, b = wanted.to(wide), actual.to(wide)
    error = float(((a - b).abs() * differ).max() / a[a.isfinite()].abs().max().clamp_min(1e-30))
    return float("inf") if error != error else error


def _told(error: GraphoptError) -> dict[str, str]:
    """What an error says, where, and what to try."""
    return {"reason": error.message, "where": _relative(error.where), "try": error.hint}


def _relative(text: str) -> str:
    """Paths from the folder on that packages are installed in."""
    return text.replace(f"{Path(torch.__file__).parents[1]}/", "")


def _line(error: BaseException) -> str:
    """Its class and its first line."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[0]}"


def _tail() -> list[str]:
    """The last frames of what was raised, by file name only."""
    lines = traceback.format_exc().splitlines()
    frames = [line.strip() for line in lines if line.lstrip().startswith("File ")][-6:]
    return [_relative(frame) for frame in frames]
