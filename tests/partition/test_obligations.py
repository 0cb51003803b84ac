"""What every runtime part owes, held by `partition` alone and among others."""

from __future__ import annotations

import pytest

from graphopt.testing import check_runtime


def test_of_a_runtime_part() -> None:
    check_runtime("kfac,partition{stages=2}", ranks=False)


@pytest.mark.distributed
def test_of_a_runtime_part_on_ranks() -> None:
    check_runtime("partition{stages=2},group_gradients")
