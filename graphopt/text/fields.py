"""Reads what follows the type of a value: constant elements, module path, recompute policy."""

from __future__ import annotations

from torch.utils.checkpoint import CheckpointPolicy

from graphopt.text.names import closest
from graphopt.text.operands import number
from graphopt.text.source import Line

_DIGITS = 9  # of the number of a checkpointed region


def read_module(line: Line) -> str:
    """``@layers.0.attn``, or ``""``."""
    if line.peek.kind != "module":
        return ""
    token = line.next()
    return line.unquote(token, 1) if token.text[1] == '"' else token.text[1:]


def read_recompute(line: Line) -> tuple[str, int | None]:
    """Policy and number of a checkpointed region, ``!must_save:0``, or nothing."""
    if not line.accept("!"):
        return "", None
    token = line.take("word", "a recompute policy")
    policy, _, region = token.text.partition(":")
    known = [p.name.lower() for p in CheckpointPolicy]
    if policy not in known:
        hint = closest(policy, known) or f"one of {', '.join(known)}"
        raise line.error(f"`{policy}` is not a recompute policy", hint, at=token)
    if len(region) > _DIGITS:
        raise line.error(f"`{region:.20}…` is no number of a region", at=token)
    return policy, int(region) if region else None


def read_values(line: Line) -> tuple[bool | int | float, ...] | bytes:
    """The elements of a small constant: ``[1.0, 2.0]`` or ``bytes "0000803f"``."""
    if line.accept("bytes"):
        token = line.peek
        try:
            return bytes.fromhex(line.string("bytes"))
        except ValueError as error:
            raise line.error(
                "bytes are written as pairs of hexadecimal digits", at=token
            ) from error
    line.expect("[")
    values: list[bool | int | float] = []
    while not line.accept("]"):
        token = line.next()
        if token.kind == "number":
            values.append(number(line, token))
        elif token.text in ("True", "False"):
            values.append(token.text == "True")
        else:
            raise line.error(f"expected a number but found {token}", at=token)
        if not line.accept(","):
            line.expect("]")
            break
    return tuple(values)
