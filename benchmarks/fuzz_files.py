"""Damaged files: .gopt texts, plans, states of passes, saved files and caches.

Each input is one that graphopt has written, with a few random changes, or a text that calls a
random operator with random arguments. It must be refused by one of graphopt's own errors, or mean
something: a graph that prints, a plan that is equal after a way through JSON, a state from which
the next step has the same bits as from the whole one, a cache entry that is in range.

    python -m benchmarks.fuzz_files [COUNT [SEED]]

runs COUNT inputs of all kinds together (50,000 by default) in processes of their own, so that one
that dies is counted, and keeps what was found.
"""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

import graphopt
from benchmarks.fuzz_texts import TAKEN, WRONG, Try, operators, texts
from graphopt.errors import GraphoptError
from graphopt.plan import Plan

REFUSED, RAW = "refused", "raw exception"
JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2**31, 2**63, -(2**64), 10**400, 0.5, -1.0, 1e308, "", "x",
    "n0", "0", "__import__('os').getpid()", "9**9**9", [], {}, [1], [[]], {"a": 1}, float("inf"),
    float("nan"), "f32", [None], "bf16", "2*n0",
]  # fmt: skip


# -- plans -----------------------------------------------------------------------------------------


def plans() -> Try:
    """Plans of all methods that have a part, with values changed, lost and added."""
    seeds = [json.loads(plan.to_json()) for plan in _plans()]

    def attempt(rng: random.Random) -> str:
        data = copy.deepcopy(rng.choice(seeds))
        for _ in range(rng.choice([1, 1, 1, 2])):
            _change(rng, data)
        text = json.dumps(data)
        if rng.random() < 0.1:
            place = rng.randrange(len(text))
            text = text[:place] + rng.choice(["", "9", "[", "\\", "\x00"]) + text[place + 1 :]
        plan = Plan.from_json(text)
        hash(plan.to_json()), plan.digest, plan.outline()
        return TAKEN if Plan.from_json(plan.to_json()) == plan else WRONG

    return attempt


def _plans() -> list[Plan]:
    x = torch.randn(4, 8)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    specs = [
        "cleanup",
        "batch_statistics,kfac{damping=0.01}",
        "flexpoint",
        "kfac{interval=5,rank=2}",
    ]
    specs.append("precision{format=fp16,cost=roofline}")
    made = []
    for spec in specs:
        plan = graphopt.optimize(copy.deepcopy(net), (x,), passes=spec, dry_run=True)
        assert isinstance(plan, Plan)
        made.append(plan)
    return made


def _change(rng: random.Random, data: Any) -> None:
    """One change, somewhere in nested lists and dictionaries."""
    here = data
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(here[key], (dict, list)) and here[key] and rng.random() < 0.85:
            here = here[key]
            continue
        break
    match rng.choice(["replace", "replace", "replace", "delete", "add", "double"]):
        case "replace":
            here[key] = copy.deepcopy(rng.choice(JUNK))
        case "delete":
            del here[key]
        case "add" if isinstance(here, dict):
            here[rng.choice(["x", "part", "format", ""])] = copy.deepcopy(rng.choice(JUNK))
        case _ if isinstance(here, list):
            here.insert(key, rng.choice([here[key], copy.deepcopy(rng.choice(JUNK))]))
        case _:
            here[key] = [here[key]]


# -- states ----------------------------------------------------------------------------------------

_SPECS = (
    "kfac{interval=1,ema=0.5}",
    "kfac",
    "batch_statistics{last=3},kfac{solver=eigen}",
    "flexpoint",
)


def _model(spec: str) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return graphopt.optimize(net, passes=spec, backend="eager", verify="off")


def _step(model: nn.Module, seed: int) -> list[torch.Tensor]:
    model.zero_grad()
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def states() -> Try:
    """States of some steps, with tensors lost, added, renamed, cast, cut, and without a number."""
    runs = []
    for spec in _SPECS:
        model = _model(spec)
        for seed in range(4):
            _step(model, seed)
        weights = copy.deepcopy(model.state_dict())
        good = graphopt.state_dict(model)
        expected = _steps(model, weights, good)
        graphopt.load_state_dict(model, good)
        runs.append((spec, model, weights, good, expected))

    def attempt(rng: random.Random) -> str:
        spec, model, weights, good, expected = rng.choice(runs)
        bad = _damaged_state(rng, good)
        if rng.random() < 0.05 and bad != {}:
            try:  # a model that is not captured yet checks some of it in its first call
                found = _steps(_model(spec), weights, bad)
            except GraphoptError:
                return REFUSED
        else:
            try:
                graphopt.load_state_dict(model, bad)
            except GraphoptError:
                now = graphopt.state_dict(model)
                kept = now.keys() == good.keys() and all(torch.equal(now[k], good[k]) for k in now)
                return REFUSED if kept else WRONG
            try:
                found = _steps(model, weights, bad)
            except GraphoptError:
                return REFUSED
            finally:
                graphopt.load_state_dict(model, good)
        same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        return TAKEN if same else WRONG

    return attempt


def _steps(model: nn.Module, weights: Any, state: Any) -> list[torch.Tensor]:
    graphopt.load_state_dict(model, state)
    model.load_state_dict(weights)
    return [gradient for seed in (7, 8, 9) for gradient in _step(model, seed)]


def _damaged_state(rng: random.Random, good: dict[str, torch.Tensor]) -> Any:
    state: dict[Any, Any] = dict(good)
    key = rng.choice(sorted(state))
    value = state[key]
    match rng.randrange(12):
        case 0:
            del state[key]
        case 1:
            state[rng.choice(["x", "kfac/x", f"{key}x", 5, "", "/", "a/b"])] = torch.ones(2)
        case 2:
            state[key.replace("0", "9").replace("now", "then")] = state.pop(key)
        case 3:
            others = [d for d in (torch.float64, torch.float16, torch.int32) if d != value.dtype]
            state[key] = value.to(rng.choice(others))
        case 4:
            state[key] = torch.zeros([n + 1 for n in value.shape] or [1], dtype=value.dtype)
        case 5:
            state[key] = value.reshape(-1) if value.dim() != 1 else value[None]
        case 6 if value.is_floating_point():
            state[key] = value * rng.choice([float("nan"), float("inf")])
        case 7:
            state[key] = copy.deepcopy(rng.choice(JUNK))
        case 8:
            state = {k: v for k, v in state.items() if rng.random() < 0.8}
        case 9:
            state[key] = rng.choice([value.to("meta"), value.to_sparse() if value.dim() else None])
        case 10:
            return copy.deepcopy(rng.choice(JUNK))
        case _ if value.dtype == torch.int64:
            state[key] = -value - 1
        case _:
            del state[key]
    return state


# -- files and caches ------------------------------------------------------------------------------


def files() -> Try:
    """What `graphopt.save` has written, with bytes changed, cut and added."""
    folder = Path(tempfile.mkdtemp())
    model = _model(_SPECS[0])
    optimizer = torch.optim.Adam(model.parameters())
    _step(model, 0)
    optimizer.step()
    graphopt.save(folder / "good", model, optimizer, {"epoch": 3})
    good = (folder / "good").read_bytes()

    def attempt(rng: random.Random) -> str:
        data = bytearray(good)
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place:place] = rng.randbytes(rng.randrange(1, 9))
            case _:
                data[place : place + 8] = rng.randbytes(8)
        (folder / "bad").write_bytes(data)
        graphopt.load(folder / "bad", model, optimizer)
        graphopt.save(folder / "again", model, optimizer, {"epoch": 3})
        return TAKEN if (folder / "again").read_bytes() == good else WRONG

    return attempt


def caches() -> Try:
    """Entries of the caches of backends, bands and links."""
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    from graphopt.model import backend_choice, bands
    from graphopt.network.curve import Curve
    from graphopt.runtime.ranks import link_cache

    seconds = {"eager": 2.0, "inductor": 1.0}
    entries: list[tuple[Any, str, Any, Callable[[str], Any]]] = [
        (backend_choice.CACHE, "a", {"backend": "eager", "reason": "x", "seconds": seconds},
         backend_choice._cached),
        (bands.CACHE, "a", {"5": seconds, "7": seconds}, lambda key: bands._read(key)),
        (link_cache.CACHE, link_cache._key(["a"]),
         vars(Curve(((1024.0, 1e-4), (1e6, 1e-3)), "measured", 1e-10)),
         lambda _: link_cache.find(["a"])),
    ]  # fmt: skip

    def attempt(rng: random.Random) -> str:
        cache, key, entry, find = rng.choice(entries)
        cache.write(key, entry)
        file = cache._file(key)
        text = file.read_text()
        if rng.random() < 0.6:
            data = json.loads(text)
            _change(rng, data)
            text = json.dumps(data)
        else:
            place = rng.randrange(len(text))
            junk = rng.choice(["", "[" * 5000, "9" * 5000, "\x00", "{", text])
            text = text[:place] + junk + text[place + rng.randrange(3) :]
        file.write_text(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = find(key)
        return TAKEN if found else REFUSED

    return attempt


def kept() -> Try:
    """A kept capture and a kept step, changed and signed anew."""
    folder = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(folder)
    from graphopt.capture.kept import Misfit, found
    from graphopt.model.kept_steps import STORE, Steps
    from graphopt.passes.cleanup import Cleanup
    from graphopt.pipeline import Pipeline
    from graphopt.runtime.session import Session

    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    x, plain = torch.randn(4, 8), copy.deepcopy(net)
    graphopt.optimize(net, (x,), backend="eager", passes="cleanup")
    names = ("captures", "steps")
    files = [next((folder / "graphopt" / name).iterdir()) for name in names]
    capture, step = (json.loads(file.read_text().partition("\n")[2]) for file in files)
    capture["graph"] = json.loads(capture["graph"])
    steps = Steps.of(Pipeline((Cleanup(),)), {}, "eager", "off", Session())
    assert steps is not None

    def attempt(rng: random.Random) -> str:
        entry = copy.deepcopy(rng.choice([capture, step]))
        _change(rng, entry)
        if "engine" in entry or "plan" in entry:
            STORE.write(steps.key("digest"), entry)
            return TAKEN if steps.found("digest") else REFUSED
        if rng.random() < 0.95:
            entry["graph"] = json.dumps(entry.get("graph"))
        try:
            one = found(entry, plain, nn.Sequential.forward, (x,), {})
        except Misfit:
            return REFUSED
        return TAKEN if one.guard(plain, x) else WRONG

    return attempt


KINDS: dict[str, Callable[[], Try]] = {
    "texts": texts, "operators": operators, "plans": plans, "states": states, "files": files,
    "caches": caches, "kept": kept,
}  # fmt: skip


def run(kind: str, count: int, seed: int, started: TextIO | None = None) -> Counter[str]:
    """How so many inputs of a kind ended; those that must not are printed."""
    found: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attempt = KINDS[kind]()
        for number in range(seed, seed + count):
            if started is not None:
                started.seek(0)
                started.write(f"{number}\n")
                started.flush()
            try:
                ended = attempt(random.Random(number))
            except GraphoptError:
                ended = REFUSED
            except Exception as error:
                ended = RAW
                print(kind, number, f"{type(error).__name__}: {error}"[:300], file=sys.stderr)
            if ended == WRONG:
                print(kind, number, WRONG, file=sys.stderr)
            found[ended] += 1
    return found


def _in_processes(kind: str, count: int, seed: int) -> Counter[str]:
    """The same, where a process that dies is counted, and the next one goes on behind the input."""
    found: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("w+") as started:
        end = seed + count
        while seed < end:
            command = [
                sys.executable,
                "-m",
                "benchmarks.fuzz_files",
                kind,
                str(end - seed),
                str(seed),
            ]
            done = subprocess.run([*command, started.name], stdout=subprocess.PIPE, text=True)
            if done.returncode == 0:
                return found + Counter(json.loads(done.stdout.splitlines()[-1]))
            last = int(Path(started.name).read_text().split()[0])
            print(kind, last, f"died with {done.returncode}", file=sys.stderr)
            found["died"] += 1
            found["before a death"] += last - seed
            seed = last + 1
    return found


SHARES = {
    "texts": 0.3, "operators": 0.1, "plans": 0.25, "states": 0.1, "files": 0.1, "caches": 0.1,
    "kept": 0.05,
}  # fmt: skip


def main() -> None:
    """See above."""
    if len(sys.argv) == 5:
        with Path(sys.argv[4]).open("w") as started:
            print(json.dumps(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), started)))
        return
    from benchmarks.harness import keep

    count = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    results = {}
    for kind, share in SHARES.items():
        results[kind] = dict(_in_processes(kind, round(count * share), seed))
        print(kind, results[kind], flush=True)
    keep("fuzz_files", {"seed": seed, "inputs": count, "kinds": results})


if __name__ == "__main__":
    main()
