"""The command line, resumed trainings, checks and figures that all workloads share."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.common import (
    Case,
    Criterion,
    Run,
    Workload,
    WorkloadError,
    check_count,
    check_labels,
    check_tensor,
    panels,
)

STEPS = 20
STOP = 7


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def _case(device: torch.device) -> Case:
    return Case(nn.Linear(4, 1).to(device), (torch.zeros(2, 4, device=device),), torch.sum)


def _workload(interrupt_at: int | None = None, name: str = "made_up") -> Workload:
    """Two trainings; Ctrl-C reaches the second at a step, once."""

    def run(run: Run) -> None:
        torch.manual_seed(run.seed)
        for training in ("first", "second"):
            model = run.optimize(_network())
            optimizer = torch.optim.Adam(model.parameters(), 0.02)
            scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)

            def loss(step: int, model: nn.Module = model, training: str = training) -> Tensor:
                if training == "second" and step == interrupt_at:
                    os.kill(os.getpid(), signal.SIGINT)
                x = torch.randn(16, 4, generator=run.generator(step))
                return F.mse_loss(model(x), x.sum(1, keepdim=True))

            values = run.fit(
                training, model, optimizer, loss, STEPS * run.epochs, scheduler=scheduler, clip=5.0
            )
            run.row("trainings", name=training, loss=values[-1])
        before = run.once("baseline", lambda: {"loss": 4.0})
        run.require("loss over the baseline", values[-1] / before["loss"], at_most=0.5)
        run.value("sum of losses", sum(values))
        run.value("weights", sum(float(p.detach().double().sum()) for p in model.parameters()))

    return Workload(name, "Made up.", run, _case, epochs=2, long_epochs=20)


@pytest.fixture(autouse=True)
def _signals() -> object:
    """The workloads take the signals of the process; tests give them back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def _results(folder: Path) -> dict[str, object]:
    found = json.loads((folder / "results.json").read_text())
    return {key: found[key] for key in ("criteria", "values", "tables", "settings")}


def test_a_run_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _workload().main(["--output", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"] == {
        "workload": "made_up",
        "seed": 0,
        "epochs": 2,
        "device": "cpu",
        "backend": "eager",
    }
    (criterion,) = found["criteria"]
    assert criterion["holds"] == (criterion["value"] <= 0.5)
    assert [row["name"] for row in found["tables"]["trainings"]] == ["first", "second"]
    assert set(found["seconds"]) == {"first", "second", "baseline"}
    assert "loss over the baseline" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["eager", "none"])
def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path: Path, backend: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ["--seed", "3", "--backend", backend]
    _workload().main(["--output", str(whole), *options])
    with pytest.raises(SystemExit) as stopped:
        _workload(interrupt_at=STOP).main(["--output", str(broken), *options])
    assert stopped.value.code == 130
    assert not (broken / "results.json").exists()
    kept = torch.load(broken / "checkpoint.pt", weights_only=True)
    assert list(kept["finished"]) == ["first"]
    assert len(kept["current"]["second"]["values"]) == STOP + 1
    _workload().main(["--output", str(broken), "--resume", *options])
    assert _results(broken) == _results(whole)


def test_a_resumed_training_repeats_no_step(tmp_path: Path) -> None:
    options = ["--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        _workload(interrupt_at=STOP).main(options)
    # Interrupted again if it came to this step again.
    _workload(interrupt_at=STOP).main([*options, "--resume"])


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    _workload().main(["--output", str(tmp_path)])
    before = _results(tmp_path)
    # Any step would be interrupted.
    _workload(interrupt_at=0).main(["--output", str(tmp_path), "--resume"])
    assert _results(tmp_path) == before


def _refused(arguments: list[str], workload: Workload | None = None) -> None:
    with pytest.raises(SystemExit) as stopped:
        (workload or _workload()).main(arguments)
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--epochs", "0"], "'0' is not a whole number above zero"),
        (["--epochs", "1.5"], "'1.5' is not a whole number above zero"),
        (["--epochs", "-1"], "expected one argument|'-1' is not a whole number above zero"),
        (["--seed", "one"], "'one' is not a whole number from 0 to 2147483647"),
        (["--seed", "99999999999999999999"], "is not a whole number from 0 to 2147483647"),
        (["--backend", "fast"], "invalid choice: 'fast'"),
        (["--device", "abacus"], "device 'abacus' is none of cpu, cuda and cuda:N"),
        (["--device", "meta"], "device 'meta' is none of cpu, cuda and cuda:N"),
        (["--output", ""], "the path is empty"),
        (["--output", __file__], "is a file, not a folder"),
        (["--output", "/proc/made_up"], "cannot write to the folder /proc/made_up"),
        (["--output", "/dev/null"], "cannot write to the folder /dev/null"),
    ],
)
def test_bad_options_are_named(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused(arguments)
    error = capsys.readouterr().err
    assert any(part in error for part in says.split("|"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_a_missing_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    _refused(["--device", "cuda"])
    assert "device 'cuda' cannot be used" in capsys.readouterr().err


def test_checkpoints_of_others_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--output", str(tmp_path), "--resume"]
    _refused(options)
    assert "there is no checkpoint" in capsys.readouterr().err
    _workload().main(["--output", str(tmp_path)])
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    _refused([*options, "--seed", "1"])
    assert "made with seed 0, and this run has 1" in capsys.readouterr().err
    _refused([*options, "--epochs", "1"])
    assert "made with epochs 2, and this run has 1" in capsys.readouterr().err
    _refused([*options, "--backend", "none"])
    assert "made with backend eager, and this run has none" in capsys.readouterr().err
    _refused(options, _workload(name="other"))
    assert "made with workload made_up" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept
    (tmp_path / "checkpoint.pt").write_bytes(kept[:1000])
    _refused(options)
    assert "is no checkpoint, or is cut off or damaged" in capsys.readouterr().err


def test_a_run_that_starts_again_leaves_nothing_of_the_former(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _workload().main(["--output", str(tmp_path)])

    def run(run: Run) -> None:
        raise KeyboardInterrupt

    broken = Workload("made_up", "Made up.", run, _case, epochs=2, long_epochs=20)
    with pytest.raises(SystemExit) as stopped:
        broken.main(["--output", str(tmp_path), "--seed", "5"])
    assert stopped.value.code == 130
    assert "interrupted before the first checkpoint" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()
    assert not (tmp_path / "checkpoint.pt").exists()


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(run: Run) -> None:
        _refused(["--output", str(tmp_path)])  # another, meanwhile

    Workload("made_up", "Made up.", run, _case, epochs=2, long_epochs=20).main(
        ["--output", str(tmp_path)]
    )
    assert f"another run writes to {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / "results.json").exists()


def test_a_folder_that_goes_away_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "gone"

    def run(run: Run) -> None:
        shutil.rmtree(folder)
        run.once("baseline", lambda: 1.0)

    workload = Workload("made_up", "Made up.", run, _case, epochs=2, long_epochs=20)
    _refused(["--output", str(folder)], workload)
    assert "checkpoint.pt cannot be written" in capsys.readouterr().err


def test_a_job_that_cannot_be_joined_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    _refused(["--output", str(tmp_path)])
    assert "RANK is set, but the job cannot be joined" in capsys.readouterr().err


def test_data_that_cannot_be_trained_on_is_named() -> None:
    good = torch.zeros(3, 4)
    assert check_tensor("images", good, (None, 4)) is good
    with pytest.raises(WorkloadError, match=r"images has shape \[3, 4\], expected \[any, 5\]"):
        check_tensor("images", good, (None, 5))
    with pytest.raises(WorkloadError, match=r"images has shape \[3, 4\], expected \[any\]"):
        check_tensor("images", good, (None,))
    with pytest.raises(WorkloadError, match="images is empty"):
        check_tensor("images", good[:0], (None, 4))
    with pytest.raises(WorkloadError, match="images is of float64, expected float32"):
        check_tensor("images", good.double(), (None, 4))
    with pytest.raises(WorkloadError, match="images is of type ndarray, expected a tensor"):
        check_tensor("images", good.numpy(), (None, 4))  # type: ignore[arg-type]
    good[1, 2], good[2, 0] = torch.nan, torch.inf
    with pytest.raises(WorkloadError, match=r"2 values that are NaN or .* first at \[1, 2\]"):
        check_tensor("images", good, (None, 4))


def test_labels_and_counts_that_cannot_be_trained_on_are_named() -> None:
    labels = torch.tensor([0, 2, 1])
    assert check_labels("labels", labels, (3,), 3) is labels
    with pytest.raises(WorkloadError, match="labels go from 0 to 2, expected 0 to 1"):
        check_labels("labels", labels, (3,), 2)
    with pytest.raises(WorkloadError, match="labels is of float32, expected int64"):
        check_labels("labels", labels.float(), (3,), 3)
    assert check_count("fields", 2) == 2
    with pytest.raises(WorkloadError, match=r"0 fields\n  try: take 1 or more"):
        check_count("fields", 0)
    with pytest.raises(WorkloadError, match=r"7 images\n  try: take between 1 and 5"):
        check_count("images", 7, at_most=5)


def test_criteria() -> None:
    assert Criterion("x", 1.0, "<=", 1.0).holds
    assert not Criterion("x", 1.1, "<=", 1.0).holds
    assert Criterion("x", 1.1, ">=", 1.0).holds
    assert not Criterion("x", float("nan"), "<=", 1.0).holds
    assert not Criterion("x", float("nan"), ">=", 1.0).holds


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_figures_are_transparent_and_reproducible(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        with panels(tmp_path / f"{name}.{suffix}", 1, 2) as axes:
            axes[0, 0].plot([0, 1], [1, 0], label="line")
            axes[0, 1].set(xlabel="time (s)", ylabel="distance (m)")
    first, second = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in ("a", "b"))
    assert first == second
    if suffix == "svg":
        assert b"time (s)" in first  # text, not outlines
        assert b"ffffff" not in first


def test_a_baseline_that_could_not_be_resumed_is_refused(tmp_path: Path) -> None:
    def run(run: Run) -> None:
        run.once("numpy", lambda: {"loss": np.float64(4.0)})

    with pytest.raises(TypeError, match="'numpy' returns more than numbers"):
        Workload("made_up", "Made up.", run, _case, epochs=2, long_epochs=20).main(
            ["--output", str(tmp_path)]
        )
    assert not (tmp_path / "checkpoint.pt").exists()
