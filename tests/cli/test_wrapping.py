"""Long names in narrow columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from graphopt.cli.console import show
from graphopt.cli.wrapping import pieces

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
