"""Long names in narrow columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Group
from rich.table import Table

from graphopt.cli.console import show
from graphopt.cli.wrapping import pieces
from graphopt.render.formats import _layers

NAME = "encoder.layers.11.self_attn.out_proj.weight"


def test_a_name_breaks_behind_dots() -> None:
    assert pieces(NAME, 16) == ["encoder.layers.", "11.self_attn.", "out_proj.weight"]


def test_a_word_without_dots_breaks_at_the_width() -> None:
    assert pieces("a" * 10, 4) == ["aaaa", "aaaa", "aa"]


@given(st.text("ab._/", max_size=40), st.integers(1, 12))
def test_pieces_are_the_name_and_fit(name: str, width: int) -> None:
    found = pieces(name, width)
    assert "".join(found) == name
    assert all(len(piece) <= width for piece in found)
    for piece in found[:-1]:
        assert piece[-1] in "._/" or (len(piece) == width and not set("._/") & set(piece))


def test_tables_of_80_columns_keep_words_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = Table(box=None)
    for title in ("first", "last", "why"):
        table.add_column(title, overflow="fold")
    table.add_row(NAME, NAME.replace("encoder", "decoder"), "the sum of products. " * 3)
    show(table)
    said = capsys.readouterr().out
    for word in ("encoder", "decoder", "layers", "self_attn", "out_proj", "weight", "products"):
        assert word in said
    assert all(len(line) <= 80 for line in said.splitlines())


def _stages(capsys: pytest.CaptureFixture[str]) -> str:
    """A table with more figures than room, in a group as answers are."""
    table = Table(box=None, pad_edge=False)
    for title in ("stage", "modules", "parameters", "forward ms", "backward ms", "in flight"):
        left = title == "modules"
        table.add_column(
            title, justify="left" if left else "right", no_wrap=not left, overflow="fold"
        )
    table.add_row("0", f"{NAME}, {NAME}", "7.2 MB", "0.398", "0.416", "4")
    show(Group("stages", table))
    return capsys.readouterr().out


def test_titles_make_room_for_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    narrow = _stages(capsys)
    assert "forward ms" not in narrow
    assert all(word in narrow for word in ("encoder", "layers", "self_attn", "out_proj", "weight"))
    assert all(figure in narrow for figure in ("7.2 MB", "0.398", "0.416"))
    assert all(len(line) <= 60 for line in narrow.splitlines())
    monkeypatch.setenv("COLUMNS", "120")
    assert "forward ms" in _stages(capsys)


@pytest.mark.parametrize("width", [80, 72])
def test_figures_of_formats_are_never_cut(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {
        "site": "addmm", "module": NAME, "operator": "aten.convolution_backward.default",
        "phase": "backward", "kind": "allow", "float32_us": 567.8, "low_us": 123.4,
        "flops": 10, "bytes": 10, "bound": "compute", "error": 0.00329, "change": None,
        "format": "float32", "reason": "not-faster", "detail": "",
    }  # fmt: skip
    monkeypatch.setenv("COLUMNS", str(width))
    root = {**row, "module": "", "phase": "forward"}
    show(_layers((root, row, root), "bf16"))
    said = capsys.readouterr().out
    names = ("convolution", "not-faster") if width == 80 else ()
    for word in ("0.568", "0.123", "0.0033", "compute", "float32", *names):
        assert said.count(word) >= 3, said
    assert said.count("(root)") == 2
    assert all(len(line) <= width for line in said.splitlines())
