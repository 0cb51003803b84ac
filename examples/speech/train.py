"""Deep Speech 2 on a synthetic language: what depth, normalisation and look-ahead are worth.

Run: ``python -m graphopt.examples.speech.train``. Leaves the bidirectional network with three
recurrent layers in ``model.pt`` of the output folder, for `graphopt.examples.speech.serve`.
"""

from __future__ import annotations

import torch

from graphopt.examples.common import Case, Run, Workload
from graphopt.examples.speech.data import BANDS, SYMBOLS, in_order_of_length
from graphopt.examples.speech.formants import formants
from graphopt.examples.speech.model import DeepSpeech, ctc
from graphopt.examples.speech.study import BATCH, study

TRAINING, TEST = 2560, 640


def run(run: Run) -> None:
    """Train on formants."""
    training = formants("the training set", TRAINING, run.seed, 0)
    test = formants("the test set", TEST, run.seed, 1)
    study(run, training, test)


def case(device: torch.device) -> Case:
    """One step of the network with three bidirectional layers."""
    data = formants("a batch", BATCH, 0, 2)
    (indices,) = in_order_of_length(data.lengths, BATCH)
    features, lengths, targets, sizes = data.batch(indices, device)
    torch.manual_seed(0)
    model = DeepSpeech(BANDS, len(SYMBOLS)).to(device)
    return Case(model, (features, lengths), lambda found: ctc(found, lengths, targets, sizes))


WORKLOAD = Workload(
    name="speech",
    title="Deep Speech 2: recurrent networks with batch normalisation and CTC.",
    run=run,
    case=case,
    epochs=4,
    long_epochs=20,
)

if __name__ == "__main__":
    WORKLOAD.main()
