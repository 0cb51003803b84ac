"""Every exception graphopt raises, on one screen.

Each error is one sentence, the place it is about (a source line of the user's, an argument, a
node) and one thing to try. Its `code` is stable and can be searched for.
"""

from __future__ import annotations


class GraphoptError(Exception):
    """Base of all graphopt errors.

    Args:
        message: one sentence saying what is wrong.
        where: the user's source line, argument or node that it is about.
        hint: one thing to try.
    """

    code = "GO-000"

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        if self.where:
            lines.append(f"  at: {self.where}")
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class CaptureError(GraphoptError):
    """The model cannot be captured as one graph."""

    code = "GO-C01"


class ArgumentError(GraphoptError, ValueError):
    """An argument of a public function cannot be used."""

    code = "GO-A01"


class NotDefiniteError(ArgumentError):
    """A matrix that should be positive definite is not, within what truncation has left of it."""

    code = "GO-A02"


class SpecError(GraphoptError, ValueError):
    """A pass specification cannot be parsed, or names a pass or option that does not exist."""

    code = "GO-S01"


class PluginError(GraphoptError):
    """A pass of an installed package cannot be loaded, or has the name of another one."""

    code = "GO-S02"


class PipelineError(GraphoptError):
    """Passes are in an impossible order, or a pass broke its own contract."""

    code = "GO-P01"


class PlanError(GraphoptError):
    """A plan cannot be written as JSON, or read from it."""

    code = "GO-P02"


class InvariantError(GraphoptError):
    """A graph violates a named invariant of `graphopt.verify`."""

    code = "GO-V01"


class MismatchError(GraphoptError):
    """What would run does not compute what PyTorch eager computes.

    Args:
        message: one sentence saying what is wrong.
        where: what it is about.
        hint: one thing to try.
        guilty: who made the difference, as ``"pass cleanup"``, ``"backend inductor"``,
            ``"part kfac"`` (of the runtime) or ``"capture"``; empty where that is not known.
    """

    code = "GO-V02"

    def __init__(self, message: str, *, where: str = "", hint: str = "", guilty: str = "") -> None:
        super().__init__(message, where=where, hint=hint)
        self.guilty = guilty


class BackendMismatchError(MismatchError):
    """The graph is right, and the code that a backend made of it is not."""


class TextError(GraphoptError, ValueError):
    """A `.gopt` text cannot be read, or a graph cannot be written as one."""

    code = "GO-T01"


class DoubleBackwardError(GraphoptError):
    """A gradient of a captured step was asked to be differentiated again."""

    code = "GO-R01"


class BackendError(GraphoptError):
    """A backend cannot run on this machine."""

    code = "GO-R02"


class IntermediateGradientError(GraphoptError, RuntimeError):
    """The gradient of a value inside of a captured step was asked for."""

    code = "GO-R03"


class RankError(GraphoptError):
    """The ranks of a job differ, or one of them does not answer.

    Args:
        message: one sentence saying what is wrong.
        where: what it is about.
        hint: one thing to try.
        restart: whether the same job, started again, may go well: a rank was lost, where otherwise
            ranks differ in what they do.
    """

    code = "GO-D01"

    def __init__(
        self, message: str, *, where: str = "", hint: str = "", restart: bool = False
    ) -> None:
        said = "may help" if restart else "alone does not help"
        clause = f"a restart{' from the last checkpoint' if restart else ''} {said}"
        super().__init__(message, where=where, hint=f"{hint}; {clause}" if hint else clause)
        self.restart = restart


class StateError(GraphoptError):
    """A saved pass state does not belong to this model, or a part changes its own at any time."""

    code = "GO-L01"


class ServingError(GraphoptError):
    """A request to a served model has no answer."""

    code = "GO-Q01"


class RequestError(ServingError, ValueError):
    """A request does not have the form of those that are served."""

    code = "GO-Q02"


class QueueFullError(ServingError):
    """There is no room for a request, and its caller does not want to wait."""

    code = "GO-Q03"


class DeadlineError(ServingError, TimeoutError):
    """A request was not answered in time."""

    code = "GO-Q04"


class ClosedError(ServingError):
    """The dispatcher takes no requests any more."""

    code = "GO-Q05"


class IndefiniteError(GraphoptError, ArithmeticError):
    """A matrix has to be positive definite, and is not."""

    code = "GO-H01"


class ExtraError(GraphoptError, ModuleNotFoundError):
    """A package is not installed that comes with an extra.

    Args:
        message: one sentence saying what is wrong.
        hint: the line that installs it.
        package: the package, also as ``name``.
    """

    code = "GO-X01"

    def __init__(self, message: str, *, hint: str, package: str) -> None:
        super().__init__(message, hint=hint)
        self.name = package
