"""Every operator that a text may call, with many sets of arguments: nothing runs, nothing crashes.

    python -m benchmarks.sweep_operators [SETS [SEED]]

reads a text for each operator of ATen that is allowed and each of SETS random sets of arguments (20
by default), in processes of their own, and keeps how they ended. A text must be read or refused by
one of graphopt's errors. No kernel may run: whatever an operator gives while a text is read is a
fake tensor, which has no memory; and the random stream stays where it is.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphopt
from benchmarks.fuzz_texts import call
from graphopt.errors import GraphoptError
from graphopt.text.operators import is_allowed

READ, REFUSED, RAW, RAN = "read", "refused", "raw exception", "ran a kernel"
SECONDS = 3600.0  # for one process


def names() -> list[str]:
    """Operators of ATen that a text may call."""
    found = []
    for name in sorted(n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::")):
        packet, _, overload = name.removeprefix("aten::").partition(".")
        if is_allowed(getattr(getattr(torch.ops.aten, packet), overload or "default")):
            found.append(name)
    return found


class Kernels(TorchDispatchMode):
    """Sees what runs below fake tensors.

    Attributes:
        ran: operators that gave a tensor with memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(  # type: ignore[override]
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run it, and look at what it gives."""
        found = func(*args, **(kwargs or {}))
        for value in tree_leaves(found):
            real = isinstance(value, Tensor) and not isinstance(value, FakeTensor)
            if real and value.device.type != "meta":
                self.ran.append(str(func))
        return found


def attempt(name: str, rng: random.Random) -> str:
    """How reading one call ends."""
    text = call(rng, name)
    before = torch.get_rng_state()
    with warnings.catch_warnings(), Kernels() as kernels:
        warnings.simplefilter("ignore")
        try:
            graphopt.parse_graph(text)
            ended = READ
        except GraphoptError:
            ended = REFUSED
        except Exception as error:
            print(name, RAW, f"{type(error).__name__}: {error}"[:300], file=sys.stderr)
            return RAW
    if kernels.ran or not torch.equal(before, torch.get_rng_state()):
        print(name, RAN, kernels.ran[:3], text.splitlines()[7], file=sys.stderr)
        return RAN
    return ended


def run(first: int, end: int, seed: int, started: TextIO) -> Counter[str]:
    """Inputs of these numbers: number ``n`` calls operator ``n % count``."""
    found: Counter[str] = Counter()
    known = names()
    for number in range(first, end):
        started.seek(0)
        started.write(f"{number}\n")
        started.flush()
        found[attempt(known[number % len(known)], random.Random(seed * 10**9 + number))] += 1
    return found


def in_processes(first: int, end: int, seed: int) -> Counter[str]:
    """The same in a process of its own; where it dies, the next one goes on behind the input."""
    found: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("w+") as started:
        while first < end:
            words = [*map(str, (first, end, seed)), started.name]
            command = [sys.executable, "-m", "benchmarks.sweep_operators", *words]
            try:
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                why = "hung"
            else:
                if done.returncode == 0:
                    return found + Counter(json.loads(done.stdout.splitlines()[-1]))
                why = "died"
            last = int(Path(started.name).read_text().split()[0])
            known = names()
            print(known[last % len(known)], "number", last, why, file=sys.stderr)
            found[why] += 1
            found["before that"] += last - first
            first = last + 1
    return found


def sweep(sets: int, seed: int, workers: int = 2) -> dict[str, Any]:
    """All operators with so many sets of arguments each."""
    total = sets * len(names())
    size = -(-total // workers)
    pieces: Sequence[int] = range(0, total, size)
    with ThreadPoolExecutor(workers) as pool:
        ends = pool.map(lambda first: in_processes(first, min(first + size, total), seed), pieces)
        found: Counter[str] = sum(ends, Counter())
    return {"operators": len(names()), "sets": sets, "inputs": total, "ended": dict(found)}


def main() -> None:
    """See above."""
    if len(sys.argv) == 5:
        first, end, seed = map(int, sys.argv[1:4])
        with Path(sys.argv[4]).open("w") as started:
            print(json.dumps(run(first, end, seed, started)))
        return
    from benchmarks.harness import keep

    sets = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    found = sweep(sets, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    print(json.dumps(found, indent=1))
    keep("sweep_operators", found)


if __name__ == "__main__":
    main()
