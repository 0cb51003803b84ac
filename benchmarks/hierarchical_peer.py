"""Products of a kernel matrix by Htool-DDM, for `benchmarks.hierarchical`.

Run with an interpreter that has the module `Htool` (PyPI: Htool-DDM):
``python hierarchical_peer.py DATA EPSILON ETA SYMMETRY ROUNDS``. DATA is an npz file with points
[n, d], the scale of the exponential kernel, vectors [n, q] and their exact products. SYMMETRY is S
or N. Low-rank blocks are recompressed after the build. Prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import Htool
import numpy as np


class Kernel(Htool.VirtualGenerator):
    def __init__(self, points, scale):
        super().__init__()
        self.points = np.ascontiguousarray(points.T)
        self.scale = scale

    def build_submatrix(self, rows, columns, out):
        squared = 0.0
        for own in self.points:
            squared = squared + (own[rows][:, None] - own[columns][None, :]) ** 2
        out[:] = np.exp(-np.sqrt(squared) / self.scale)


def main(path: str, epsilon: float, eta: float, symmetry: str, rounds: int) -> dict[str, object]:
    data = np.load(path)
    clusters = Htool.ClusterTreeBuilder()
    clusters.set_maximal_leaf_size(64)
    tree = clusters.create_cluster_tree(np.asfortranarray(data["points"].T), 2)
    kernel = Kernel(data["points"], float(data["scale"]))
    half = "L" if symmetry == "S" else "N"
    start = time.process_time()
    matrix = Htool.HMatrixTreeBuilder(epsilon, eta, symmetry, half).build(kernel, tree, tree)
    built = time.process_time() - start
    Htool.recompression(matrix)
    vectors = np.asfortranarray(data["vectors"])
    products = np.stack([matrix * own for own in vectors.T], 1)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        matrix * vectors[:, 0]
        times.append(time.perf_counter() - start)
    return {
        "epsilon": epsilon,
        "eta": eta,
        "symmetry": symmetry,
        "build_cpu_s": built,
        "matvec_s": statistics.median(times),
        # Of a Gaussian vector, the mean square of the error is that of all entries.
        "error": float(np.sqrt(((products - data["products"]) ** 2).sum(0).mean())),
        "of_dense": 1 / float(matrix.get_local_information()["Compression_ratio"]),
    }


if __name__ == "__main__":
    _, data, epsilon, eta, symmetry, rounds = sys.argv
    print(json.dumps(main(data, float(epsilon), float(eta), symmetry, int(rounds))))
