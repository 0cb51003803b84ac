"""Hierarchical low-rank matrices whose results carry an error bound that holds."""

from graphopt.hierarchical.admissibility import Flat, Strong, Weak
from graphopt.hierarchical.bounded import Bounded
from graphopt.hierarchical.clusters import ClusterTree, by_index, by_points
from graphopt.hierarchical.dense_matrix import from_dense
from graphopt.hierarchical.entries import from_entries
from graphopt.hierarchical.gaussian_process import GaussianProcess, Prediction
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

__all__ = [
    "Bounded",
    "ClusterTree",
    "Exponential",
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
    "by_index",
    "by_points",
    "from_dense",
    "from_entries",
    "from_kernel",
]
