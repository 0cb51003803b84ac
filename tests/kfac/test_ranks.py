"""K-FAC over several ranks: one process with the whole batch is the oracle."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import RankError, StateError
from graphopt.model.controller import controller_of
from graphopt.plan.kfac import OUT_IN, Block, Curvature, Side
from graphopt.runtime.kfac.division import Division
from graphopt.runtime.kfac.owners import Grid, assign, cost, measure, sizes, units
from graphopt.runtime.kfac.solve import solver
from tests.support.ranks import in_processes, on_ranks

CLOSE = 1e-8
BATCH = 8
SPEC = "kfac{damping=0.02,fraction=%s,interval=%s}"


class Net(nn.Module):
    """Weights of several kinds, one parameter without a block, and a head that may be unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(1, 3, 3)
        self.mix = nn.Linear(48, 7)
        self.norm = nn.LayerNorm(7)
        self.gain = nn.Parameter(torch.rand(7))
        self.head = nn.Linear(7, 4, bias=False)
        self.other = nn.Linear(7, 2)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.conv(x)).flatten(1)
        h = torch.tanh(self.norm(self.mix(h))) * self.gain.exp()
        return self.head(h), self.other(h)


def _data(step: int) -> tuple[Tensor, Tensor]:
    """Batches that differ little, so that intervals grow."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 1, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (BATCH,), generator=generator)
    generator.manual_seed(step + 1)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    return images + 0.05 * noise, labels


class Run:
    """A model in training; on several ranks each takes its part of the batch."""

    def __init__(self, spec: str, rank: int = 0, world: int = 1, micro: int = 1) -> None:
        self.rank, self.world, self.micro, self.step = rank, world, micro, 0
        self.model = graphopt.optimize(Net(), passes=spec, backend="eager", verify="structure")
        self.sgd = torch.optim.SGD(self.model.parameters(), lr=2e-4, momentum=0.9)

    def steps(self, count: int) -> list[dict[str, Tensor]]:
        """Gradients of every step by parameter."""
        found = []
        for _ in range(count):
            self.sgd.zero_grad()
            for index in range(self.micro):
                if index + 1 < self.micro:
                    with self.model.no_sync():
                        self._backward(index)
                else:
                    self._backward(index)
            named = self.model.named_parameters()
            found.append({n: p.grad.clone() for n, p in named if p.grad is not None})
            self.sgd.step()
            self.step += 1
        return found

    def _backward(self, index: int) -> None:
        images, labels = (
            t.chunk(self.world)[self.rank].chunk(self.micro)[index] for t in self.batch
        )
        logits, _ = self.model(images)
        (F.cross_entropy(logits, labels) / self.micro).backward()

    @property
    def batch(self) -> tuple[Tensor, Tensor]:
        return _data(self.step)

    def saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.sgd.state_dict(),
            "passes": graphopt.state_dict(self.model),
            "step": self.step,
        }

    def load(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.sgd.load_state_dict(saved["optimizer"])
        graphopt.load_state_dict(self.model, saved["passes"])
        self.step = saved["step"]

    @property
    def state(self) -> dict[str, Tensor]:
        controller = controller_of(self.model)
        assert controller is not None
        return controller.session.state("kfac")

    @property
    def division(self) -> Division:
        controller = controller_of(self.model)
        assert controller is not None
        found = controller.session.part("kfac").division
        assert isinstance(found, Division)
        return found


def _block(weight: str, bias: str = "", size: int = 4, left: str = "") -> Block:
    sides = Side(left or f"{weight}:G", size), Side(f"{weight}:A", 2)
    return Block("kronecker", weight, bias, 1, size, 2, OUT_IN, 0, *sides)


def test_grid() -> None:
    shapes = [
        Grid.of(w, f).rows for w, f in ((4, 0), (4, 0.5), (4, 1), (6, 0.9), (8, 0.7), (2, 0.1))
    ]
    assert shapes == [1, 2, 4, 3, 4, 1]
    grid = Grid.of(6, 0.5)
    assert [grid.column_ranks(c) for c in range(grid.columns)] == [[0, 2, 4], [1, 3, 5]]
    assert [grid.row_ranks(r) for r in range(grid.rows)] == [[0, 1], [2, 3], [4, 5]]
    for rank in range(6):
        assert grid.column_ranks(grid.column(rank))[grid.row(rank)] == rank
        assert grid.row_ranks(grid.row(rank))[grid.column(rank)] == rank


def test_blocks_that_share_something_have_one_owner() -> None:
    blocks = [_block("a", "b"), _block("c"), _block("d", left="c:G"), _block("e", "f")]
    blocks += [_block("g", "b"), _block("h", "e")]
    found = units(blocks)
    assert [[b.weight for b in members] for members in found.values()] == [
        ["a", "g"],
        ["c", "d"],
        ["e", "h"],
    ]
    # One that joins two units that were apart.
    joined = units([*blocks, _block("c", "b")])
    assert sorted(len(members) for members in joined.values()) == [2, 5]


def test_longest_first() -> None:
    costs = {"a": 3.0, "b": 5.0, "c": 4.0, "d": 3.0, "e": 3.0}
    assert assign(costs, [0.0, 0.0]) == {"a": 1, "b": 0, "c": 1, "d": 0, "e": 1}
    assert assign({"x": 1.0}, [2.0, 1.0, 1.0]) == {"x": 1}


@pytest.mark.parametrize("name", ["factored", "eigen", "ekfac", "lowrank"])
def test_costs_grow_with_size(name: str) -> None:
    blocks = [_block("a", size=8), _block("b", size=2048)]
    assert sizes(blocks) == [2, 8, 512]
    state = torch.random.get_rng_state()
    seconds = measure(solver(name), [2, 8], torch.device("cpu"))
    assert torch.equal(state, torch.random.get_rng_state())
    assert set(seconds) == {2, 8}
    assert min(seconds.values()) > 0
    fixed = {2: 1e-5, 8: 1e-4, 512: 1e-2}
    assert cost(blocks[1:], fixed) == pytest.approx(64 * 1e-2 + 1e-5, rel=0.01)


def _compare(found: list[dict[str, Tensor]], wanted: list[dict[str, Tensor]]) -> float:
    """Largest relative difference of any gradient."""
    assert [sorted(f) for f in found] == [sorted(w) for w in wanted]
    return max(
        float((f[n] - w[n]).norm() / w[n].norm())
        for f, w in zip(found, wanted, strict=True)
        for n in w
    )


def _intervals(state: dict[str, Tensor]) -> dict[str, list[int]]:
    return {n: t.tolist() for n, t in state.items() if n.startswith("interval/")}


def _equals_whole_batch(rank: int, world: int, cases: Sequence[tuple[str, int]], kept: str) -> None:
    wanted, intervals = torch.load(kept)
    for spec, micro in cases:
        run = Run(spec, rank, world, micro)
        found = run.steps(len(wanted))
        assert _compare(found, wanted) < CLOSE, spec
        assert _intervals(run.state) == intervals, spec
        owned = {n for n in run.state if n.startswith("now/")}
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, owned)
        # Each statistic has one owner, and no owner has all of them.
        assert sum(map(len, everybody)) == len(set().union(*everybody)) == len(intervals)
        assert max(map(len, everybody)) < len(intervals)
        assert "kfac sends per step" in run.model.explain()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_process_with_the_whole_batch(tmp_path: Path, world: int) -> None:
    run = Run(SPEC % (0, "stale"))
    kept = (run.steps(12), _intervals(run.state))
    assert any(interval != [1, 1, 12] for interval in kept[1].values()), "no interval ever grew"
    torch.save(kept, tmp_path / "wanted")
    # Every fraction, with and without groups, and micro-batches with and without them.
    none, half, all_ = (SPEC % (fraction, "stale") for fraction in (0, 0.5, 1))
    cases = [(none, 1), (f"{all_},group_gradients", 1), (half, 2)]
    if world == 4:
        cases = [(none, 1), (half, 1), (all_, 1)]
        cases += [(f"{half},group_gradients", 1), (f"{none},group_gradients", 2)]
    on_ranks(tmp_path, world, _equals_whole_batch, world, cases, str(tmp_path / "wanted"))


def _options(rank: int, world: int, specs: dict[str, float], kept: str) -> None:
    wanted = torch.load(kept)
    for spec, bound in specs.items():
        assert _compare(Run(spec, rank, world).steps(3), wanted[spec.split("@")[0]]) < bound, spec


@pytest.mark.slow
@pytest.mark.distributed
def test_solvers_and_wire(tmp_path: Path) -> None:
    base = "kfac{damping=0.02,interval=1,%s}"
    specs = {base % f"solver={name}": CLOSE for name in ("eigen", "ekfac", "lowrank")}
    specs[base % "fisher=type2"] = specs[base % "ema=0.9"] = CLOSE
    # The input side of `mix` keeps as many directions as the batch has examples.
    specs[base % "max_dim=40,rank=9,fraction=1"] = CLOSE
    specs[base % "max_dim=40,rank=9,ema=0.5,wire=bf16"] = 0.05
    specs[base % "clip=0.01"] = specs[base % "clip=0.01,fraction=1"] = CLOSE
    wanted = {spec: Run(spec).steps(3) for spec in specs}
    exact = base % "solver=factored"
    narrow = base % "wire=bf16"
    wanted[narrow] = Run(exact).steps(3)
    specs[narrow] = 0.05
    torch.save(wanted, tmp_path / "wanted")
    on_ranks(tmp_path, 2, _options, 2, specs, str(tmp_path / "wanted"))


def _save(rank: int, world: int, spec: str, folder: str) -> None:
    run = Run(spec, rank, world)
    run.steps(4)
    saved = run.saved()
    torch.save(saved, f"{folder}/saved{rank}")
    torch.save(run.steps(4), f"{folder}/after{rank}")


def _resume(rank: int, world: int, spec: str, folder: str) -> None:
    run = Run(spec, rank, world)
    run.load(torch.load(f"{folder}/saved0"))
    found = run.steps(4)
    wanted = torch.load(f"{folder}/after0")
    if world == 2:
        assert _compare(found, torch.load(f"{folder}/after{rank}")) == 0
    assert _compare(found, wanted) < CLOSE
    if world > 1:
        assert "owners" not in run.state
    # Also where the model runs already, and keeps other tensors than the saved ones.
    run.load(torch.load(f"{folder}/saved0"))
    assert _compare(run.steps(4), wanted) < CLOSE


@pytest.mark.slow
@pytest.mark.distributed
def test_state_moves_between_world_sizes(tmp_path: Path) -> None:
    spec = SPEC % (0.5, "stale")
    on_ranks(tmp_path, 2, _save, 2, spec, str(tmp_path))
    first, second = (torch.load(tmp_path / f"saved{rank}")["passes"] for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    whole = Run(spec)
    whole.steps(1)
    assert {f"kfac/{n}" for n in whole.state if n.startswith("now/")} <= first.keys()
    on_ranks(tmp_path, 2, _resume, 2, spec, str(tmp_path))
    on_ranks(tmp_path, 4, _resume, 4, spec, str(tmp_path))
    _resume(0, 1, spec, str(tmp_path))


def _hard_cases(rank: int, world: int) -> None:
    _not_finite(rank, world)
    _other_outputs(rank, world)


def _not_finite(rank: int, world: int) -> None:
    run = Run(SPEC % (0, "1"), rank, world)
    run.steps(2)
    before = {n: t.clone() for n, t in run.state.items() if n.startswith("now/")}
    images, labels = (t.chunk(world)[rank] for t in run.batch)
    if rank == 1:
        images = images * float("nan")
    with pytest.warns(RuntimeWarning, match="not finite"):
        F.cross_entropy(run.model(images)[0], labels).backward()
    assert before
    assert all(torch.equal(run.state[name], before[name]) for name in before)
    with run.model.no_sync():
        F.cross_entropy(run.model(images)[0], labels).backward()
    with pytest.raises(StateError, match="not finished"):
        graphopt.state_dict(run.model)


def _other_outputs(rank: int, world: int) -> None:
    for spec in (SPEC % (0, "1"), SPEC % (1, "1")):
        model = Run(spec).model
        images, _ = (t.chunk(world)[rank] for t in _data(0))
        model(images)[rank].square().mean().backward()
        found = {n: p.grad for n, p in model.named_parameters()}
        flat = torch.cat([g.reshape(-1) for g in found.values() if g is not None])
        assert len(flat) == sum(p.numel() for p in model.parameters())
        assert bool(flat.isfinite().all())
        other = flat.clone()
        dist.broadcast(other, 0)
        assert torch.equal(flat, other)
        model.zero_grad()
        model(images)[0].square().mean().backward()
        assert model.other.weight.grad is None
        assert model.head.weight.grad is not None


@pytest.mark.distributed
def test_nan_on_one_rank_and_other_outputs_on_each(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _hard_cases, 2)


def _counts(rank: int, world: int) -> None:
    steps = 3
    sent = {}
    for fraction in (0, 0.5, 1):
        run = Run(SPEC % (fraction, "1"), rank, world)
        run.steps(steps)
        sent[fraction] = dict(run.division.exchange.sent)
    entries = sum(side.entries for side in _sides(run))
    preconditioned = [
        p for n, p in run.model.named_parameters() if n != "gain" and "other" not in n
    ]
    numbers = sum(p.numel() for p in preconditioned)
    gain = 2 * (world - 1) * 7 * 8 * steps
    for kinds in sent.values():
        assert kinds["statistics"] == (world - 1) * entries * 8 * steps
    # To the owners once, and back once: the same as an all-reduce.
    assert sent[0]["gradients"] == 2 * (world - 1) * numbers * 8 * steps + gain
    assert sent[1]["gradients"] == 2 * (world - 1) * numbers * 8 * steps + gain
    assert "solutions" not in sent[0]
    assert sent[1]["solutions"] > 0


def _sides(run: Run) -> list[Any]:
    plan = controller_of(run.model).variants[0].entry.plan  # type: ignore[union-attr]
    curvature = plan.part(Curvature)
    assert curvature is not None
    return [side for block in curvature.blocks for side in block.sides]


@pytest.mark.distributed
def test_bytes_are_counted_exactly(tmp_path: Path) -> None:
    on_ranks(tmp_path, 4, _counts, 4)


def _dies(rank: int, store: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=8),
    )
    torch.manual_seed(0)
    model = graphopt.optimize(nn.Linear(3, 2), passes=SPEC % (0, "1"), backend="eager")
    for _ in range(2):
        model(torch.ones(4, 3)).square().mean().backward()
    if rank == 1:
        os._exit(0)
    time.sleep(0.5)
    try:
        model(torch.ones(4, 3)).square().mean().backward()
    except RankError as error:
        Path(folder, "error").write_text(str(error))
    os._exit(0)


@pytest.mark.distributed
def test_a_rank_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    in_processes(2, _dies, str(tmp_path / "store"), str(tmp_path))
    text = (tmp_path / "error").read_text()
    assert "the curvature of step 3 did not arrive: rank 1 did not answer" in text


def _some_ranks_of_a_job(rank: int) -> None:
    group = dist.new_group([1, 2, 3, 4])
    if rank == 0:
        return
    model, plain = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    plain.load_state_dict(model.state_dict())
    own = dist.new_group([rank], use_local_synchronization=True)
    graphopt.optimize(model, passes=SPEC % (0.5, 1), mesh=group, backend="eager")
    plain.load_state_dict(model.state_dict())  # all have what the first rank had
    graphopt.optimize(plain, passes=SPEC % (0, 1), mesh=own, backend="eager")
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = x[4 * (rank - 1) : 4 * rank]
    F.cross_entropy(model(mine), mine.argmax(1) % 3).backward()
    F.cross_entropy(plain(x), x.argmax(1) % 3).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.allclose(one.grad, other.grad, atol=CLOSE)


@pytest.mark.distributed
def test_a_grid_on_some_ranks_of_a_job(tmp_path: Path) -> None:
    on_ranks(tmp_path, 5, _some_ranks_of_a_job)
