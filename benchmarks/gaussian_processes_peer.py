"""The log-likelihood of a Gaussian process and its gradient by GPyTorch.

Run by `benchmarks.gaussian_processes` with an interpreter that has gpytorch (and pykeops):
``python gaussian_processes_peer.py DATA MODE [ITERATIONS]``. DATA is a file of torch.save. MODE is
``cholesky``, ``iterative`` (the matrix in memory, conjugate gradients and stochastic Lanczos
quadrature) or ``keops`` (the same without the matrix). ITERATIONS is the most of one solve; the
library's own limit where it is left out. Prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import time
import warnings

import gpytorch
import linear_operator
import torch


class Model(gpytorch.models.ExactGP):
    def __init__(self, data, likelihood, lazy):
        super().__init__(data["points"], data["values"], likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        kernels = gpytorch.kernels.keops if lazy else gpytorch.kernels
        self.covar_module = gpytorch.kernels.ScaleKernel(kernels.MaternKernel(nu=1.5))
        self.covar_module.base_kernel.lengthscale = data["scale"]
        self.covar_module.outputscale = data["variance"]

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def main(path: str, mode: str, iterations: int | None) -> dict[str, object]:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    data = torch.load(path)
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Model(data, likelihood, mode == "keops").double()
    likelihood.noise = data["noise"]
    model.train()
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    n = len(data["values"])
    products = []
    if mode != "cholesky":
        inner = linear_operator.utils.linear_cg

        def counted(matmul, *args, **kwargs):
            def timed(x):
                start = time.perf_counter()
                found = matmul(x)
                products.append(time.perf_counter() - start)
                return found

            return inner(timed, *args, **kwargs)

        linear_operator.utils.linear_cg = counted
    with contextlib.ExitStack() as stack:
        if mode == "cholesky":
            stack.enter_context(gpytorch.settings.fast_computations(False, False, False))
        else:
            stack.enter_context(gpytorch.settings.max_cholesky_size(0))
            if mode == "keops":
                # GPyTorch 1.15.2 cannot make its preconditioner from KeOps kernels: a TypeError.
                stack.enter_context(gpytorch.settings.max_preconditioner_size(0))
            if iterations is not None:
                stack.enter_context(gpytorch.settings.max_cg_iterations(iterations))
        start, start_cpu = time.perf_counter(), time.process_time()
        value = objective(model(data["points"]), data["values"]) * n
        forward = time.perf_counter() - start
        value.backward()
        seconds = time.perf_counter() - start
        cpu = time.process_time() - start_cpu
    return {
        "value": float(value),
        "noise gradient": float(likelihood.noise_covar.raw_noise.grad.sum()),
        "seconds": seconds,
        "CPU seconds": cpu,
        "forward seconds": forward,
        "products": len(products),
        "seconds of products": sum(products),
        "GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "version": gpytorch.__version__,
    }


if __name__ == "__main__":
    limit = int(sys.argv[3]) if len(sys.argv) > 3 else None
    print(json.dumps(main(sys.argv[1], sys.argv[2], limit)))
