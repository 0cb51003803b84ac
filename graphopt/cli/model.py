"""The argument M: from ``path.py:factory`` to a model and the inputs of one call of it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graphopt.errors import ArgumentError, CaptureError

SEED = 0
"""Seeds the factory, so that parameters and inputs are the same in every run."""

_RETURNS = "return (model, example_inputs), with a tuple, a dict or (tuple, dict) of inputs"

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Example:
    """A model and one call of it.

    Attributes:
        name: what the user called it, without folders.
        model: the model.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        more: arguments of further calls, where the factory gave several.
    """

    name: str
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    more: tuple[Call, ...] = ()

    @property
    def batches(self) -> list[Call]:
        """The arguments of all calls."""
        return [(self.args, self.kwargs), *self.more]


def load_example(name: str) -> Example:
    """Run the factory that `name` points at.

    Raises:
        ArgumentError: there is no such file, module or factory, it fails, or it returns something
            else than a model and example inputs.
    """
    place, colon, attribute = name.rpartition(":")
    if not colon or not attribute or not place:
        raise ArgumentError(
            f"{name!r} names no factory",
            hint=f"write {(place or name).removesuffix(':')}:FACTORY, where FACTORY() returns "
            "(model, example_inputs)",
        )
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    factory = _factory(module, attribute, place)
    _check_factory(factory, name)
    torch.manual_seed(SEED)
    with _blaming(f"{name}: the factory raised"):
        returned = factory()
    model, ((args, kwargs), *more) = _unpack(returned, name)
    for call in ((args, kwargs), *more):
        _check_call(model, *call, name)
    label = Path(place).stem if place.endswith(".py") else place.rpartition(".")[2]
    return Example(f"{label}:{attribute}", model, args, kwargs, tuple(more))


def near(name: str, names: Sequence[str]) -> str:
    """The names most like `name` as a phrase; all names where none is like it."""
    own = sorted(set(names))
    close = difflib.get_close_matches(name, own, n=5, cutoff=0.5)
    return ", ".join(close or own[:10])


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        hint = f"files there: {near(path.name, siblings)}" if siblings else ""
        raise ArgumentError(f"there is no file {str(path)!r}", hint=hint)
    _find_imports_in(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their own module up by name while it loads.
    sys.modules[path.stem] = module
    with _blaming(f"importing {path.name} failed"):
        spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    _find_imports_in(Path())
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        hint = f"a file is written {name}.py:FACTORY" if Path(f"{name}.py").is_file() else ""
        raise ArgumentError(
            f"there is no module {name!r}",
            hint=hint or "run graphopt from the folder that holds it, or install it",
        )
    with _blaming(f"importing {name} failed"):
        return importlib.import_module(name)


def _find_imports_in(folder: Path) -> None:
    """What ``python file.py`` does: imports beside the file work."""
    place = str(folder.resolve())
    if place not in sys.path:
        sys.path.insert(0, place)


def _factory(module: ModuleType, attribute: str, place: str) -> Callable[[], object]:
    factory: Callable[[], object] | None = getattr(module, attribute, None)
    if not callable(factory):
        own = [
            name
            for name, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        hint = f"near names: {near(attribute, own)}" if own else "it defines no function"
        raise ArgumentError(f"{place} has no factory {attribute!r}", hint=hint)
    return factory


def _check_factory(factory: Callable[[], object], name: str) -> None:
    """Whether it can be called without arguments."""
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ArgumentError(
            f"{name}: a factory is called without arguments, and this one is {error}",
            hint="write one without parameters that calls it",
        ) from error
    except ValueError:  # some built-in functions have no signature
        return


def _unpack(returned: object, name: str) -> tuple[nn.Module, list[Call]]:
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ArgumentError(f"{name} returned {_kind(returned)}", hint=_RETURNS)
    model, inputs = returned
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"{name} returned {_kind(model)} instead of a module", hint=_RETURNS)
    batches = inputs if isinstance(inputs, list) and inputs else [inputs]
    return model, [_call(batch, name) for batch in batches]


def _call(inputs: object, name: str) -> Call:
    match inputs:
        case dict():
            return (), inputs
        case tuple() as args, dict() as kwargs:
            return args, kwargs
        case tuple():
            return inputs, {}
    raise ArgumentError(f"{name} returned {_kind(inputs)} as example inputs", hint=_RETURNS)


def _check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """Whether forward takes these arguments."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentError(
            f"{name}: forward of {type(model).__name__} cannot be called with the example inputs: "
            f"{error}",
            hint=_RETURNS,
        ) from error


def _kind(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{size}"


@contextmanager
def blaming_inputs(example: Example) -> Iterator[None]:
    """Where a capture fails within, find out whether the model's calls fail without graphopt, too.

    Raises:
        ArgumentError: one does, so that the example inputs are to blame.
    """
    try:
        yield
    except CaptureError:
        kind = type(example.model).__name__
        for number, (args, kwargs) in enumerate(example.batches):
            which = f" {number + 1}" if example.more else ""
            with _blaming(
                f"{example.name}: forward of {kind} raised with the example inputs{which}, in "
                "PyTorch eager, too",
                hint="let the factory return inputs with which model(*inputs) works",
            ):
                example.model(*args, **kwargs)
        raise


@contextmanager
def _blaming(message: str, hint: str = "") -> Iterator[None]:
    """Turn any error of the user's code into an `ArgumentError` that points at its line."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit):
            hint = "put what runs a script behind if __name__ == '__main__'"
        said = traceback.format_exception_only(error)[-1].strip()
        raise ArgumentError(f"{message}: {said}", where=_line_of(error), hint=hint) from error


_BETWEEN = ("/torch/", "importlib", "/argparse.py", str(Path(__file__).parent))
"""Parts of the names of files whose lines say nothing to a user."""


def _line_of(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in _BETWEEN)]
    last = (own or list(frames))[-1]
    return f"{last.filename}:{last.lineno}: {last.line}"
