"""The command line of the examples: train by each method in turn, print when each got there."""

from __future__ import annotations

import argparse

from examples.kfac_digits.comparison import METHODS, Task, train


def main(task: Task, about: str) -> None:
    """Train `task` as the command line says and print a table."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=METHODS, action="append", help="default: all")
    parser.add_argument("--rate", type=float, help="learning rate instead of the tuned one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=task.steps)
    chosen = parser.parse_args()

    methods = chosen.method or METHODS
    rates = {m: chosen.rate or task.rates[m] for m in methods}
    running = {
        m: train(task, m, rates[m], chosen.seed, chosen.steps, task.settings.get(m))
        for m in methods
    }
    runs = {}
    # They take turns: a busy moment of the machine is then nobody's disadvantage.
    while running:
        for method, training in list(running.items()):
            found = next(training, None)
            if found is None:
                del running[method]
            else:
                runs[method] = found

    print(f"{task.name}: target {task.target:g}, at most {chosen.steps} steps")
    print("method          rate  steps to target  seconds  last value  ms a step  setup")
    for method, run in runs.items():
        steps, seconds, value = run.points[-1]
        to, after = run.steps_to_target, run.seconds_to_target
        print(
            f"{method:<14}{rates[method]:>6g}  {to or 'never':>15}  "
            f"{'-' if after is None else f'{after:.2f}':>7}  {value:>10.4f}  "
            f"{1e3 * seconds / steps:>9.1f}  {run.setup:.2f} s"
        )
