"""Gaussian processes: the log-likelihood, its gradient and predictions, each with its error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor

from graphopt.errors import ArgumentError, IndefiniteError
from graphopt.hierarchical.bounded import Bounded
from graphopt.hierarchical.clusters import ClusterTree, by_points
from graphopt.hierarchical.differentiable import log_determinant, quadratic
from graphopt.hierarchical.kernel_matrix import from_kernel
from graphopt.hierarchical.kernels import (
    Analytic,
    Exponential,
    Gaussian,
    Matern32,
    Matern52,
    Radial,
)
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.probability import norm_factor, trace_factor
from graphopt.hierarchical.processes.gradient_bounds import (
    Changed,
    Correction,
    shift_error,
    trace_error,
)
from graphopt.hierarchical.processes.hodlr import whiten
from graphopt.hierarchical.processes.interpolated import product
from graphopt.hierarchical.processes.inverse import Inverse, Quadratic, Solved
from graphopt.hierarchical.processes.kernel_operator import Change, KernelOperator
from graphopt.hierarchical.processes.system import Covariance
from graphopt.hierarchical.rounding import gamma
from graphopt.notices import warn

_SEMIDEFINITE = (Exponential, Matern32, Matern52, Gaussian)
_PROBES = 96
# New points whose variances are computed at once.
_AT_ONCE = 256
_TRIES = 4
# Of refinement by exact residuals.
_STEPS = 6
# Each with ten times the nugget of the one before.
_ATTEMPTS = 8
# Points of which the spectrum is guessed.
_SAMPLE = 400
# Relative; below it no matrix is asked for.
_FINEST = 1e-10


@dataclass(frozen=True, eq=False)
class Prediction:
    """Of the process without noise, at m new points; all are [m] and float64.

    Attributes:
        mean: expected values.
        variance: their variances.
        mean_bound: the most that each mean may be off.
        variance_bound: the most that each variance may be off.
    """

    mean: Tensor
    variance: Tensor
    mean_bound: Tensor
    variance_bound: Tensor


@dataclass(frozen=True, eq=False)
class _Solution:
    """``x = A^-1 y`` in the order of positions.

    Attributes:
        inverse: of A.
        right: y, [n, 1].
        x: [n, 1].
        away: the most that A x may be away from y, in the norm of A^-1.
        form: ``y^T A^-1 y``.
    """

    inverse: Inverse
    right: Tensor
    x: Tensor
    away: float
    form: Quadratic


class GaussianProcess:
    """Values at points that are normal with mean zero and covariance ``kernel + noise * identity``.

    Nothing is approximated but the arithmetic: matrices are hierarchical, memory grows with the
    number n of points and not with its square. Everything is computed in float64, whatever the
    dtype of points. Bounds hold with a probability of at least 1 - 1e-9 over random probes that do
    not depend on the data, in every call anew.

    Args:
        kernel: such as ``Matern32(scale, variance)``; its tensors get gradients.
        noise: the variance of the noise, a number or a tensor that gets a gradient; zero or more.
        points: [n, d], or [n] for one coordinate.
        tolerance: of the log-likelihood for each point: its bound is at most ``tolerance * n``.
        seed: of the random vectors.
        nugget: where the covariance is not positive definite, this much of the variance is added to
            the noise, ten times more with each attempt, with a warning. Everything is then about
            the covariance with what was added. 0 raises instead.

    Raises:
        ArgumentError: points that are not finite, or a negative noise.
    """

    def __init__(
        self,
        kernel: Radial,
        noise: float | Tensor,
        points: Tensor,
        *,
        tolerance: float = 1e-6,
        seed: int = 0,
        nugget: float = 0.0,
    ) -> None:
        if not 0 <= nugget < math.inf:
            raise ArgumentError(f"nugget={nugget}", hint="pass none below 0")
        if not 0 < tolerance < 1:
            raise ArgumentError(f"a tolerance of {tolerance}", hint="pass one between 0 and 1")
        self.kernel = kernel
        self.noise = (
            noise if isinstance(noise, Tensor) else torch.tensor(float(noise), dtype=torch.float64)
        )
        level = float(self.noise.detach()) if self.noise.numel() == 1 else math.nan
        if not (level >= 0 and math.isfinite(level)):
            raise ArgumentError(
                f"a noise of {self.noise.tolist()}", hint="pass one variance of zero or more"
            )
        points = points.unsqueeze(1) if points.dim() == 1 else points
        self.tree: ClusterTree = by_points(points.detach().double(), 64)
        self.tolerance = tolerance
        self.seed = seed
        # Of what the matrix may have wrong, a factor; what probes are to say of the factor.
        self._strict = 1.0
        self.nugget = nugget
        self._added = 0.0
        self._accuracy = self._goal / (3 * norm_factor(_PROBES) * trace_factor(_PROBES))
        self._operator: KernelOperator | None = None
        self._inverse: Inverse | None = None
        self._state: tuple[int, ...] = ()
        self._solution: _Solution | None = None
        self._changed: tuple[_Solution, list[tuple[Tensor, Tensor]]] | None = None

    def __len__(self) -> int:
        return len(self.tree)

    def log_likelihood(self, y: Tensor) -> Bounded[Tensor]:
        """Of values [n] at the points; a scalar in float64 that autograd knows.

        It is differentiable by the tensors of the kernel, the noise, and `y`. The bound is that of
        the value; `gradient` bounds derivatives.

        Raises:
            ArgumentError: values of another shape, or not finite; a tolerance out of reach.
            IndefiniteError: points that coincide without noise, for instance.
        """
        right = self._checked(y)
        goal = self.tolerance * len(self)
        reached = math.inf
        for _ in range(_TRIES):
            inverse = self.inverse()
            solution = self._solved(right.detach())
            form = solution.form
            determinant = inverse.log_determinant
            wrong = (float(form.wrong) + determinant.wrong) / 2
            bound = (float(form.error) + determinant.error) / 2 + wrong
            if bound <= goal:
                assert isinstance(inverse.operator, KernelOperator)
                products: Callable[[], list[Tensor]] | None = None
                if inverse.operator.changes is not None:
                    products = partial(self._changed_by, solution)
                system = Covariance(inverse, self.noise.double(), products=products)
                total = quadratic(system, right, solution.x, form.value)
                total = total + log_determinant(system)
                value = (total + len(self) * math.log(2 * math.pi)) / -2
                return Bounded(value, bound * (1 + 1e-12))
            reached = min(reached, bound)
            self._tighten(goal, wrong, bound - wrong)
        raise ArgumentError(
            f"an error of {self.tolerance:.1e} for each point is out of reach: "
            f"{reached / len(self):.1e} was reached",
            hint="pass a larger tolerance, or add noise",
        )

    @torch.no_grad()
    def gradient(self, y: Tensor) -> dict[str, Bounded[Tensor]]:
        """The derivatives of `log_likelihood` by the tensors among its hyperparameters, bounded.

        Args:
            y: values [n].

        Returns:
            By ``scale``, ``variance`` and ``noise``, those of them that require a gradient: the
            derivatives and a bound of the error of each of their entries, which also is one of
            those that autograd computes. `tolerance` is not that of derivatives: ask for a smaller
            one where bounds are too large.

        Raises:
            ArgumentError: a kernel whose derivatives are not known in closed form.
        """
        right = self._checked(y.detach())
        self.log_likelihood(y.detach())
        inverse, solution = self.inverse(), self._solved(right)
        operator, x = inverse.operator, solution.x
        assert isinstance(operator, KernelOperator)
        correction = Correction.of(inverse, right, x, *self._product(self.kernel, x))
        by_noise, traces = inverse.log_determinant_gradient
        values, bounds = ([torch.zeros_like(t) for t in (*traces, by_noise)] for _ in range(2))

        def put(number: int, entry: int, factor: float, form: float, error: float) -> None:
            own = float((*traces, by_noise)[number].view(-1)[entry])
            values[number].view(-1)[entry] = (factor * form - own) / 2
            most = abs(factor) * error + 4e-16 * (abs(factor * form) + abs(own))
            bounds[number].view(-1)[entry] = most / 2 * (1 + 1e-9)

        identity = Changed.identity(inverse, x)
        square, wrong, added = correction.form(identity)
        noise = wrong + shift_error(inverse, identity)
        put(len(traces), 0, 1.0, square, noise + abs(added))
        for change, (applied, lost) in zip(self._changes(), self._products(solution), strict=True):
            if change.kind:
                changed = self._stored(operator, change, applied, lost)
                form, error, added = correction.form(changed)
                error += trace_error(inverse, changed)
            else:
                # y^T a - noise a^T a, and tr(A^-1 (A - noise)).
                form = float(solution.form.value) - inverse.shift * square
                error = float(solution.form.error + solution.form.wrong) + inverse.shift * noise
                added = form - float((x * applied).sum())
            # Autograd goes without what was added.
            put(change.parameter, change.entry, change.factor, form, error + abs(added))
        return {
            self._name(parameter): Bounded(values[number], float(bounds[number].max()))
            for number, parameter in enumerate((*operator.parameters, self.noise))
            if parameter.requires_grad
        }

    def _stored(
        self, operator: KernelOperator, change: Change, applied: Tensor, lost: Tensor
    ) -> Changed:
        probes = operator.changed(change, self.inverse().inner)
        norm = operator.norm(change) + change.bound
        return Changed(probes, change.bound, operator.diagonal_bound, norm, applied, lost)

    def _name(self, parameter: Tensor) -> str:
        if parameter is self.noise:
            return "noise"
        return "scale" if parameter is self.kernel.scale else "variance"

    @torch.no_grad()
    def predict(self, y: Tensor, new_points: Tensor) -> Prediction:
        """Mean and variance of the process at new points [m, d], given values y [n]."""
        new = new_points.unsqueeze(1) if new_points.dim() == 1 else new_points
        dimensions = self._points.shape[1]
        if new.dim() != 2 or new.shape[1] != dimensions or not bool(new.isfinite().all()):
            raise ArgumentError(
                f"new points are {tuple(new_points.shape)}, or not finite",
                hint=f"pass finite points of [m, {dimensions}]",
            )
        solution = self._solved(self._checked(y.detach()))
        new = new.detach().double()
        if not len(new):
            return Prediction(*[new[:, 0]] * 4)
        parts = [self._predicted(solution, part) for part in torch.split(new, _AT_ONCE)]
        return Prediction(*(torch.cat(own) for own in zip(*parts, strict=True)))

    def inverse(self) -> Inverse:
        """Of the covariance, with the hyperparameters as they are now."""
        state = tuple(t._version for t in (self.noise, *self.kernel.parameters()))
        if self._inverse is None or state != self._state:
            if state != self._state:
                self._operator, self._added = None, 0.0
            self._state = state
            self._inverse = self._made()
        return self._inverse

    @property
    def _goal(self) -> float:
        """Of the error of the log-determinant that comes from the factor."""
        return min(1.2 * self.tolerance * len(self.tree), 0.5)

    @property
    def _points(self) -> Tensor:
        assert self.tree.points is not None
        return self.tree.points

    @torch.no_grad()
    def _solved(self, right: Tensor) -> _Solution:
        """Of the covariance and values [n, 1].

        Its error by that of the matrix grows with the squared norm of the solution; where that is
        too much, the residual is that of the kernel itself, entry by entry.
        """
        inverse, known = self.inverse(), self._solution
        if known is not None and known.inverse is inverse and torch.equal(known.right, right):
            return known
        goal = self.tolerance * math.sqrt(len(self)) / 10
        solved = inverse.solve(right, goal)
        form, x = inverse.quadratic(right, solved), solved.x
        wrong, rest = inverse.operator.bound + inverse.operator.rounding, 0.0
        allowed = 0.2 * self.tolerance * len(self)
        if float(form.wrong) > allowed and _semidefinite(self.kernel):
            for _ in range(_STEPS):
                applied, lost = self._product(self.kernel, x)
                residual = right - applied - inverse.shift * x
                last = inverse.with_residual(Solved(x, residual, solved.whitened), residual)
                form = inverse.exact_quadratic(right, last, lost)
                solved = inverse.solve(residual, goal)
                x, rest = x + solved.x, float(torch.linalg.vector_norm(lost))
                if float(inverse.energy(last)) <= allowed:
                    break
        # A x differs from the right side by what is left, and by what the matrix has wrong of the
        # last step; in the norm of A^-1.
        smallest = inverse.smallest - inverse.operator.bound
        energy = float(inverse.energy(solved))
        length = float(torch.linalg.vector_norm(solved.x))
        away = math.sqrt(energy * inverse.smallest / smallest)
        away += (wrong * length + rest) / math.sqrt(smallest)
        self._solution = _Solution(inverse, right, x, away, form)
        return self._solution

    def _product(self, kernel: Radial | Analytic, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the matrix of a kernel with x, and bounds of the errors of entries."""
        return product(cast(Analytic, kernel), self.tree, x, 0.01 * self.tolerance * len(self))

    @torch.no_grad()
    def _products(self, solution: _Solution) -> list[tuple[Tensor, Tensor]]:
        """`_product` of all changes with a solution, kept with it.

        The matrix times it is what its equation says.
        """
        known, x = self._changed, solution.x
        if known is None or known[0] is not solution:
            own = solution.right - solution.inverse.shift * x, torch.zeros_like(x)
            found = [self._product(c.kernel, x) if c.kind else own for c in self._changes()]
            known = self._changed = solution, found
        return known[1]

    def _changed_by(self, solution: _Solution) -> list[Tensor]:
        return [applied for applied, _ in self._products(solution)]

    def _changes(self) -> tuple[Change, ...]:
        operator = self.inverse().operator
        assert isinstance(operator, KernelOperator)
        if operator.changes is None:
            raise ArgumentError(
                f"derivatives of {type(self.kernel).__name__} are not known in closed form",
                hint="use Exponential, Matern32, Matern52 or Gaussian",
            )
        return operator.changes

    @torch.no_grad()
    def _made(self) -> Inverse:
        accuracy = self._accuracy
        for attempt in range(_ATTEMPTS + 1):
            try:
                found = self._factored()
            except IndefiniteError:
                if not self.nugget or attempt == _ATTEMPTS:
                    raise
                here = self._points[:1]
                self._added = self.nugget * float(self.kernel(here, here)) * 10.0**attempt
                self._operator, self._accuracy = None, accuracy
                continue
            if attempt:
                warn(
                    f"the covariance is not positive definite: {self._added:.3g} was added to its "
                    "noise",
                )
            return found
        raise AssertionError

    @property
    def _level(self) -> float:
        """Of the noise, with what was added."""
        return float(self.noise.detach()) + self._added

    def _factored(self) -> Inverse:
        if self._operator is None:
            self._operator = KernelOperator(self._matrix(), self.kernel)
        noise = self._level
        last: IndefiniteError | None = None
        for _ in range(3):
            generator = torch.Generator().manual_seed(self.seed)
            try:
                whitening = whiten(self._operator, noise, self._accuracy, generator=generator)
                return Inverse(
                    self._operator,
                    noise,
                    whitening,
                    semidefinite=_semidefinite(self.kernel),
                    probes=_PROBES,
                    generator=generator,
                )
            except IndefiniteError as error:
                last = error
                self._accuracy /= 8
        assert last is not None
        raise last

    def _matrix(self) -> HMatrix:
        level = self._level
        wrong = 1e-3 * self.tolerance
        if level:
            wrong = 0.5 * self.tolerance * len(self) / self._spread(level)
            wrong = min(wrong, 0.05 * level)
        goal = min(max(wrong * self._strict / self._norm(), _FINEST), 1e-5)
        while True:
            try:
                return from_kernel(self.kernel, self.tree, tolerance=goal)
            except ArgumentError:
                if goal > 1e-9:
                    raise
                goal *= 8

    def _spread(self, level: float) -> float:
        """Twice the Frobenius norm of ``A^-1 - identity / noise``, guessed from some points.

        Eigenvalues grow with the number of points; those that a sample does not have are unknown.
        """
        n = len(self)
        generator = torch.Generator().manual_seed(self.seed)
        some = self._points[torch.randperm(n, generator=generator)[:_SAMPLE]]
        values = torch.linalg.eigvalsh(self.kernel(some, some)) * (n / len(some))
        if not bool(values.isfinite().all()) or (len(some) < n and float(values[0]) > level):
            return 2 * math.sqrt(n) / level
        values = values.clamp(min=0)
        return max(2 * float((values / (values + level)).norm()), 1.0) / level

    def _norm(self) -> float:
        """Of the matrix, estimated from random entries."""
        generator = torch.Generator().manual_seed(self.seed)
        pairs = torch.randint(len(self), (2, 20000), generator=generator)
        values = self.kernel(
            self._points[pairs[0]].unsqueeze(1), self._points[pairs[1]].unsqueeze(1)
        )
        return float(values.square().mean().sqrt()) * len(self)

    def _tighten(self, goal: float, wrong: float, error: float) -> None:
        """Ask for more of what the bound is made of."""
        self._inverse = None
        if wrong > goal / 3:
            self._strict *= goal / wrong / 5
            self._operator = None
        if error > goal / 2:
            self._accuracy *= max(goal / error / 3, 1e-3)

    def _checked(self, y: Tensor) -> Tensor:
        """[n, 1] in the order of positions."""
        if y.shape != (len(self),):
            raise ArgumentError(
                f"values are {tuple(y.shape)} for {len(self)} points",
                hint=f"pass a tensor of [{len(self)}]",
            )
        finite = y.detach().isfinite()
        if not bool(finite.all()):
            raise ArgumentError(
                f"value {int((~finite).nonzero()[0])} is not finite", hint="remove it and its point"
            )
        return self.tree.to_positions(y.double()).unsqueeze(1)

    def _predicted(self, data: _Solution, new: Tensor) -> tuple[Tensor, ...]:
        """Mean, variance and their bounds at [m, d]."""
        inverse = data.inverse
        across = self.kernel(self._points, new)
        size = float(self.kernel.rounding(across.abs().max(), new.shape[1]))
        at = new.unsqueeze(1)
        prior = self.kernel(at, at).flatten()
        solved = inverse.solve(across, math.sqrt(self.tolerance))
        form = inverse.quadratic(across, solved)
        # The norm of A^-1 of the right side is the root of what it explains.
        explained = form.value + form.error + form.wrong
        length, root = float(torch.linalg.vector_norm(data.x)), math.sqrt(len(self))
        lost = (gamma(len(self), torch.float64) * across.abs().amax(0) + size) * root * length
        # What the kernel's own rounding does to the quadratic form, to first order and doubled.
        moved = 4 * size * root * (explained / inverse.smallest).sqrt()
        return (
            across.T @ data.x[:, 0],
            prior - form.value,
            explained.sqrt() * data.away + lost,
            form.error + form.wrong + moved + size,
        )


def _semidefinite(kernel: Radial) -> bool:
    return isinstance(kernel, _SEMIDEFINITE) and float(torch.as_tensor(kernel.variance)) >= 0
