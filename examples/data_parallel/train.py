"""Data-parallel training of a small ResNet on digits with graphopt.

``train_ddp.py`` is the same script with PyTorch's DistributedDataParallel. Run:
``torchrun --nproc-per-node 2 examples/data_parallel/train.py``
"""

from __future__ import annotations

from common import DigitsNet, data_parallel, show, train

import graphopt


def main() -> None:
    model = graphopt.optimize(DigitsNet(), backend="eager")
    train(model)
    show(model.explain())


data_parallel(main)
