"""Hypothesis strategies of scenarios."""

from __future__ import annotations

from graphopt.extras import extra
from graphopt.testing.fuzz.around import AROUND
from graphopt.testing.fuzz.between import AFTER
from graphopt.testing.fuzz.scenario import KINDS, OUTPUTS, REFUSED_KINDS, Layer, Scenario, Step
from graphopt.testing.fuzz.uses import USES

with extra("testing", "what generates training code"):
    from hypothesis import strategies as st

# A refusal ends a scenario, so what is refused comes once in this many layers.
_RARE = 30
_REFUSED_AROUND = ("backward_hook",)


def _layers() -> st.SearchStrategy[Layer]:
    around = [name for name in AROUND if name not in _REFUSED_AROUND]
    plain = st.builds(Layer, st.sampled_from(list(KINDS)))
    wrapped = st.builds(Layer, st.sampled_from(list(KINDS)), st.sampled_from(around)).map(_plain)
    refused = st.one_of(
        st.builds(Layer, st.sampled_from(list(REFUSED_KINDS))),
        st.builds(Layer, st.sampled_from(list(KINDS)), st.sampled_from(_REFUSED_AROUND)),
    )
    return st.integers(0, _RARE).flatmap(
        lambda n: refused if n == _RARE else plain if n % 2 else wrapped
    )


def _plain(layer: Layer) -> Layer:
    """Python draws again where a checkpoint runs again: the gradient is then of nothing."""
    drawn = layer.kind == "DrawsPython" and layer.around.startswith("checkpoint")
    return Layer(layer.kind) if drawn else layer


def scenarios(*, max_layers: int = 4, max_steps: int = 4) -> st.SearchStrategy[Scenario]:
    """Runs of daily training code, for `check_scenario`."""
    steps = st.builds(
        Step,
        use=st.sampled_from(list(USES)),
        after=st.sampled_from(list(AFTER)),
        batch=st.sampled_from((3, 2)),
        training=st.sampled_from((True, True, False)),
    )
    return st.builds(
        Scenario,
        layers=st.lists(_layers(), min_size=1, max_size=max_layers).map(tuple),
        steps=st.lists(steps, min_size=2, max_size=max_steps).map(tuple),
        output=st.sampled_from(OUTPUTS),
        tied=st.sampled_from((False, False, False, True)),
        seed=st.integers(0, 3),
    )
