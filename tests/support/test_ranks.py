"""What the tests on several ranks rely on."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from tests.support import ranks
from tests.support.ranks import in_processes, on_ranks

pytestmark = pytest.mark.distributed


def _report(rank: int, folder: str) -> None:
    of_server = Path(f"/proc/{os.getppid()}/task")
    threads = len(list(of_server.iterdir())) if of_server.exists() else 1
    found = [os.environ["SAID_BY_THE_TEST"], torch.get_num_threads(), threads]
    Path(folder, str(rank)).write_text(repr(found))


def test_ranks_have_the_environment_of_the_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for word in ("first", "second"):
        monkeypatch.setenv("SAID_BY_THE_TEST", word)
        on_ranks(tmp_path, 2, _report, str(results))
        # One thread in the server, or forking it would not be safe.
        assert {f.read_text() for f in results.iterdir()} == {repr([word, 1, 1])}


def _fails(index: int, folder: str) -> None:
    Path(folder, str(index)).write_text(str(os.getpid()))
    if index:
        raise KeyError("no such luck")
    time.sleep(60)


def test_an_error_is_raised_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(ProcessRaisedException, match=r"_fails[^$]*no such luck"):
        in_processes(2, _fails, str(tmp_path))
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def _hangs(index: int) -> None:
    time.sleep(60)


def test_a_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "LIMIT", 1.0)
    with pytest.raises(ProcessExitedException, match="exit code 1"):
        in_processes(1, _hangs)
