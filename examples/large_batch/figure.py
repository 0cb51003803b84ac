"""What a run looked like: losses with and without warm-up, and batches that grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from graphopt.examples.common import panels
from graphopt.examples.large_batch.training import MICRO, Outcome


def draw(path: Path, found: Mapping[str, Sequence[Outcome]], images: int) -> None:
    """Write the figure of the first training of each recipe.

    Args:
        path: the file.
        found: by recipe.
        images: in an epoch.
    """
    with panels(path, 1, 2) as axes:
        left, right = axes[0]
        for name in ("small", *(name for name in found if name.startswith("large"))):
            losses = found[name][0].losses
            left.plot(range(1, len(losses) + 1), losses, label=name)
        left.set(yscale="log", xlabel="epoch", ylabel="training loss")
        left.legend(fontsize=8)
        for name, first, micro in (("AdaBatch", 1, MICRO), ("noise scale", 2, MICRO // 2)):
            outcome = found[name][0]
            steps, sizes = [0], [first * micro]
            for change in outcome.changes:
                steps.append(change.step)
                sizes.append(change.after * micro)
            right.step([*steps, outcome.updates], [*sizes, sizes[-1]], where="post", label=name)
        right.axhline(images, linestyle=":", color="#808080")
        right.set(yscale="log", xlabel="update", ylabel="batch (examples)")
        right.legend(fontsize=8)
