"""Hierarchical low-rank matrices whose results carry an error bound that holds."""

from graphopt.hierarchical.admissibility import Flat, Strong, Weak
from graphopt.hierarchical.arithmetic.algebra import add, scaled, shifted
from graphopt.hierarchical.arithmetic.distributed import Distributed
from graphopt.hierarchical.arithmetic.factorization import Factorization
from graphopt.hierarchical.arithmetic.factorize import cholesky, lu
from graphopt.hierarchical.arithmetic.inverses import inverse
from graphopt.hierarchical.arithmetic.products import multiply
from graphopt.hierarchical.bounded import Bounded
from graphopt.hierarchical.clusters import ClusterTree, by_index, by_points
from graphopt.hierarchical.dense_matrix import from_dense
from graphopt.hierarchical.entries import from_entries
from graphopt.hierarchical.kernel_matrix import from_kernel
from graphopt.hierarchical.kernels import (
    Exponential,
    Gaussian,
    InverseDistance,
    Logarithm,
    Matern32,
    Matern52,
)
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.processes.gaussian_process import GaussianProcess, Prediction

__all__ = [
    "Bounded",
    "ClusterTree",
    "Distributed",
    "Exponential",
    "Factorization",
    "Flat",
    "Gaussian",
    "GaussianProcess",
    "HMatrix",
    "InverseDistance",
    "Logarithm",
    "Matern32",
    "Matern52",
    "Prediction",
    "Strong",
    "Weak",
    "add",
    "by_index",
    "by_points",
    "cholesky",
    "from_dense",
    "from_entries",
    "from_kernel",
    "inverse",
    "lu",
    "multiply",
    "scaled",
    "shifted",
]
