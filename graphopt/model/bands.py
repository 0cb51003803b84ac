"""Which backend runs a symbolic graph at which sizes: measured once per band of them.

Generated code may win at large sizes and lose at small ones. A band holds the calls whose symbolic
sizes have a product within a factor of four. The first call in a band is timed in all backends.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from graphopt.cache import JsonCache, is_duration
from graphopt.capture.lock import one_at_a_time
from graphopt.errors import BackendMismatchError, MismatchError
from graphopt.model.entries import BackendChoice, Specialisation
from graphopt.model.trial import Call
from graphopt.notices import warn

log = logging.getLogger("graphopt")

Compare = Callable[[Any, Sequence[Any], Mapping[str, Any], str, Call], object]

CACHE = JsonCache("bands")
# A compiling backend has to win by this much; anything less is noise.
MARGIN = 0.98
# So many bands of one graph are measured; others take what was faster in the nearest of these.
MAX_BANDS = 6

Seconds = Mapping[str, float]


def band_of(sizes: Sequence[int]) -> int:
    """The band of a call by its sizes: half the bits of their product."""
    return math.prod(sizes).bit_length() // 2


def faster(seconds: Seconds) -> str:
    """The backend to take, by seconds of a step in each."""
    return "inductor" if seconds["inductor"] < MARGIN * seconds["eager"] else "eager"


class Bands:
    """What was measured of one graph, kept for later runs.

    Args:
        key: under which that is.
    """

    def __init__(self, key: str) -> None:
        self._key = key
        self.seconds: dict[int, Seconds] = _read(key)
        self.kept = bool(self.seconds)

    @property
    def full(self) -> bool:
        """Whether no further band is measured."""
        return len(self.seconds) >= MAX_BANDS

    @property
    def compiles(self) -> bool:
        """Whether generated code was faster in any band."""
        return any(faster(seconds) == "inductor" for seconds in self.seconds.values())

    def add(self, band: int, seconds: Seconds) -> None:
        """Keep what was measured in a band."""
        self.seconds[band] = dict(seconds)
        CACHE.write(self._key, {str(b): dict(s) for b, s in self.seconds.items()})

    def backend(self, band: int) -> str:
        """What was faster in a band, or in the nearest one that was measured."""
        nearest = min(self.seconds, key=lambda known: (abs(known - band), known))
        return faster(self.seconds[nearest])

    def choice(self, band: int) -> BackendChoice:
        """What runs calls of a band, and what runs those of others."""
        told = ", ".join(
            f"{faster(s)} at {max(1, 2 ** (2 * b - 1))} to {2 ** (2 * b + 1) - 1} "
            f"({s['inductor'] / s['eager']:.2f}x)"
            for b, s in sorted(self.seconds.items())
        )
        kept = ", some in an earlier run" if self.kept else ""
        reason = (
            f"measured per product of the sizes that vary{kept}, inductor's time over eager's: "
            f"{told}"
        )
        return BackendChoice(self.backend(band), "auto", reason, self.seconds.get(band, {}))


def _read(key: str) -> dict[int, Seconds]:
    """What an earlier run has measured; nothing unless all of it is what `Bands.add` writes."""
    found = CACHE.read(key)
    if found is None:
        return {}
    if not isinstance(found, dict) or len(found) > MAX_BANDS:
        return _distrusted(key)
    bands: dict[int, Seconds] = {}
    for band, seconds in found.items():
        match seconds:
            case {"eager": eager, "inductor": inductor, **rest} if (
                _is_band(band) and is_duration(eager) and is_duration(inductor) and not rest
            ):
                bands[int(band)] = {"eager": eager, "inductor": inductor}
            case _:
                return _distrusted(key)
    return bands


def _is_band(text: object) -> bool:
    # Half the bits of a product of sizes.
    return isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= 4


def _distrusted(key: str) -> dict[int, Seconds]:
    CACHE.distrust(key, "it has no times per band of sizes")
    return {}


class PerBand:
    """Calls of a model, each in the backend that was faster for sizes like its own.

    Args:
        bands: what was measured so far, the band of the captured call included.
        calls: of the model, by backend.
        sizes: reads the sizes that vary off a call.
        measure: seconds of a call in each backend; leaves no trace.
        band: of the captured call.
        compare: a call with eager, by the backend that runs it; ``None`` for not at all.
    """

    def __init__(
        self,
        bands: Bands,
        calls: Mapping[str, Call],
        sizes: Callable[..., Sequence[int]],
        measure: Callable[..., Seconds],
        band: int,
        compare: Compare | None = None,
    ) -> None:
        self._bands, self._calls, self._sizes, self._measure = bands, calls, sizes, measure
        self._compare = compare
        self._chosen: dict[int, Call] = {}
        self._band = band

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> object:
        """Run a call; the first one in a band is measured before."""
        band = band_of(self._sizes(model, *args, **kwargs))
        call = self._chosen.get(band) or self._choose(band, model, args, kwargs)
        return call(model, *args, **kwargs)

    def _choose(
        self, band: int, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Call:
        with one_at_a_time():
            if band not in self._bands.seconds and not self._bands.full:
                try:
                    self._bands.add(band, self._measure(model, args, kwargs, self._calls))
                except Exception as error:  # the call itself raises it, if it is the user's
                    log.info("this band of sizes cannot be measured: %s", error)
            call = self._compared(band, model, args, kwargs)
        self._chosen[band] = call
        return call

    def _compared(
        self, band: int, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Call:
        """The faster backend's call; the other one's, where its code is wrong at these sizes.

        Raises:
            MismatchError: both are.
        """
        wanted = self._bands.backend(band)
        if self._compare is None or band == self._band:  # the captured call was compared
            return self._calls[wanted]
        names = [wanted, *(name for name in self._calls if name != wanted)]
        for name in names:
            call = self._calls[name]
            try:
                self._compare(model, args, kwargs, name, call)
            except BackendMismatchError as error:
                if name == names[-1]:
                    raise
                warn(f"backend {names[-1]!r} runs calls of these sizes: {error}")
            except MismatchError:
                raise
            except Exception as error:  # the call itself raises it, if it is the user's
                log.info("calls of these sizes cannot be compared with eager: %s", error)
                return call
            else:
                return call
        raise AssertionError("there is no backend")

    def chosen(self, model: Any, *args: Any, **kwargs: Any) -> tuple[str, Call]:
        """The backend that runs a call, and the call; it is measured if it is the first."""
        band = band_of(self._sizes(model, *args, **kwargs))
        call = self._chosen.get(band) or self._choose(band, model, args, kwargs)
        return next(name for name, one in self._calls.items() if one is call), call

    def reported(self, entry: Specialisation) -> Specialisation:
        """The entry, with what runs calls like the captured one, and what runs others."""
        return replace(entry, backend=self._bands.choice(self._band))
