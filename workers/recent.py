"""The latencies of the last minute, in buckets: what `glmq top` shows, without anything that scrapes."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from typing import Final

from producer.contract.latencies import bound_of

WINDOW_SECONDS: Final = 60.0
_SLICE_SECONDS: Final = 5.0


class RecentLatencies:
    """Counts from one thread, is read from another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (start of the slice, counts in it)
        self._slices: deque[tuple[float, Counter[float]]] = deque()

    def count(self, seconds: float, times: int = 1) -> None:
        """So many latencies of so many seconds."""
        now = time.monotonic()
        with self._lock:
            if not self._slices or now - self._slices[-1][0] >= _SLICE_SECONDS:
                self._slices.append((now, Counter()))
            self._slices[-1][1][bound_of(seconds)] += times
            self._forget(now)

    def counts(self) -> Counter[float]:
        """By upper bound of the bucket, over the window."""
        with self._lock:
            self._forget(time.monotonic())
            return sum((counts for _, counts in self._slices), Counter())

    def _forget(self, now: float) -> None:
        while self._slices and now - self._slices[0][0] > WINDOW_SECONDS:
            self._slices.popleft()
