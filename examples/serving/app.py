"""A classifier of handwritten digits as a web service that computes concurrent requests together.

Trains a small network on scikit-learn's digits (a few seconds), optimizes it for inference and
serves it on the loopback interface. Needs the extra `serving`. Run it, and `client.py` beside it:
``python examples/serving/app.py [PORT]``
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.extras import extra
from graphopt.runtime.serving import Application

with extra("serving", "this example"):
    import uvicorn
with extra("examples", "this example"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

PORT = 8000


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images are (n, 1, 8, 8)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.2, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1024, 10),
    )


def trained(epochs: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model, (images, labels, _, _) = network(), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    model = graphopt.optimize(trained(), passes="cleanup,fold_inference", backend="eager")
    dispatcher = graphopt.serve(model, torch.rand(1, 8, 8))  # one request: no batch dimension
    port = int(sys.argv[1]) if len(sys.argv) > 1 else PORT
    # The application closes the dispatcher when the server ends, and answers what is queued first.
    uvicorn.run(Application(dispatcher), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
