"""The job's key-value store, where no access waits for ever.

Of a `TCPStore` (torch 2.13) only `get` and `wait` know a timeout, and even they wait without one
for the answer to their request. Where the process that holds the store is frozen, all of them hang.
So each access runs on a thread of its own, which is left behind when its time is up.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch._C._distributed_c10d import PrefixStore, TCPStore

T = TypeVar("T")

# Seconds between two looks for a text: at first, and at most.
SHORTEST, LONGEST = 0.001, 0.1


class StoreLost(Exception):
    """The store does not answer."""


@dataclass
class Store:
    """Accesses to a store that all ranks see, each with a deadline.

    Args:
        inner: a `torch.distributed.Store`.
        timeout: seconds that an access may take.

    Attributes:
        holder: who has to be alive for it, in words; empty where nobody has.
    """

    inner: Any
    timeout: float
    _lost: str = field(default="", init=False)

    @property
    def holder(self) -> str:
        """Who has to be alive for it, in words; empty where nobody has."""
        store = self.inner
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        if not isinstance(store, TCPStore):
            return ""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return f"torchrun on {store.host}" if agent else "rank 0 of the job"

    def set(self, key: str, text: str, within: float | None = None) -> None:
        """Write a text."""
        self._access(lambda: self.inner.set(key, text), within)

    def get(self, key: str, within: float | None = None) -> str:
        """A text that is there."""
        found: bytes = self._access(lambda: self.inner.get(key), within)
        return found.decode()

    def add(self, key: str, within: float | None = None) -> int:
        """Count one more; how many there are now."""
        return self._access(lambda: int(self.inner.add(key, 1)), within)

    def has(self, key: str, within: float | None = None) -> bool:
        """Whether there is a text."""
        return self._access(lambda: bool(self.inner.check([key])), within)

    def delete(self, key: str) -> None:
        """Remove a text."""
        self._access(lambda: self.inner.delete_key(key), None)

    def first(self, keys: Sequence[str], within: float, latest: float) -> str | None:
        """The first of these texts that is there; ``None`` if none comes in time.

        Polled: a `wait` of torch would keep all other threads from the store meanwhile.

        Args:
            keys: of the texts.
            within: seconds to wait for one.
            latest: when the store must have answered, by `time.monotonic`.
        """
        end, pause = time.monotonic() + within, SHORTEST
        while True:
            for key in keys:
                if self.has(key, max(latest - time.monotonic(), 1.0)):
                    return key
            if time.monotonic() >= end:
                return None
            time.sleep(min(pause, max(end - time.monotonic(), 0)))
            pause = min(2 * pause, LONGEST)

    def _access(self, work: Callable[[], T], within: float | None) -> T:
        """What an access gives.

        Raises:
            StoreLost: nothing in time, or the connection is gone; then all later accesses fail.
        """
        if self._lost:
            raise StoreLost(self._lost)
        results: list[T] = []
        errors: list[BaseException] = []

        def access() -> None:
            try:
                results.append(work())
            except BaseException as error:  # raised below, in the thread that asked
                errors.append(error)

        seconds = self.timeout if within is None else min(within, self.timeout)
        thread = threading.Thread(target=access, name="graphopt store", daemon=True)
        thread.start()
        thread.join(seconds)
        if results:
            return results[0]
        if errors and not isinstance(errors[0], RuntimeError):
            raise errors[0]
        how = str(errors[0]).splitlines()[0] if errors else f"no answer within {seconds:.3g} s"
        self._lost = how
        raise StoreLost(how) from (errors[0] if errors else None)
