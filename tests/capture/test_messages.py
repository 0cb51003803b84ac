"""What forward prints, logs and warns of comes out at every call, as in eager."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphopt
from graphopt.model.controller import controller_of

LOG = logging.getLogger("graphopt.tests.messages")


class Talks(nn.Module):
    """Says something, here or in a module inside."""

    def __init__(self, say: Callable[[Talks, Tensor], object], inside: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.say, self.calls = say, 0
        self.inner = Talks(say) if inside else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        if self.inner is not None:
            return self.inner(h)  # type: ignore[no-any-return]
        self.say(self, h)
        return h * 2


def counts(m: Talks, h: Tensor) -> None:
    m.calls += 1
    LOG.warning("call %d", m.calls)


def listed(m: Talks, h: Tensor) -> None:
    shapes = [h.shape]
    print(shapes, (1, "a"), m.lin)
    shapes.append(h.shape)


SAYS: dict[str, Callable[[Talks, Tensor], object]] = {
    "shape": lambda m, h: print(h.shape, h.dtype, h.device),
    "number": lambda m, h: print("mean", h.mean().item(), sep=": ", end=".\n"),
    "f-string": lambda m, h: print(f"{h.shape} {h.mean().item():.3f} {m.lin}"),
    "list": listed,
    "category": lambda m, h: warnings.warn("old", DeprecationWarning, stacklevel=1),
    "keyword": lambda m, h: warnings.warn("old", category=FutureWarning, stacklevel=1),
    "logger": lambda m, h: LOG.warning("mean %.4f", h.mean().item()),
    "info": lambda m, h: LOG.info("shape %s", h.shape),
    "error": lambda m, h: LOG.error(f"rows {h.shape[0]}"),
    "level": lambda m, h: LOG.log(logging.WARNING, "rows %d", h.shape[0], stacklevel=1),
    "named": lambda m, h: logging.getLogger("graphopt.tests.messages").warning("hello"),
    "root": lambda m, h: logging.getLogger(None).warning("hello"),
    "module": lambda m, h: logging.warning("hello"),
    "counter": counts,
}


@pytest.fixture(autouse=True)
def _level() -> Iterator[None]:
    LOG.setLevel(logging.INFO)
    yield
    LOG.setLevel(logging.NOTSET)


def _said(
    model: nn.Module, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> object:
    """What comes out in three steps."""
    caplog.clear()
    capsys.readouterr()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            model(torch.ones(3, 4)).sum().backward()
    about = [(str(w.message), w.category) for w in warned]
    return capsys.readouterr(), _logged(caplog), about


def _logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    """But for what torch traces of itself."""
    own = (r for r in caplog.records if not r.name.startswith("torch"))
    return [(r.levelname, r.getMessage()) for r in own]


def _pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    plain = make()
    torch.manual_seed(0)
    return plain, graphopt.optimize(make(), backend="eager")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", SAYS)
def test_it_says_what_eager_says(
    name: str,
    inside: bool,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, model = _pair(lambda: Talks(SAYS[name], inside))
    expected = _said(plain, capsys, caplog)
    assert _said(model, capsys, caplog) == expected
    assert controller_of(model).made > 0


def test_a_disabled_logger_says_nothing_until_it_is_enabled(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, model = _pair(lambda: Talks(lambda m, h: LOG.debug("rows %d", h.shape[0])))
    model(torch.ones(3, 4))
    assert not _logged(caplog)
    LOG.setLevel(logging.DEBUG)
    model(torch.ones(3, 4))
    assert _logged(caplog) == [("DEBUG", "rows 3")]


class Checkpointed(Talks):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_what_a_logger_cannot_say_at_the_end_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A tensor within a checkpoint; a dictionary that forward has made."""
    for make in (
        lambda: Checkpointed(lambda m, h: LOG.warning("mean %s", h.mean())),
        lambda: Talks(lambda m, h: LOG.warning("%s", {"rows": h})),
    ):
        plain, model = _pair(make)
        x = torch.randn(3, 4)
        assert torch.equal(model(x), plain(x))
        caplog.clear()
        model(x)
        assert not _logged(caplog)


def test_a_refused_call_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def branches(m: Talks, h: Tensor) -> None:
        print("hello")
        LOG.error("hello")
        if h.sum() > 0:
            print("positive")

    _, model = _pair(lambda: Talks(branches))
    with pytest.raises(graphopt.CaptureError):
        model(torch.ones(3, 4))
    assert capsys.readouterr() == ("", "")
