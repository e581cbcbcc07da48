"""How many tokens a second the worker makes now: a count over the last seconds."""

from __future__ import annotations

import threading
import time
from collections import deque

WINDOW_SECONDS = 5.0
_SLICE_SECONDS = 0.1


class Speed:
    """Counts from one thread, is read from another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # (start of the slice, tokens in it): one slice for many steps, so that reading is cheap.
        self._slices: deque[tuple[float, int]] = deque()

    def count(self, num_tokens: int) -> None:
        now = time.monotonic()
        with self._lock:
            if self._slices and now - self._slices[-1][0] < _SLICE_SECONDS:
                begin, counted = self._slices.pop()
                self._slices.append((begin, counted + num_tokens))
            else:
                self._slices.append((now, num_tokens))
            self._forget(now)

    def _forget(self, now: float) -> None:
        while self._slices and now - self._slices[0][0] > WINDOW_SECONDS:
            self._slices.popleft()

    @property
    def tokens_per_second(self) -> float:
        """Over the time that the window really has tokens for; 0 when there were none."""
        now = time.monotonic()
        with self._lock:
            self._forget(now)
            if not self._slices:
                return 0.0
            return sum(counted for _, counted in self._slices) / max(now - self._slices[0][0], 1.0)
