"""The spec language: what parses, what is printed, what each error says."""

from __future__ import annotations

import pytest

from graphopt.errors import SpecError
from graphopt.pipeline import Pipeline
from graphopt.pipeline.spec import format_pass, format_spec, options_of, parse_spec
from tests.support.demo_passes import Canonical, Idle, Needy, Odd, Tuned, Unreadable
from tests.support.plugins import write_demo_passes


@pytest.fixture(autouse=True)
def _demo_passes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_demo_passes(tmp_path))


@pytest.mark.parametrize(
    ("text", "passes"),
    [
        ("", ()),
        ("  ", ()),
        ("idle", (Idle(),)),
        ("idle{}", (Idle(),)),
        ("idle,tuned", (Idle(), Tuned())),
        ("idle,idle", (Idle(), Idle())),
        (" idle , tuned { count = 4 , rate = 1 } ", (Idle(), Tuned(count=4, rate=1.0))),
        ("tuned{count=-7,rate=1e-3,fast=true}", (Tuned(count=-7, rate=1e-3, fast=True),)),
        ("tuned{mode=fresh,interval=10}", (Tuned(mode="fresh", interval=10),)),
        ("tuned{interval=stale,limit=none}", (Tuned(),)),
        ("tuned{limit=5}", (Tuned(limit=5),)),
        ("tuned{keep=a.*|head}", (Tuned(keep=("a.*", "head")),)),
        ('tuned{keep="a|b"|"}"|c}', (Tuned(keep=("a|b", "}", "c")),)),
        ("tuned{sizes=,made=}", (Tuned(sizes=(), made=()),)),
        ('tuned{label="a, {b}",keep=""}', (Tuned(label="a, {b}", keep=("",)),)),
        ("tuned{either=true}", (Tuned(either=True),)),
        ('tuned{either="true"}', (Tuned(either="true"),)),
        ("tuned{either=2}", (Tuned(either=2.0),)),
        ("idle,\nneedy{stages=2}", (Idle(), Needy(2))),
    ],
)
def test_parses(text, passes):
    assert parse_spec(text) == passes
    assert parse_spec(format_spec(passes)) == passes


@pytest.mark.parametrize(
    ("passes", "text"),
    [
        ((), ""),
        ((Idle(), Tuned()), "idle,tuned"),
        ((Tuned(count=3, rate=0.5),), "tuned"),
        ((Tuned(made=("a",)),), "tuned"),
        ((Tuned(rate=1e-3, fast=True),), "tuned{rate=0.001,fast=true}"),
        ((Tuned(keep=("a b", "c"), limit=7),), 'tuned{limit=7,keep="a b"|c}'),
        ((Tuned(either="3"),), 'tuned{either="3"}'),
        ((Tuned(label=""),), 'tuned{label=""}'),
        ((Tuned(made=()),), "tuned{made=}"),
        ((Needy(2),), "needy{stages=2}"),
    ],
)
def test_prints_what_differs_from_the_defaults(passes, text):
    assert format_spec(passes) == text


def test_the_pipeline_speaks_the_language():
    pipeline = Pipeline.parse("canonical,tuned{count=4}")
    assert pipeline == Pipeline((Canonical(), Tuned(count=4)))
    assert str(pipeline) == "canonical,tuned{count=4}"


@pytest.mark.parametrize(
    ("text", "column", "sentence", "hint"),
    [
        ("idle,tunde{count=1}", 5, "unknown pass 'tunde'", "did you mean 'tuned'?"),
        ("zzz", 0, "unknown pass 'zzz'", "`graphopt passes` lists all passes"),
        ("tuned{cuont=1}", 6, "pass 'tuned' has no option 'cuont'", "did you mean 'count'?"),
        ("needy{x=1}", 6, "pass 'needy' has no option 'x'", "stages (an int, required)"),
        ("idle{x=1}", 5, "pass 'idle' has no option 'x'", "it has no options"),
        ("tuned{count=1,count=1}", 14, "option 'count' is given twice", ""),
        ("tuned{count=1.5}", 12, "option 'count' of pass 'tuned' takes an int, not '1.5'", ""),
        ("tuned{rate=}", 11, "takes a float, not ''", ""),
        ("tuned{fast=True}", 11, "takes true or false, not 'True'", ""),
        ("tuned{mode=old}", 11, "takes one of: stale, fresh, not 'old'", ""),
        ("tuned{interval=x}", 15, "takes stale or an int, not 'x'", ""),
        ("tuned{limit=x}", 12, "takes an int or none, not 'x'", ""),
        ("tuned{sizes=1|x}", 12, "values separated by '|', each an int, not '1|x'", ""),
        ("tuned{label=}", 12, "takes text, not ''", ""),
        ("tuned{keep=a||b}", 11, "each text, not 'a||b'", ""),
        ("tuned{label=a{b}", 13, "expected ',' or '}' after an option", ""),
        ('tuned{label="a}', 12, "this quote is never closed", ""),
        ('tuned{label=a"}', 13, "this quote is never closed", ""),
        ('tuned{label="a"b}', 12, "takes text, not '\"a\"b'", ""),
        ("tuned{count}", 11, "expected '=' after option 'count'", ""),
        ("tuned{count=1", 13, "expected ',' or '}' after an option", ""),
        ("tuned{,}", 6, "expected the name of an option of pass 'tuned'", ""),
        ("tuned{count=1,}", 14, "expected the name of an option of pass 'tuned'", ""),
        ("idle,", 5, "expected the name of a pass", ""),
        (",idle", 0, "expected the name of a pass", ""),
        ("idle tuned", 5, "expected ',' between two passes", ""),
        ("idle}", 4, "expected ',' between two passes", ""),
        ("needy", 0, "pass 'needy' needs a value for its option stages", ""),
        ("idle,needy{stages=-1}", 5, "refuses its options: stages must not be negative", ""),
        ("needy{stages=0}", 0, "refuses its options: there are no stages", "use one"),
        ("idle,\n tnued", 7, "unknown pass 'tnued'", "'tuned'"),
    ],
)
def test_errors_point_at_the_column(text, column, sentence, hint):
    with pytest.raises(SpecError) as caught:
        parse_spec(text)
    says, shown, caret = caught.value.message.split("\n")
    assert sentence in says
    assert shown == "    " + text.replace("\n", " ")
    assert caret == " " * (4 + column) + "^"
    assert hint in caught.value.hint


def test_kebab_case_is_no_second_spelling():
    with pytest.raises(SpecError, match="has no option 'sizes-'"):
        parse_spec("tuned{sizes-=1}")
    with pytest.raises(SpecError, match="unknown pass 'uses-factors'") as caught:
        parse_spec("uses-factors")
    assert "'uses_factors'" in caught.value.hint


def test_all_options_are_listed_with_type_and_default():
    assert [str(option) for option in options_of(Tuned)][:4] == [
        "count (an int) [3]",
        "rate (a float) [0.5]",
        "fast (true or false) [false]",
        "label (text) [plain]",
    ]
    assert [str(option) for option in options_of(Needy)] == ["stages (an int, required)"]


@pytest.mark.parametrize(
    ("pass_", "reason"),
    [
        (Odd(call=float), "option 'call' of pass 'odd': the spec language cannot say"),
        (Tuned(rate=float("nan")), "option 'rate' of pass 'tuned': the spec language cannot say"),
        (Tuned(mode="other"), "cannot say 'other' as one of: stale, fresh"),
        (Unreadable(table={}), "option types of pass 'unreadable' cannot be read"),
    ],
)
def test_what_cannot_be_said_is_refused(pass_, reason):
    with pytest.raises(SpecError) as caught:
        format_pass(pass_)
    assert reason in caught.value.message
    with pytest.raises(SpecError):
        Pipeline((pass_,))
