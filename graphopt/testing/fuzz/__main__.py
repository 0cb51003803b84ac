"""Many scenarios, counted: ``python -m graphopt.testing.fuzz --examples 2000``."""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections import Counter

from graphopt.errors import MismatchError
from graphopt.extras import extra
from graphopt.testing.fuzz.check import check_scenario
from graphopt.testing.fuzz.scenario import Scenario
from graphopt.testing.fuzz.strategies import scenarios

with extra("testing", "what generates training code"):
    from hypothesis import HealthCheck, Phase, given, seed, settings


def main(examples: int, start: int) -> int:
    """Run them all, print each failure as it comes and the counts at the end."""
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    plain: Counter[str] = Counter()
    began = time.perf_counter()

    @seed(start)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(scenarios())
    def run(scenario: Scenario) -> None:
        try:
            verdict = check_scenario(scenario)
        except Exception as error:
            if not isinstance(error, MismatchError):
                print(repr(scenario))
                traceback.print_exc()
            kinds["different"] += 1
            print(error, flush=True)
            return
        kinds[verdict.kind] += 1
        kinds["steps"] += verdict.steps
        kinds["steps off by rounding"] += verdict.rounded
        kinds["captures"] += verdict.captures
        kinds["with calls that run plain"] += bool(verdict.plain)
        reasons.update([verdict.reason] if verdict.reason else [])
        plain.update(verdict.plain)

    run()
    kinds["seconds"] = round(time.perf_counter() - began)
    print(json.dumps({**kinds, "refused with": dict(reasons.most_common())}, indent=1))
    print(json.dumps(dict(plain.most_common(40)), indent=1))
    return min(1, kinds["different"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raise SystemExit(main(arguments.examples, arguments.seed))
