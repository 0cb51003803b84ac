"""Deep Speech 2: the network, its loss and its decoding against definitions written out."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import graphopt
from graphopt.examples.common import Workload, WorkloadError
from graphopt.examples.speech import server
from graphopt.examples.speech.data import (
    BANDS,
    FRAMES,
    SYMBOLS,
    corpus,
    in_order_of_length,
    shuffled,
)
from graphopt.examples.speech.decoding import collapse, edit_distance, greedy, word_error_rate
from graphopt.examples.speech.formants import Language, formants
from graphopt.examples.speech.model import DeepSpeech, SequenceNorm, ctc, valid
from graphopt.examples.speech.serve import RULES, SPEAKERS, draw
from graphopt.examples.speech.study import VARIANTS, study
from graphopt.examples.speech.train import case
from graphopt.model.surface import report

Array = NDArray[np.float64]
NETWORKS = [
    {},
    {"norm": False},
    {"layers": 1, "channels": (3, 2)},
    {"bidirectional": False},
    {"bidirectional": False, "ahead": 3},
]


def small(seed: int = 0, **options: object) -> DeepSpeech:
    """In float64, with normalisations and look-ahead that are not what they are initialised to."""
    torch.manual_seed(seed)
    given = {"layers": 2, "hidden": 5, "channels": (3,), **options}
    model = DeepSpeech(9, 4, **given).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, SequenceNorm):
                for tensor in (module.weight, module.bias, module.mean):
                    tensor.normal_()
                module.variance.uniform_(0.5, 2)
        if model.look_ahead is not None:
            model.look_ahead.rows.weight.normal_()
    return model


# -- the network, written out for one utterance after another ----------------------------------


def expected_outputs(model: DeepSpeech, utterances: list[Array], training: bool) -> list[Array]:
    """Log-probabilities of each utterance, without padding and without masks."""
    w = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    kept = dict(model.named_modules())

    def norm(name: str, several: list[Array]) -> list[Array]:
        """Normalise features (first dimension) over all else, of all utterances."""
        if f"{name}.weight" not in w:
            return several
        mean, variance = w[f"{name}.mean"], w[f"{name}.variance"]
        if training:
            rows = np.concatenate([x.reshape(len(x), -1) for x in several], axis=1)
            mean, variance = rows.mean(1), rows.var(1)
        scale = w[f"{name}.weight"] / np.sqrt(variance + 1e-5)
        shift = w[f"{name}.bias"] - mean * scale
        shape = (-1, *[1] * (several[0].ndim - 1))
        return [x * scale.reshape(shape) + shift.reshape(shape) for x in several]

    x = [features.T[None] for features in utterances]  # (channels, bands, time)
    for i in range(len(model.convolutions)):
        name, stride = f"convolutions.{i}", 1 if i else 2
        kernels = w[f"{name}.filters.weight"].swapaxes(2, 3)
        bias = w.get(f"{name}.filters.bias", np.zeros(len(kernels)))
        x = [correlate(a, kernels, (2, stride)) + bias[:, None, None] for a in x]
        x = [np.clip(a, 0, 20) for a in norm(f"{name}.norm", x)]
    x = [a.reshape(-1, a.shape[-1]) for a in x]
    for i in range(len(model.recurrent)):
        name = f"recurrent.{i}"
        bias = w.get(f"{name}.project.bias", 0.0)
        x = [w[f"{name}.project.weight"] @ a + np.reshape(bias, (-1, 1)) for a in x]
        x = norm(f"{name}.norm", x)
        hidden = w[f"{name}.cells.weight_hh_l0"]
        if kept[f"{name}.cells"].bidirectional:
            back = w[f"{name}.cells.weight_hh_l0_reverse"]
            half = len(hidden)
            x = [recur(a[:half], hidden) + recur(a[half:, ::-1], back)[:, ::-1] for a in x]
        else:
            x = [recur(a, hidden) for a in x]
    if model.look_ahead is not None:
        rows = w["look_ahead.rows.weight"][:, 0]
        x = [look_ahead(a, rows) for a in x]
    logits = [w["output.weight"] @ a + w["output.bias"][:, None] for a in x]
    return [(a - np.log(np.exp(a).sum(0))).T for a in logits]


def correlate(x: Array, kernels: Array, stride: tuple[int, int]) -> Array:
    """x (inputs, bands, time), kernels (outputs, inputs, ., .), zeros around."""
    sides = [(k // 2, k // 2) for k in kernels.shape[2:]]
    padded = np.pad(x, [(0, 0), *sides])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernels.shape[2:], axis=(1, 2))
    return np.einsum("cftab,ocab->oft", windows[:, :: stride[0], :: stride[1]], kernels)


def recur(x: Array, hidden: Array) -> Array:
    h, found = np.zeros(len(hidden)), []
    for column in x.T:
        h = np.maximum(0, column + hidden @ h)
        found.append(h)
    return np.stack(found, 1)


def look_ahead(x: Array, rows: Array) -> Array:
    found = np.zeros_like(x)
    for t in range(x.shape[1]):
        for j in range(min(rows.shape[1], x.shape[1] - t)):
            found[:, t] += rows[:, j] * x[:, t + j]
    return found


def batch(*lengths: int, frames: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Random features of which those behind the end are large."""
    draw = torch.Generator().manual_seed(7)
    features = torch.randn(len(lengths), frames, 9, generator=draw, dtype=torch.float64)
    ends = torch.tensor(lengths)
    return torch.where(valid(ends, frames)[..., None], features, 1e3), ends


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", NETWORKS)
def test_the_network_is_the_one_of_the_paper(options: dict, training: bool) -> None:
    model = small(**options).train(training)
    expected_from = copy.deepcopy(model)
    features, lengths = batch(24, 7, 16, 1)
    found = model(features, lengths).detach().numpy()
    each = [f[:n].numpy() for f, n in zip(features, lengths.tolist(), strict=True)]
    for row, wanted in zip(found, expected_outputs(expected_from, each, training), strict=True):
        np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=0, atol=1e-10)


def test_running_averages_are_of_valid_frames() -> None:
    norm = SequenceNorm(3, momentum=0.25).double()
    x = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    norm(x, valid(torch.tensor([5, 2]), 5))
    rows = torch.cat([x[0].flatten(0, 1), x[1, :2].flatten(0, 1)])
    torch.testing.assert_close(norm.mean, 0.25 * rows.mean(0))
    torch.testing.assert_close(norm.variance, 0.75 + 0.25 * rows.var(0, unbiased=False))


@pytest.mark.parametrize("options", NETWORKS)
def test_an_utterance_is_understood_the_same_alone_and_in_a_batch(options: dict) -> None:
    model = small(**options).float().eval()
    features, lengths = batch(24, 7, 16, 1)
    features = features.float()
    together = model(features, lengths)
    for i, n in enumerate(lengths.tolist()):
        alone = model(features[[i], :n], lengths[[i]])[0]
        assert (together[i, : len(alone)] - alone).abs().max() < 1e-5


@pytest.mark.parametrize("options", NETWORKS)
def test_padding_changes_no_gradient(options: dict) -> None:
    features, lengths = batch(11, 7)
    targets, sizes = torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    gradients = []
    for frames in (11, 24):
        model = small(**options)
        x = features[:, :frames].requires_grad_()
        ctc(model(x, lengths), lengths, targets, sizes).backward()
        assert x.grad is not None
        assert not x.grad[~valid(lengths, frames)].any()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# -- loss and decoding --------------------------------------------------------------------------


def test_ctc_sums_over_all_alignments() -> None:
    draw = np.random.default_rng(0)
    frames, targets = [6, 5, 4], ["aab", "ba", "b"]
    scores = draw.normal(size=(3, 6, 3))
    log_p = scores - np.log(np.exp(scores).sum(2, keepdims=True))
    each = []
    for p, n, target in zip(log_p, frames, targets, strict=True):
        ways = [
            sum(p[t, s] for t, s in enumerate(path))
            for path in itertools.product(range(3), repeat=n)
            if "".join(" ab"[s] for s, _ in itertools.groupby(path) if s) == target
        ]
        assert ways
        each.append(-math.log(sum(map(math.exp, ways))) / len(target))
    found = ctc(
        torch.tensor(log_p),
        torch.tensor([12, 10, 7]),  # frames of features
        torch.tensor([[1, 1, 2], [2, 1, 9], [2, 9, 9]]),
        torch.tensor([3, 2, 1]),
    )
    assert abs(float(found) - sum(each) / 3) < 1e-12


def test_greedy_takes_the_likeliest_alignment_within_each_length() -> None:
    draw = torch.Generator().manual_seed(0)
    log_p = torch.randn(5, 6, 3, generator=draw).log_softmax(-1)
    lengths = torch.tensor([12, 11, 8, 5, 2])
    for p, n, text in zip(log_p, lengths, greedy(log_p, lengths, "_ab"), strict=True):
        paths = itertools.product(range(3), repeat=math.ceil(n / 2))
        best = max(paths, key=lambda path: sum(float(p[t, s]) for t, s in enumerate(path)))
        assert text == "".join("_ab"[s] for s, _ in itertools.groupby(best) if s)


def test_repetitions_need_a_blank() -> None:
    assert collapse([1, 1, 0, 1, 2, 2, 0, 0], "_ab") == "aab"


def brute_distance(a: str, b: str) -> int:
    """Breadth-first over all edits."""
    seen, level = {a}, 0
    front = {a}
    while b not in seen:
        front = {
            edited
            for s in front
            for i in range(len(s) + 1)
            for edited in (
                *(s[:i] + c + s[i:] for c in "ab"),
                *(s[:i] + c + s[i + 1 :] for c in "ab"),
                s[:i] + s[i + 1 :],
            )
        } - seen
        seen |= front
        level += 1
    return level


def test_edit_distance_is_the_fewest_edits() -> None:
    words = ["".join(w) for n in range(4) for w in itertools.product("ab", repeat=n)]
    for a, b in itertools.product(words, words):
        assert edit_distance(a, b) == brute_distance(a, b), (a, b)


def test_word_error_rate_counts_words_of_all_utterances() -> None:
    assert word_error_rate(["one two", "", "six six"], ["one too", "ten", "six"]) == 3 / 4


# -- data -----------------------------------------------------------------------------------------


def test_a_letter_has_its_formants() -> None:
    language, draw = Language.draw(3), np.random.default_rng(0)
    letter = SYMBOLS.index("e") - 2
    spoken = [language.say("e", draw, 0.0) for _ in range(200)]
    # The loudest band over time, away from the ends, is near one of the letter's three.
    peaks = np.array([s[len(s) // 2].argmax() for s in spoken])
    distance = np.abs(peaks[:, None] - language.centres[letter]).min(1)
    assert np.median(distance) < 2
    assert len({len(s) for s in spoken}) > 4


def test_corpora_of_a_seed_share_the_language_only() -> None:
    one, same, other = (formants("data", 8, 0, stream) for stream in (1, 1, 2))
    assert torch.equal(one.features, same.features)
    assert one.texts == same.texts
    assert one.texts != other.texts
    assert not np.allclose(Language.draw(0).centres, Language.draw(1).centres)


def test_batches_hold_each_utterance_once_and_few_lengths() -> None:
    data = formants("data", 100, 0, 1)
    random = shuffled(data.lengths, 16, torch.Generator().manual_seed(0))
    for batches in (random, in_order_of_length(data.lengths, 16)):
        assert [len(b) for b in batches] == [16] * 6
        assert len(set(torch.cat(batches).tolist())) == 96
        for indices in batches:
            features, lengths, _, _ = data.batch(indices, torch.device("cpu"))
            assert features.shape[1] in FRAMES
            assert features.shape[1] >= lengths.max()
            assert not features[~valid(lengths, features.shape[1])].any()
    longest = [int(data.lengths[b].max()) for b in in_order_of_length(data.lengths, 16)]
    assert longest == sorted(longest)
    longest = [int(data.lengths[b].max()) for b in random]
    assert longest != sorted(longest)


GOOD = (torch.zeros(40, BANDS), "one two")
HOLED = torch.zeros(40, BANDS)
HOLED[3, 2] = math.nan


@pytest.mark.parametrize(
    ("utterances", "message"),
    [
        ([], "the set is empty"),
        ([GOOD, (torch.zeros(0, BANDS), "one")], "utterance 1 of the set is empty"),
        ([GOOD, (torch.zeros(40, 7), "one")], r"utterance 1 .* shape \[40, 7\]"),
        ([GOOD, (HOLED, "one")], r"utterance 1 .* 1 values .* NaN .* \[3, 2\]"),
        ([GOOD, (torch.zeros(FRAMES[-1] + 1, BANDS), "one")], "utterance 1 .* 161 frames"),
        ([GOOD, (torch.zeros(40, BANDS), "ōne")], "utterance 1 .* 'ō' in it"),
        ([GOOD, (torch.zeros(40, BANDS), " ")], "utterance 1 .* no word"),
        ([GOOD, (torch.zeros(10, BANDS), "three")], "10 frames, too few for 'three'"),
    ],
)
def test_loaders_name_what_cannot_be_trained_on(utterances: list, message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        corpus("the set", utterances)


def test_the_synthesiser_speaks() -> None:
    pytest.importorskip("espeakng_loader", reason="needs the extra `speech`")
    from graphopt.examples.speech.synthesiser import log_mel, say, synthesised

    tone = np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000).astype(np.float32)
    bands = log_mel(tone, 16000)
    assert bands.shape == (49, BANDS)
    edges = np.linspace(0, 2595 * np.log10(1 + 8000 / 700), BANDS + 2)
    assert bands.mean(0).argmax() == np.abs(edges[1:-1] - 1000).argmin()  # 1000 mel are 1000 Hz
    short, long = (len(say("seven three left", "en-us", rate, 50)) for rate in (250, 125))
    assert 1.5 < long / short < 2.5
    data = synthesised("the set", 6, 0, 1)
    assert len(data) == 6
    assert data.lengths.min() > 20
    with pytest.raises(WorkloadError, match="no voice 'klingons'"):
        say("one", "klingons", 150, 50)


# -- serving --------------------------------------------------------------------------------------


def test_requests_together_get_the_answers_of_each_alone() -> None:
    torch.manual_seed(0)
    model = DeepSpeech(BANDS, len(SYMBOLS), layers=2, hidden=16).eval()
    plain = copy.deepcopy(model)
    data = formants("data", 9, 0, 1)
    with server.dispatcher(model, (1, 8)) as dispatcher, torch.no_grad():
        futures = [
            dispatcher.submit(server.decode_request(server.encode_request(features, int(length))))
            for features, length in zip(data.features, data.lengths, strict=True)
        ]
        for future, features, length in zip(futures, data.features, data.lengths, strict=True):
            found = server.decode_answer(server.encode_answer(future.result(60)))
            alone = plain(features[None, :length], length[None])[0]
            assert (found[: len(alone)] - alone).abs().max() < 1e-5
    assert dispatcher.stats().batches[8] >= 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "0 bytes, and 20484 are"),
        (server.encode_request(torch.zeros(160, BANDS), 0), "0 frames is not between 1 and 160"),
        (server.encode_request(torch.zeros(160, BANDS), 161), "161 frames"),
        (server.encode_request(torch.full((160, BANDS), math.nan), 9), "NaN"),
    ],
)
def test_bodies_that_are_no_utterance_are_refused(body: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        server.decode_request(body)


def test_a_server_names_the_network_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match=r"no network at .*\n.*speech\.train"):
        server.load(tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(b"no")
    with pytest.raises(WorkloadError, match="holds no network"):
        server.load(tmp_path / "model.pt")


def test_a_study_leaves_what_can_be_served(tmp_path: Path) -> None:
    data = formants("data", 32, 0, 1, words=1)
    workload = Workload("speech", "", lambda run: study(run, data, data), case, 1, 1, "none")
    workload.main(["--output", str(tmp_path)])
    found = json.loads((tmp_path / "results.json").read_text())
    rows = found["tables"]["word error rates"]
    assert [row["network"] for row in rows] == [variant.title for variant in VARIANTS]
    weights = {row["network"]: row["weights"] for row in rows}
    assert abs(weights["1 layer, as many weights"] / weights["3 layers"] - 1) < 0.02
    assert len(found["criteria"]) == 6
    assert "said: " in (tmp_path / "figure.svg").read_text()
    model = server.load(tmp_path / "model.pt")
    assert not model.training
    rows = [
        {"speakers": n, "rule": rule, "median_ms": 2.0 * n, "percentile_98_ms": 3.0 * n}
        for n in SPEAKERS
        for rule in RULES
    ]
    draw(tmp_path / "latency.svg", rows)
    assert "Batch Dispatch, median" in (tmp_path / "latency.svg").read_text()


# -- training -------------------------------------------------------------------------------------


def test_a_short_training_learns_a_few_words() -> None:
    data = formants("data", 16, 0, 1, words=1, noise=0.1)
    torch.manual_seed(0)
    model = DeepSpeech(BANDS, len(SYMBOLS), layers=1, channels=(4,))
    graphopt.optimize(model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
    features, lengths, targets, sizes = data.batch(torch.arange(16), torch.device("cpu"))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = ctc(model(features, lengths), lengths, targets, sizes)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval()
    with torch.no_grad():
        found = greedy(model(features, lengths), lengths, SYMBOLS)
    assert word_error_rate(found, data.texts) < 0.2


def test_one_graph_with_the_bits_of_eager() -> None:
    one = case(torch.device("cpu"))
    assert one.exact
    plain = copy.deepcopy(one.model)
    model = graphopt.optimize(one.model, passes=one.passes, backend="eager")
    for each in (model, plain):
        one.loss(each(*one.inputs)).backward()
    gradients = {n: p.grad for n, p in plain.named_parameters() if p.requires_grad}
    for name, parameter in model.named_parameters():
        if name in gradients:
            assert torch.equal(parameter.grad, gradients[name]), name
    for a, b in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)
    found = report(model)
    assert len(found.specialisations) == 1
    assert not found.plain
    assert found.specialisations[0].verification.result == "bit-equal"
