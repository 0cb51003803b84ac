"""``train.py`` with PyTorch's DistributedDataParallel, to compare with.

Run: ``torchrun --nproc-per-node 2 examples/data_parallel/train_ddp.py``
"""

from __future__ import annotations

from common import DigitsNet, data_parallel, train
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    model = DistributedDataParallel(DigitsNet())
    train(model)


data_parallel(main)
