"""While a call is captured nothing looks for garbage; afterwards all is as the user had it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.capture.dynamo import by_dynamo
from graphopt.capture.garbage import keeping_garbage
from graphopt.errors import CaptureError


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with keeping_garbage():
            assert not gc.isenabled()
            with keeping_garbage():
                pass
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
        with pytest.raises(ZeroDivisionError), keeping_garbage():
            _ = 1 / 0
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Branches()], ids=["captured", "refused"])
def test_a_capture_keeps_garbage(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        seen.append(gc.isenabled())
        return by_dynamo(*args, **kwargs)

    monkeypatch.setitem(capture.__globals__, "by_dynamo", noted)
    try:
        capture(model, (torch.ones(2),))
    except CaptureError:
        assert isinstance(model, Branches)
    assert seen
    assert not any(seen)
    assert gc.isenabled()
