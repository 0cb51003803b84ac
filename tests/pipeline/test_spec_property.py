"""Any pipeline can be written as a spec and read back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import SpecError
from graphopt.pipeline import Pipeline
from graphopt.pipeline.spec import format_spec, parse_spec
from tests.support.demo_passes import ALL, Idle, Needy, Tuned
from tests.support.plugins import write_demo_passes

numbers = st.floats(allow_nan=False)
# Texts that are made of what the language uses itself are the ones that break a printer.
texts = st.text() | st.text(alphabet='{},|="\\ \n3tnrue.') | st.sampled_from(["none", "true", "1"])
tuned = st.builds(
    Tuned,
    count=st.integers(),
    rate=numbers,
    fast=st.booleans(),
    label=texts,
    mode=st.sampled_from(["stale", "fresh"]),
    interval=st.integers() | st.just("stale"),
    limit=st.none() | st.integers(),
    keep=st.lists(texts, max_size=4).map(tuple),
    sizes=st.lists(st.integers(), max_size=4).map(tuple),
    either=texts | st.booleans() | numbers,
    made=st.lists(texts, max_size=2).map(tuple),
)
pipelines = st.lists(
    tuned | st.builds(Needy, st.integers(min_value=1)) | st.just(Idle()), max_size=4
).map(lambda passes: Pipeline(tuple(passes)))


@pytest.fixture(scope="module", autouse=True)
def _demo_passes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(write_demo_passes(tmp_path_factory.mktemp("demo")))
        yield


@settings(deadline=None)
@given(pipelines)
def test_round_trip(pipeline):
    again = Pipeline.parse(str(pipeline))
    assert again == pipeline
    assert [_types(p) for p in again.passes] == [_types(p) for p in pipeline.passes]
    assert str(again) == str(pipeline)


def _types(pass_):
    return [type(value) for value in vars(pass_).values()]


names = [kind.name for kind in ALL]
pieces = st.sampled_from([*names, "count", "keep", "1", *'{}=,|" \\\n', "-"]) | st.text(max_size=2)


@settings(deadline=None)
@given(st.lists(pieces, max_size=12).map("".join))
def test_any_text_parses_or_is_refused_with_a_caret_inside_it(text):
    try:
        passes = parse_spec(text)
    except SpecError as error:
        lines = error.message.split("\n")
        if lines[0].startswith("the option types of pass 'unreadable'"):
            return
        assert 0 <= lines[-1].index("^") - 4 <= len(text)
        return
    assert parse_spec(format_spec(passes)) == passes
