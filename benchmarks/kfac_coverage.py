"""Which parameters of 22 micro-models K-FAC libraries precondition, and whether rightly.

Run ``python -m benchmarks.kfac_coverage``; the table goes to the terminal and to
``benchmarks/results/kfac_coverage.json`` unless a library is not installed.

graphopt is held to the preconditioned gradient that dense linear algebra gives (8 digits, double
precision). Of the others the statistics are compared with those of `tests.kfac.brute_force`, one
constant factor per layer left free, with positions of an example counted apart (expand), averaged
(reduce) or, in norms, each as an example, and with the bias in one block with the weight or apart.
Cells:

- ``ok``: every parameter is preconditioned and its statistics are right;
- ``uneven``: the same, but the constant factors differ between the layers of the model, so that one
  damping means different things to them: a matter of convention for positions, a defect where a
  layer counts twice because it is computed again;
- ``skipped``: right where it is preconditioned, the named parameters keep their plain gradient;
- ``coarse``: groups of a convolution share the statistics of their mean patch, which is not exact
  even for one example at one position;
- ``wrong``: some statistic is proportional to none of the definitions;
- ``error``: the library raised.
"""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

import graphopt
from benchmarks.harness import keep
from benchmarks.kfac_peers import PEERS, Statistics, version
from tests.kfac.brute_force import expected, factors, unit_wise
from tests.kfac.cases import NAMES, TWENTY, Case, case
from tests.kfac.explicit import compute
from tests.kfac.tape import Use

DAMPING = 1e-3
SPEC = f"kfac{{damping={DAMPING},interval=1,solver=factored}}"
TOLERANCE = 1e-5  # peers compute some of it in single precision
EXACT = 1e-8
MISSING = "not installed"
MEAN_PATCH = "mean patch of the groups"


@dataclass(frozen=True)
class Cell:
    """What one library does with one model.

    Attributes:
        verdict: a word of the module's docstring.
        detail: parameters, scales or the error behind it.
    """

    verdict: str
    detail: str = ""


def graphopt_cell(one: Case) -> Cell:
    """The pass `kfac` against the dense solution."""
    wanted = expected(*compute(one), DAMPING)
    plain = copy.deepcopy(one.model)
    one.loss(plain(one.x)).backward()
    kept = {name: p.grad for name, p in plain.named_parameters()}
    try:
        model = graphopt.optimize(copy.deepcopy(one.model), passes=SPEC, backend="eager")
        one.loss(model(one.x)).backward()
    except Exception as error:  # of any kind: that is the finding
        return _error(error)
    skipped, wrong = [], []
    for name, p in model.named_parameters():
        assert p.grad is not None
        if _distance(p.grad, wanted[name]) < EXACT:
            continue
        (skipped if _distance(p.grad, kept[name]) < EXACT else wrong).append(name)
    if wrong:
        return Cell("wrong", ", ".join(wrong))
    return Cell("skipped", ", ".join(skipped)) if skipped else Cell("ok")


def peer_cell(one: Case, run: Callable[[Case], tuple[Statistics, set[str]]]) -> Cell:
    """A peer's statistics against the brute-force ones."""
    try:
        statistics, covered = run(one)
        found = {name: _scale(one, name, statistic) for name, statistic in statistics.items()}
    except ImportError as error:
        return Cell(MISSING, str(error))
    except Exception as error:  # of any kind: that is the finding
        return _error(error)
    wrong = [name for name, scale in found.items() if scale is None]
    if wrong:
        return Cell("wrong", ", ".join(wrong))
    left_alone = [name for name, _ in one.model.named_parameters() if name not in covered]
    known = {name: scale for name, scale in found.items() if scale}
    scales = "; ".join(f"{name} {how} x{factor:.4g}" for name, (factor, how) in known.items())
    if left_alone:
        return Cell("skipped", ", ".join(left_alone) + (f" ({scales})" if scales else ""))
    if any(how == MEAN_PATCH for _, how in known.values()):
        return Cell("coarse", scales)
    values = [factor for factor, _ in known.values()]
    even = max(values) - min(values) <= TOLERANCE * max(values)
    return Cell("ok" if even else "uneven", scales)


def _scale(
    one: Case, name: str, statistic: tuple[Tensor, Tensor] | Tensor
) -> tuple[float, str] | None:
    """The factor of a statistic to the first definition that it is proportional to."""
    for definition, reference in _definitions(one, name):
        parts = statistic if isinstance(statistic, tuple) else (statistic,)
        each = [_ratio(p, r) for p, r in zip(parts, reference, strict=True)]
        if None not in each:
            return float(torch.tensor(each, dtype=torch.float64).prod()), definition
    return None


def _definitions(one: Case, name: str) -> list[tuple[str, tuple[Tensor, ...]]]:
    tape, loss = compute(one)
    found: list[tuple[str, tuple[Tensor, ...]]] = []
    for reduce in (False, True):
        if reduce and one.name == "tied_embedding":
            continue
        for weight in factors(tape, loss, reduce=reduce):
            if weight.weight == name:
                left, right = weight.left.squeeze(0), weight.right.squeeze(0)
                label = "reduce" if reduce else "expand"
                found.append((label, (left, right)))
                if weight.bias:
                    found.append((f"{label}, bias apart", (left, right[..., :-1, :-1])))
    for use in tape.uses:
        if use.weight == name and use.known.shape[2] > 1:
            found.append((MEAN_PATCH, _of_mean_patch(use, loss)))
    for per_position in (False, True):
        for norm in unit_wise(tape, loss, per_position=per_position):
            if norm.scale == name:
                label = "per position" if per_position else "per example"
                found.append((label, (norm.moments,)))
    return found


def _of_mean_patch(use: Use, loss: Tensor) -> tuple[Tensor, Tensor]:
    (gradient,) = torch.autograd.grad(loss, use.output, retain_graph=True)
    patch, outputs = use.known.detach().mean(2), gradient.flatten(2)
    return (
        torch.einsum("nti,ntj->ij", outputs, outputs),
        torch.einsum("nti,ntj->ij", patch, patch),
    )


def _ratio(mine: Tensor, reference: Tensor) -> float | None:
    """The factor between two tensors; ``None`` if they are not proportional."""
    mine = mine.detach().double()
    if mine.shape != reference.shape:
        return None
    factor = float((mine * reference).sum() / reference.square().sum())
    if float((mine - factor * reference).norm()) > TOLERANCE * float(mine.norm()):
        return None
    return factor


def _distance(mine: Tensor, reference: Tensor | None) -> float:
    assert reference is not None
    return float((mine - reference).norm() / reference.norm())


def _error(error: Exception) -> Cell:
    text = (str(error).splitlines() or [""])[0]
    return Cell("error", f"{type(error).__name__}: {text[:160]}")


def main() -> None:
    """Print the table and keep it."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    columns: dict[str, Callable[[Case], Cell]] = {"graphopt": graphopt_cell}
    versions = {}
    for peer, (distribution, run) in PEERS.items():
        versions[peer] = version(distribution)
        columns[peer] = lambda one, run=run: peer_cell(one, run)  # type: ignore[misc]
    names = sys.argv[1:] or NAMES
    table: dict[str, dict[str, Cell]] = {}
    print(f"{'':16}" + "".join(f"{column:>15}" for column in columns))
    for name in names:
        table[name] = {column: run(case(name)) for column, run in columns.items()}
        print(f"{name:16}" + "".join(f"{cell.verdict:>15}" for cell in table[name].values()))
    counted = [row for name, row in table.items() if name in TWENTY]
    counts = {
        verdict: {c: sum(row[c].verdict == verdict for row in counted) for c in columns}
        for verdict in ("ok", "uneven")
    }
    for verdict, numbers in counts.items():
        label = f"{verdict} of {len(counted)}"
        print(f"{label:16}" + "".join(f"{n:>15}" for n in numbers.values()))
    for name, row in table.items():
        for column, cell in row.items():
            if cell.detail:
                print(f"{name}, {column}: {cell.verdict}: {cell.detail}")
    missing = any(cell.verdict == MISSING for row in table.values() for cell in row.values())
    if len(names) == len(NAMES) and not missing:
        rows = {name: {c: asdict(cell) for c, cell in row.items()} for name, row in table.items()}
        result = {"spec": SPEC, "versions": versions, "of 20": counts, "cases": rows}
        print(f"kept in {keep('kfac_coverage', result)}")


if __name__ == "__main__":
    main()
