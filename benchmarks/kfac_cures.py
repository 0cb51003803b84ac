"""Where K-FAC's seconds go on its two examples, and what was tried against it.

Three parts, each kept in ``benchmarks/results/kfac_cures_<part>.json``:

- ``steps``: steps to the target under each cure, by two or three seeds that no table reports; on
  digits with the better of two learning rates. Times nothing, so it may run beside other work.
- ``times``: milliseconds of a step, cures in turn, and the parts of a step. Needs an idle machine.
- ``seconds``: seconds to the target with the seeds of `benchmarks.tuning`, methods in
  turn, each until it is there. Needs an idle machine.
- ``linear``: a step of models of linear layers only, with whole factors and with low rank.

Run ``python -m benchmarks.kfac_cures PART TASK`` with TASK ``digits`` or ``characters``; ``linear``
takes no task. Cures that
graphopt does not have are made here, by changing its runtime for one training.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

import graphopt
from benchmarks.convergence import THREADS
from benchmarks.harness import RESULTS, Run, alternate, keep, milliseconds, ratio
from benchmarks.kfac_step_variants import DAMPING, gpt, mlp, optimized, pytorch
from benchmarks.tuning import SEEDS
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import (
    KFAC,
    MOMENTUM,
    SGD_MOMENTUM,
    TORCH_MUON,
    Task,
    optimizers,
    train,
)
from examples.kfac_digits.comparison import Run as Training
from examples.kfac_language_model import train as characters
from graphopt.passes.kfac import rows
from graphopt.plan.kfac import Block, Side
from graphopt.rewrite import emit
from graphopt.runtime.engine.training import TrainingEngine
from graphopt.runtime.kfac import interval
from graphopt.runtime.kfac.state import CurvatureState
from graphopt.runtime.kfac.statistics import WithStatistics

RATES = {"digits": (1e-3, 3e-3), "characters": (3e-4,)}
# Exact on digits, whose batch has as many examples as directions are kept.
LOW = {"digits": "max_dim=256,rank=128", "characters": "max_dim=256,rank=64"}
TRIAL_SEEDS = {"digits": (100, 101, 102), "characters": (100, 101)}
LONGEST = {"digits": 60, "characters": 60}
# A few trials by hand.
CLIP = {"digits": 5, "characters": 100}
ROUNDS = 7
EACH = 10
Change = Callable[[], AbstractContextManager[object]]


# -- cures that are made here ----------------------------------------------------------------------


def inputs_every(steps: int) -> Change:
    """Moments of inputs are renewed every so many steps only, those of gradients in every one."""

    def due(self: CurvatureState) -> set[str]:
        late = self.step % steps
        return {name for name in self.sides if not (late and name.endswith(":A"))}

    return lambda: mock.patch.object(CurvatureState, "due", due)


@contextmanager
def inputs_one_step_late() -> Iterator[None]:
    """As if another thread inverted the moments of inputs while the next step runs."""
    plain = CurvatureState.take_over
    kept: dict[int, dict[str, Tensor]] = {}

    def take_over(self: CurvatureState, blocks: Any, fresh: Mapping[str, Tensor]) -> list[Block]:
        inputs = {name: value for name, value in fresh.items() if name.endswith(":A")}
        late = kept.get(id(self), inputs)
        kept[id(self)] = inputs
        return plain(self, blocks, {**fresh, **late})

    with mock.patch.object(CurvatureState, "take_over", take_over):
        yield


@contextmanager
def half_the_rows() -> Iterator[None]:
    """Moments of matrix products take every other row."""
    plain = rows._moment

    def moment(graph: Any, node: fx.Node, side: Side, ones: bool, scale: float) -> fx.Node:
        if node.meta["val"].shape[1] < 2:
            return plain(graph, node, side, ones, scale)
        given = (1, 0, sys.maxsize, 2)
        part = emit(graph, torch.ops.aten.slice.Tensor, node, *given, like=node)
        share = node.meta["val"].shape[1] / part.meta["val"].shape[1]
        return plain(graph, part, side, ones, scale * share)

    with mock.patch.object(rows, "_moment", moment):
        yield


@contextmanager
def without_noise(alpha: float) -> Iterator[None]:
    """The interval rule on changes from which the noise of a batch is taken off.

    Noise makes any two of three statistics as far apart; only a drift puts the first and the last
    further apart than neighbours. Norms may not change by more than `alpha` either.
    """

    def replaced(self: CurvatureState, name: str, fresh: Tensor) -> None:
        now, before = (self.state.get(f"{table}/{name}") for table in ("now", "before"))
        near = False
        if now is not None and before is not None:
            form = self.sides[name].form
            new, old, oldest = (float(interval._norm(v, form)) for v in (fresh, now, before))
            far = float(interval._norm(fresh - before, form)) ** 2
            pairs = ((fresh, now), (now, before))
            steps = sum(float(interval._norm(a - b, form)) ** 2 for a, b in pairs) / 2
            drift = max(0.0, far - steps) ** 0.5
            near = max(drift, abs(new - old), abs(new - oldest)) < alpha * old
        chosen = self.interval(name).refreshed(self.step, near, near)
        self.keep_interval(name, chosen)
        if now is not None:
            self.state[f"before/{name}"] = now
        self.state[f"now/{name}"] = fresh

    with mock.patch.object(CurvatureState, "_replace", replaced):
        yield


@dataclass(frozen=True)
class Cure:
    """A way to run K-FAC.

    Attributes:
        options: of the pass, beside the damping.
        change: of the runtime.
        backend: that runs the graphs.
    """

    options: str = ""
    change: Change = nullcontext
    backend: str = "eager"


CURES: dict[str, Cure] = {
    "as it is": Cure(),
    "interval 1": Cure("interval=1"),
    "interval 5": Cure("interval=5"),
    "interval 5, running mean": Cure("interval=5,ema=0.5"),
    "interval 5, clipped": Cure("interval=5,clip={clip}"),
    "rule without noise": Cure(change=lambda: without_noise(0.1)),
    "inputs every 2 steps": Cure("interval=1", inputs_every(2)),
    "inputs one step late": Cure("interval=1", inputs_one_step_late),
    "half of the rows": Cure("interval=1", half_the_rows),
}
# Those that are timed; the last three show bounds.
TIMED: dict[str, Cure] = {
    **{name: CURES[name] for name in ("as it is", "interval 1", "inputs every 2 steps")},
    "low rank, inputs every 2 steps": Cure("interval=1,{low}", inputs_every(2)),
    "half of the rows": CURES["half of the rows"],
    "interval 5, clipped": CURES["interval 5, clipped"],
    "interval 5, clipped, low rank": Cure("interval=5,clip={clip},{low}"),
    "Inductor, interval 1": Cure("interval=1", backend="inductor"),
    "nothing renewed": Cure("interval=1000000"),
    "nothing renewed, Inductor": Cure("interval=1000000", backend="inductor"),
}


def tasks() -> dict[str, Task]:
    """Both examples by name."""
    return {"digits": digits.task(), "characters": characters.task()}


def spec(task: Task, cure: Cure) -> str:
    """The pass with the damping of the example."""
    damping = f"damping={characters.DAMPING if task.name == 'characters' else 1e-3}"
    options = cure.options.format(low=LOW[task.name], clip=CLIP[task.name])
    return f"kfac{{{','.join(filter(None, (damping, options)))}}}"


# -- steps -----------------------------------------------------------------------------------------


def steps(task: Task) -> dict[str, Any]:
    """Steps to the target of every cure."""
    found: dict[str, Any] = {}
    for name, cure in CURES.items():
        by_rate = {}
        for rate in RATES[task.name]:
            counts = [_steps(task, cure, rate, seed) for seed in TRIAL_SEEDS[task.name]]
            ordered = sorted(float("inf") if c is None else c for c in counts)
            by_rate[rate] = (statistics.median(ordered), counts)
        rate = min(by_rate, key=lambda r: by_rate[r][0])
        middle = by_rate[rate][0]
        found[name] = {
            "rate": rate,
            "steps": by_rate[rate][1],
            "median": middle if middle < float("inf") else None,
        }
        print(name, found[name], flush=True)
    return found


def _steps(task: Task, cure: Cure, rate: float, seed: int) -> int | None:
    run = Training()
    with cure.change():
        chosen = replace(task, kfac=spec(task, cure))
        for run in train(chosen, KFAC, rate, seed, LONGEST[task.name]):
            if run.steps_to_target is not None:
                break
    return run.steps_to_target


# -- times -----------------------------------------------------------------------------------------


def times(task: Task) -> dict[str, Any]:
    """Milliseconds of a step under every cure, and the parts of a step."""
    runs: dict[str, Run] = {}
    for method in (SGD_MOMENTUM, TORCH_MUON):
        runs[method] = _stepping(task, method)
    for name, cure in TIMED.items():
        runs[name] = _stepping(task, name, cure)
    for run in runs.values():
        for _ in range(4):
            run()
    found = alternate({n: _several(run) for n, run in runs.items()}, ROUNDS, warmup=1)
    halves = {name: [t / EACH for t in values] for name, values in found.items()}
    return {
        "milliseconds": milliseconds(halves),
        "over SGD": {name: ratio(halves, name, SGD_MOMENTUM) for name in halves},
        "parts of a step that renews": parts(task),
    }


def _several(run: Run) -> Run:
    """So many steps that each cure renews as often as it does in the long run."""

    def steps() -> None:
        for _ in range(EACH):
            run()

    return steps


def _stepping(task: Task, method: str, cure: Cure | None = None) -> Run:
    """A training step on the next batch; the cure stays in force while the step runs."""
    torch.manual_seed(0)
    model = task.model().train()
    batches = task.batches(0)
    change: Change = nullcontext if cure is None else cure.change
    if cure is None:
        used = optimizers(method, model, next(batches)[0], task.rates[method], "")
    else:
        with change():
            batch = next(batches)
            passes, backend = spec(task, cure), cure.backend
            graphopt.optimize(
                model, (batch[0],), passes=passes, backend=backend, verify="structure"
            )
        used = [torch.optim.SGD(model.parameters(), lr=1e-6, momentum=MOMENTUM)]

    def step() -> None:
        x, y = next(batches)
        for optimizer in used:
            optimizer.zero_grad()
        with change():
            task.loss(model(x), y).backward()
        for optimizer in used:
            optimizer.step()

    return step


def parts(task: Task) -> dict[str, float]:
    """Median milliseconds of what a step with the rule of SP-NGD consists of."""
    spent: defaultdict[str, float] = defaultdict(float)

    def timed(owner: type, name: str, label: str) -> Any:
        plain = getattr(owner, name)

        def method(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = plain(*args, **kwargs)
            spent[label] += time.perf_counter() - start
            return result

        return mock.patch.object(owner, name, method)

    labels = {
        (TrainingEngine, "run_forward"): "forward",
        (WithStatistics, "__call__"): "backward with statistics",
        (CurvatureState, "renew"): "interval rule",
        (CurvatureState, "solve"): "inverses",
        (CurvatureState, "precondition"): "preconditioning",
    }
    kept: dict[str, list[float]] = {label: [] for label in (*labels.values(), "whole step")}
    run = _stepping(task, KFAC, Cure())
    for _ in range(4):
        run()
    changes = [timed(owner, name, label) for (owner, name), label in labels.items()]
    for change in changes:
        change.start()
    for _ in range(3 * ROUNDS):
        spent.clear()
        start = time.perf_counter()
        run()
        spent["whole step"] = time.perf_counter() - start
        for label, values in kept.items():
            values.append(spent[label])
    for change in changes:
        change.stop()
    return milliseconds(kept)


# -- seconds ---------------------------------------------------------------------------------------


def seconds(task: Task) -> dict[str, Any]:
    """Seconds and steps to the target by seed, methods in turn."""
    variants = {
        TORCH_MUON: (TORCH_MUON, Cure()),
        "K-FAC": (KFAC, CURES["as it is"]),
        "K-FAC, interval 1": (KFAC, CURES["interval 1"]),
    }
    if task.name == "digits":
        for name in ("interval 5, clipped", "interval 5, clipped, low rank"):
            variants[f"K-FAC, {name}"] = (KFAC, TIMED[name])
    found: dict[str, dict[str, list[float | None]]] = {
        name: {"steps": [], "seconds": []} for name in variants
    }
    for seed in SEEDS:
        running = {
            name: (
                train(
                    replace(task, kfac=spec(task, cure)),
                    method,
                    RATES[task.name][-1] if method == KFAC else task.rates[method],
                    seed,
                ),
                cure,
            )
            for name, (method, cure) in variants.items()
        }
        while running:
            for name, (training, cure) in list(running.items()):
                with cure.change():
                    run = next(training, None)
                if run is None or run.steps_to_target is not None:
                    done = running.pop(name) and run
                    found[name]["steps"].append(done.steps_to_target if done else None)
                    found[name]["seconds"].append(done.seconds_to_target if done else None)
    return {name: {**values, **_medians(values)} for name, values in found.items()}


def _medians(values: Mapping[str, list[float | None]]) -> dict[str, float | None]:
    result: dict[str, float | None] = {}
    for key, numbers in values.items():
        middle = statistics.median(float("inf") if n is None else n for n in numbers)
        result[f"median {key}"] = round(middle, 4) if middle < float("inf") else None
    return result


# -- linear layers ---------------------------------------------------------------------------------


def linear() -> dict[str, Any]:
    """Steps of `benchmarks.kfac_step`'s models, sides of more than 256 whole and of rank 64."""
    found: dict[str, Any] = {}
    cases = {"MLP 784-256-256-10, batch 512": mlp(512), "GPT, 16x64 tokens": gpt(16)}
    for name, one in cases.items():
        runs: dict[str, Run] = {"SGD": _several(pytorch(one))}
        for every in (1, 10):
            for form, options in (("whole", ""), ("rank 64", ",max_dim=256,rank=64")):
                passes = f"kfac{{damping={DAMPING},interval={every}{options}}}"
                runs[f"{form}, interval {every}"] = _several(optimized(one, passes)[0])
        seen = alternate(runs, ROUNDS, warmup=1)
        found[name] = {run: ratio(seen, run, "SGD") for run in runs}
    return found


def main() -> None:
    """Measure one part of one task and add it to what is kept."""
    part, *names = sys.argv[1:]
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore", RuntimeWarning)
    if part == "linear":
        print("kept in", keep("kfac_cures_linear", linear()).name)
        return
    (name,) = names
    measured = {"steps": steps, "times": times, "seconds": seconds}[part](tasks()[name])
    path = RESULTS / f"kfac_cures_{part}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    results[name] = measured
    print(json.dumps(measured, indent=1))
    print("kept in", keep(f"kfac_cures_{part}", results).name)


if __name__ == "__main__":
    main()
