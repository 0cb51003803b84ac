"""A served model: few captures for all sizes of batches. `test_serve` holds the bits of each."""

from __future__ import annotations

import graphopt
from graphopt.model.controller import controller_of
from tests.support.sizes import Images, images


def test_batch_sizes_share_graphs() -> None:
    model = graphopt.optimize(Images().eval(), passes="cleanup,fold_inference", backend="eager")
    with graphopt.serve(model, images(1, 9, 11)[0], sizes=(1, 2, 4, 8, 16)) as served:
        assert served(images(1, 9, 11)[0]).shape == (4,)
    controller = controller_of(model)
    assert controller is not None
    assert controller.made == 2  # one example, and all others
    assert not controller.seen.notes
