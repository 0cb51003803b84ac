"""Deep Speech 2 on the speech of a synthesiser; as `train`, and needs the extra `speech`.

Run: ``python -m graphopt.examples.speech.train_synthesised``.
"""

from __future__ import annotations

from graphopt.examples.common import Run, Workload
from graphopt.examples.speech.study import study
from graphopt.examples.speech.synthesiser import synthesised
from graphopt.examples.speech.train import TEST, TRAINING, case


def run(run: Run) -> None:
    """Train on what espeak-ng says."""
    training = synthesised("the training set", TRAINING, run.seed, 0)
    test = synthesised("the test set", TEST, run.seed, 1)
    study(run, training, test)


WORKLOAD = Workload(
    name="speech_synthesised",
    title="Deep Speech 2 on speech that espeak-ng synthesises.",
    run=run,
    case=case,
    epochs=4,
    long_epochs=20,
    command="graphopt.examples.speech.train_synthesised",
)

if __name__ == "__main__":
    WORKLOAD.main()
