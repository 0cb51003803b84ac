"""Many speakers at once: latencies of Batch Dispatch beside those of one request at a time.

Run after `train`: ``python -m graphopt.examples.speech.serve``. Needs ``pip install
'graphopt[examples,serving]'``. Two servers on the loopback interface differ in the sizes of
batches only. Speakers send an utterance, wait for the answer, think, and go on. Each answer is
held against the network's own for this utterance alone and unpadded.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import http.client
import importlib.util
import json
import multiprocessing
import platform
import random
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from graphopt.examples.common import WorkloadError, panels
from graphopt.examples.common.arguments import folder, positive
from graphopt.examples.speech import server
from graphopt.examples.speech.formants import formants
from graphopt.examples.speech.model import DeepSpeech

ONE, BATCHES = "one at a time", "Batch Dispatch"
RULES: Mapping[str, tuple[int, ...]] = {ONE: (1,), BATCHES: (1, 2, 4, 8, 16, 32)}
SPEAKERS = (1, 8, 16, 32, 64)
ROUNDS = 3
"""Each server meets each load so often, in turns."""

THINKING = 0.25
"""Mean of the pause between an answer and the next utterance, seconds; exponential."""

Row = dict[str, float | int | str]


@dataclass(frozen=True)
class Utterances:
    """What speakers say, as bodies of requests, with the answers that are right."""

    bodies: list[bytes]
    answers: list[Tensor]

    @classmethod
    def of(cls, model: DeepSpeech, count: int = 64) -> Utterances:
        """New ones of the language of seed 0, each answered by the model alone and unpadded."""
        data = formants("the utterances", count, 0, 3)
        bodies, answers = [], []
        for features, length in zip(data.features, data.lengths, strict=True):
            bodies.append(server.encode_request(features, int(length)))
            with torch.no_grad():
                answers.append(model(features[None, :length], length[None])[0])
        return cls(bodies, answers)


@dataclass
class Speaker:
    """One connection's latencies in seconds, and the worst errors of its answers.

    Attributes:
        latencies: from sending a request to having its answer.
        worst: error of a probability.
        worst_log: error of a log-probability; unlikely symbols have -50.
        misread: answers that decode to another text.
        error: what ended it early.
    """

    latencies: list[float] = field(default_factory=list)
    worst: float = 0.0
    worst_log: float = 0.0
    misread: int = 0
    error: BaseException | None = None

    def speak(self, port: int, number: int, said: Utterances, seconds: float) -> None:
        """Send, wait, think, until the time is over."""
        draw = random.Random(number)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        until = time.perf_counter() + seconds
        time.sleep(draw.random() * min(THINKING, seconds))
        while time.perf_counter() < until or not self.latencies:
            i = draw.randrange(len(said.bodies))
            start = time.perf_counter()
            connection.request("POST", "/", said.bodies[i])
            reply = connection.getresponse()
            body = reply.read()
            self.latencies.append(time.perf_counter() - start)
            if reply.status != 200:
                raise RuntimeError(f"{reply.status}: {body!r}")
            right = said.answers[i]
            self.compare(server.decode_answer(body)[: len(right)], right)
            time.sleep(draw.expovariate(1 / THINKING))
        connection.close()

    def compare(self, found: Tensor, right: Tensor) -> None:
        """Hold log-probabilities (frames, symbols) against those of the utterance alone."""
        self.worst = max(self.worst, float((found.exp() - right.exp()).abs().max()))
        self.worst_log = max(self.worst_log, float((found - right).abs().max()))
        self.misread += not torch.equal(found.argmax(1), right.argmax(1))


def measure(port: int, speakers: int, said: Utterances, seconds: float) -> list[Speaker]:
    """All speakers at once, a thread each.

    Raises:
        BaseException: what any of them met.
    """
    found = [Speaker() for _ in range(speakers)]

    def one(number: int) -> None:
        try:
            found[number].speak(port, number, said, seconds)
        except BaseException as error:
            found[number].error = error

    threads = [threading.Thread(target=one, args=(i,)) for i in range(speakers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for speaker in found:
        if speaker.error is not None:
            raise speaker.error
    return found


@contextlib.contextmanager
def running(path: Path) -> Iterator[dict[str, int]]:
    """Ports of a server for each rule."""
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        ours = {}
        for rule, sizes in RULES.items():
            ours[rule], theirs = context.Pipe()
            process = context.Process(target=server.run, args=(path, sizes, theirs), daemon=True)
            process.start()
            theirs.close()
            stack.callback(process.join, 30)
            stack.callback(ours[rule].close)  # ends the server
        yield {rule: pipe.recv() for rule, pipe in ours.items()}


def compare(path: Path, seconds: float) -> list[Row]:
    """A row for each load and rule; the servers take turns.

    Raises:
        WorkloadError: there is no network, or no web server.
    """
    if importlib.util.find_spec("uvicorn") is None:
        raise WorkloadError("uvicorn is not installed", "pip install 'graphopt[serving]'")
    said = Utterances.of(server.load(path))
    rounds: dict[tuple[int, str], list[Speaker]] = {}
    with running(path) as ports:
        for port in ports.values():
            measure(port, 4, said, 0.5)  # the first requests of a server are slow
        for _ in range(ROUNDS):
            for speakers in SPEAKERS:
                for rule, port in ports.items():
                    found = measure(port, speakers, said, seconds / ROUNDS)
                    rounds.setdefault((speakers, rule), []).extend(found)
    return [row(speakers, rule, found) for (speakers, rule), found in rounds.items()]


def row(speakers: int, rule: str, found: list[Speaker]) -> Row:
    """What the speakers of one load met with one rule."""
    latencies = 1000 * np.array([x for speaker in found for x in speaker.latencies])
    median, late = np.quantile(latencies, [0.5, 0.98])
    return {
        "speakers": speakers,
        "rule": rule,
        "answers": len(latencies),
        "median_ms": round(float(median), 2),
        "percentile_98_ms": round(float(late), 2),
        "worst_error": max(speaker.worst for speaker in found),
        "worst_log_error": max(speaker.worst_log for speaker in found),
        "misread": sum(speaker.misread for speaker in found),
    }


def draw(path: Path, rows: list[Row]) -> None:
    """Latencies over the number of speakers."""
    with panels(path, width=7.0) as axes:
        plot = axes[0, 0]
        for colour, rule in zip(("C1", "C0"), RULES, strict=True):
            own = [each for each in rows if each["rule"] == rule]
            x = [each["speakers"] for each in own]
            for quantity, style, name in (
                ("percentile_98_ms", "s--", "98th percentile"),
                ("median_ms", "o-", "median"),
            ):
                y = [each[quantity] for each in own]
                plot.plot(x, y, style, color=colour, markersize=4, label=f"{rule}, {name}")
        plot.set(xlabel="speakers", ylabel="latency (ms)", xscale="log", yscale="log")
        plot.set_xticks(SPEAKERS, SPEAKERS)
        plot.minorticks_off()
        plot.grid(True)
        plot.legend()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.examples.speech.serve")
    parser.add_argument("--model", type=Path, default=Path("results/speech/model.pt"))
    parser.add_argument("--output", type=Path, default=Path("results/speech"))
    parser.add_argument("--seconds", type=positive, default=5, help="of each load")
    options = parser.parse_args()
    try:
        output = folder(options.output)  # before minutes of measuring
        rows = compare(options.model, options.seconds)
    except WorkloadError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    for each in rows:
        print(*(f"{name} {value}" for name, value in each.items()), sep=", ")
    worst = max(float(each["worst_error"]) for each in rows)
    misread = sum(int(each["misread"]) for each in rows)
    draw(output / "latency.svg", rows)
    record = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "thinking_s": THINKING,
        "frames": server.BUCKET,
        "worst_error": worst,
        "rows": rows,
    }
    (output / "serving.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"probabilities within {worst:.1e} of one utterance alone, {misread} other texts")
    print(f"wrote {output}/serving.json")
    if misread or not worst < 1e-5:
        sys.exit("error: an answer is not the one to this utterance alone")


if __name__ == "__main__":
    main()
