"""Speech from the synthesiser espeak-ng, if the extra `speech` is installed.

The library is found by `espeakng_loader` and called through ctypes; nothing of it is part of this
package. It holds one voice at a time for the whole process, and goes on where the last utterance
has left it: what it says repeats itself from the start of a process only.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from graphopt.examples.common import WorkloadError
from graphopt.examples.speech.data import BANDS, FRAMES, VOCABULARY, Corpus, corpus

VOICES = tuple(
    f"{accent}{variant}"
    for accent in ("en-us", "en", "en-gb-scotland")
    for variant in ("", "+f2", "+f4", "+m3", "+m7")
)

# Of espeak-ng's speak_lib.h: synthesis within the call, audio to a callback, text as UTF-8.
_SYNCHRONOUS, _UTF8, _RATE, _PITCH = 2, 1, 1, 3
_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


@functools.cache
def _library() -> tuple[Any, int]:
    """The initialised library and its samples per second."""
    try:
        import espeakng_loader
    except ImportError as error:
        raise WorkloadError(
            "the speech synthesiser is not installed", "pip install 'graphopt[speech]'"
        ) from error
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    path = str(espeakng_loader.get_data_path()).encode()
    rate = int(library.espeak_Initialize(_SYNCHRONOUS, 0, path, 0))
    if rate <= 0:
        raise WorkloadError(
            f"the speech synthesiser finds no voices in {path.decode()}",
            "pip install --force-reinstall espeakng-loader",
        )
    return library, rate


def say(text: str, voice: str, rate: int, pitch: int) -> NDArray[np.float32]:
    """Samples between -1 and 1.

    Args:
        text: English.
        voice: of espeak-ng, as ``en-us+f2``.
        rate: words per minute, 80 to 450.
        pitch: 0 to 100.

    Raises:
        WorkloadError: the synthesiser is missing, or does not know the voice.
    """
    library, _ = _library()
    pieces: list[NDArray[np.int16]] = []

    def take(samples: Any, count: int, _events: object) -> int:
        if samples and count:
            pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    callback = _Callback(take)  # referenced until the synthesis has ended
    library.espeak_SetSynthCallback(callback)
    if library.espeak_SetVoiceByName(voice.encode()):
        raise WorkloadError(f"espeak-ng has no voice {voice!r}", "use 'en-us'")
    library.espeak_SetParameter(_RATE, rate, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    spoken = text.encode() + b"\0"
    library.espeak_Synth(spoken, ctypes.c_size_t(len(spoken)), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.int16)
    return samples.astype(np.float32) / np.float32(2**15)


def log_mel(samples: NDArray[np.float32], rate: int) -> Tensor:
    """Features (frames, BANDS): log-energies of windows of 20 ms, every 10 ms, standardised.

    Bands are triangles, equally wide on the mel scale, m = 2595 log₁₀(1 + f / 700 Hz), up to 8 kHz.
    """
    window, hop = rate // 50, rate // 100
    frames = np.lib.stride_tricks.sliding_window_view(samples, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2
    top = 2595 * np.log10(1 + 8000 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(window, 1 / rate)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    bands = np.maximum(0, np.minimum(rising, falling))
    features = np.log(power @ bands.T + 1e-3)
    features = (features - features.mean()) / features.std()
    return torch.tensor(features, dtype=torch.float32)


def synthesised(
    name: str, count: int, seed: int, stream: int, *, words: int = 3, noise: float = 0.01
) -> Corpus:
    """Utterances of up to `words` words of `VOCABULARY`, spoken by several voices.

    Args:
        name: what they are called in errors.
        count: of utterances.
        seed: of everything, together with `stream`.
        stream: another one gives other utterances.
        words: most words of an utterance; fewer where they would not fit `FRAMES`.
        noise: standard deviation of the noise that is added to samples between -1 and 1.
    """
    draw = np.random.default_rng([seed, 1 + stream])
    _, rate = _library()
    utterances = []
    for _ in range(count):
        said = list(draw.choice(VOCABULARY, size=int(draw.integers(1, words + 1))))
        voice = str(draw.choice(VOICES))
        speed, pitch = int(draw.integers(170, 260)), int(draw.integers(30, 70))
        while True:
            samples = say(" ".join(said), voice, speed, pitch)
            if len(samples) // (rate // 100) <= FRAMES[-1]:
                break
            said.pop()
        samples = samples + noise * draw.standard_normal(len(samples)).astype(np.float32)
        utterances.append((log_mel(samples, rate), " ".join(said)))
    return corpus(name, utterances)
