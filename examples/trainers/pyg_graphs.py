"""PyTorch Geometric: batches of graphs, each with other numbers of nodes and edges.

Messages are passed along edges and added up by scatter, so the sizes of everything change with each
batch; two captures in training and one in evaluation hold for all of them.
The label of a graph is how many edges its nodes have.

Run: ``python -m graphopt.examples.trainers.pyg_graphs``
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.examples.trainers.beside import BACKEND, Run, checksum, compare, timed
from graphopt.extras import extra

with extra("harness", "this example"):
    from torch_geometric.data import Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import BatchNorm, GCNConv, GINConv, global_add_pool

WIDTH = 16


def gcn(inputs: int) -> nn.Module:
    """A graph convolution with self loops and norms of degrees."""
    layer: nn.Module = GCNConv(inputs, WIDTH)
    return layer


def gin(inputs: int) -> nn.Module:
    """A layer that adds up neighbours and takes a small network of the sum."""
    inside = nn.Sequential(nn.Linear(inputs, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    layer: nn.Module = GINConv(inside)
    return layer


LAYERS: dict[str, Callable[[int], nn.Module]] = {"GCN": gcn, "GIN": gin}


class Graphs(nn.Module):
    """A classifier that is given the batch itself."""

    def __init__(self, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = layer(4), layer(WIDTH)
        self.norm, self.head = BatchNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, data: Data) -> Tensor:
        h = self.first(data.x, data.edge_index).relu()
        h = self.norm(self.second(h, data.edge_index)).relu()
        pooled = global_add_pool(F.dropout(h, 0.1, self.training), data.batch)
        scores: Tensor = self.head(pooled)
        return scores


def graphs(count: int) -> list[Data]:
    """Random graphs of 6 to 20 nodes with as many edges per node as their label says."""
    made = []
    for number in range(count):
        label, nodes = number % 3, int(torch.randint(6, 21, ()))
        edges = torch.randint(nodes, (2, nodes * (label + 1)))
        made.append(Data(x=torch.randn(nodes, 4), edge_index=edges, y=torch.tensor([label])))
    return made


def train(optimized: bool, layer: Callable[[int], nn.Module] = gcn) -> Run:
    """Train two epochs, with an evaluation after each."""
    torch.manual_seed(0)
    seen, unseen = DataLoader(graphs(44), batch_size=8, shuffle=True), DataLoader(graphs(16), 8)
    model = Graphs(layer)
    if optimized:
        graphopt.optimize(model, backend=BACKEND)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, begin = [], time.perf_counter()
    for _ in range(2):
        model.train()
        for batch in seen:
            loss = F.cross_entropy(model(batch), batch.y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            losses += [F.cross_entropy(model(batch), batch.y).item() for batch in unseen]
    return Run(tuple(losses), checksum(model), timed(begin), model)


def main() -> None:
    for title, layer in LAYERS.items():
        plain, ours = compare(title, partial(train, layer=layer))
        if not plain.same(ours):
            raise SystemExit("the two runs differ")
    print(graphopt.model.surface.report(ours.model).explain())


if __name__ == "__main__":
    main()
