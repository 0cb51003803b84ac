"""PyTorch Geometric: every batch has other numbers of nodes and edges."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.nn import GraphConv, TopKPooling, global_max_pool

import graphopt
from graphopt.errors import CaptureError
from graphopt.examples.trainers import pyg_graphs
from graphopt.examples.trainers.beside import captured


@pytest.mark.parametrize("name", sorted(pyg_graphs.LAYERS))
def test_equal_to_the_bit_with_three_captures(name: str) -> None:
    layer = pyg_graphs.LAYERS[name]
    plain = pyg_graphs.train(False, layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*captured")
        ours = pyg_graphs.train(True, layer)
    assert plain.same(ours)
    assert len(ours.losses) == 2 * (6 + 2)
    assert len(captured(ours.model)) == 3
    assert "data.x.0 2.., data.edge_index.1 2.." in ours.model.explain()


def test_pooling_that_keeps_as_many_nodes_as_data_say_is_refused() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool = GraphConv(4, 8), TopKPooling(8, 0.5)
            self.head = torch.nn.Linear(8, 3)

        def forward(self, data: Data) -> torch.Tensor:
            h = self.conv(data.x, data.edge_index)
            h, _, _, batch, *_ = self.pool(h, data.edge_index, None, data.batch)
            return self.head(global_max_pool(h, batch))

    batch = Batch.from_data_list(pyg_graphs.graphs(3))
    plain = Net()
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager", cache="off")
    with pytest.raises(CaptureError, match=r"(?s)optimize\(model.conv\) works") as refused:
        model(batch)
    assert "asks for a value or a size that depends on data" in refused.value.message
    graphopt.optimize(model, backend="eager", fallback="eager")
    with pytest.warns(UserWarning, match="run as plain PyTorch"):
        assert torch.equal(model(batch), plain(batch))
