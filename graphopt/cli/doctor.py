"""`graphopt doctor`: what this machine offers."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from typing import Annotated

import typer

from graphopt.cli.console import phase, show, show_json, show_text
from graphopt.cli.options import Json, NoGrad, OptionalModelName

_OK = "ok"


def doctor(
    model: OptionalModelName = None,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep",
            help="Also import what capture needs, and compile a small function with Inductor.",
        ),
    ] = False,
    no_grad: NoGrad = False,
    json: Json = False,
) -> None:
    """Say what this machine offers: PyTorch, devices, compilers, backends, collectives, threads.

    With M, say instead whether the model can be captured; where it cannot, on which line, and which
    of its submodules can, the largest first.

    Exits with 1 when graphopt cannot work here: an unsupported PyTorch, with --deep one that
    lacks what capture needs or an Inductor that fails, or a model that cannot be captured.

    JSON: checks, a list of {name, state, detail}, where state is "ok", "missing" (something
    optional is not there) or "failed" (a finding). With M: model, state, detail, where, hint, and
    parts, a list of {path, kind, share, of, optimize}.
    """
    if model is not None:
        _about_model(model, no_grad=no_grad, json=json)
        return
    with phase("importing torch"):
        checks = [_python(), _torch(), *_devices(), *_compilers(), *_collectives(), _threads()]
    if deep:
        with phase("importing torch's compiler"):
            checks.append(_capture())
        with phase("compiling with Inductor"):
            checks.append(_inductor())
    if json:
        entries = [dict(zip(("name", "state", "detail"), c, strict=True)) for c in checks]
        show_json("doctor", {"checks": entries})
    else:
        from rich.table import Table

        table = Table.grid(padding=(0, 2))
        colours = {_OK: "green", "missing": "yellow", "failed": "red"}
        for name, state, detail in checks:
            table.add_row(f"[{colours[state]}]{state}[/]", name, detail.replace("[", r"\["))
        show(table)
    if any(state == "failed" for _, state, _ in checks):
        raise typer.Exit(1)


def _about_model(model: str, *, no_grad: bool, json: bool) -> None:
    from graphopt.cli.doctor_model import finding

    found = finding(model, no_grad=no_grad)
    if json:
        show_json("doctor.model", found.to_json())
    else:
        show_text("\n".join(found.lines()))
    if found.state == "failed":
        raise typer.Exit(1)


Check = tuple[str, str, str]


def _python() -> Check:
    return "python", _OK, f"{platform.python_version()} on {platform.platform(terse=True)}"


def _torch() -> Check:
    import torch

    from graphopt.supported import WANTED, supports

    state = _OK if supports(torch.__version__) else "failed"
    return "torch", state, f"{torch.__version__} (graphopt needs {WANTED})"


def _capture() -> Check:
    try:
        import graphopt.capture  # noqa: F401
    except ImportError as error:
        return "capture", "failed", f"this torch lacks what capture needs: {error}"
    return "capture", _OK, "what it needs of torch is there"


def _devices() -> list[Check]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    checks = [("cpu", _OK, f"{os.cpu_count()} cores, {capability}")]
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        checks.append((f"cuda:{index}", _OK, f"{properties.name}, {memory:.0f} GiB"))
    if not count:
        checks.append(("cuda", "missing", "no GPU that PyTorch can use"))
    return checks


def _compilers() -> list[Check]:
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return [
        ("c++ compiler", _OK, compiler)
        if compiler
        else ("c++ compiler", "missing", "Inductor has no CPU code without it: install g++"),
        ("triton", _OK, triton)
        if triton
        else ("triton", "missing", "Inductor has no GPU code without it: graphopt[gpu]"),
    ]


def _collectives() -> list[Check]:
    import torch.distributed as dist

    if not dist.is_available():
        return [("collectives", "missing", "this PyTorch was built without torch.distributed")]
    offered = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
    }
    names = [name for name, there in offered.items() if there]
    return [("collectives", _OK if names else "missing", ", ".join(names) or "no backend")]


def _threads() -> Check:
    import torch

    within, between = torch.get_num_threads(), torch.get_num_interop_threads()
    return "threads", _OK, f"{within} within an operator, {between} between operators"


def _inductor() -> Check:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(0.0, 1.0, 64, device=device)
    try:
        result = torch.compile(lambda t: torch.sin(t) + t, backend="inductor")(x)
        torch.testing.assert_close(result, torch.sin(x) + x)
    except Exception as error:  # Whatever a toolchain can do wrong is what is asked for.
        lines = str(error).strip().splitlines() or [""]
        return "inductor", "failed", f"on {device}: {type(error).__name__}: {lines[0]}"
    return "inductor", _OK, f"compiled and ran on {device}"
