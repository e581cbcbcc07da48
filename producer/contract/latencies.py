"""Recent latencies as counts in buckets: how a worker says them, and how those of many workers become one quantile. Pure, no I/O.

Quantiles of several workers cannot be averaged, but their counts can be added.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

LATENCY_BOUNDS: Final = (
    *(0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1),
    *(0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 40.0),
    *(60.0, 90.0, 120.0, 240.0, 480.0, 960.0, 3600.0),
)
"""Upper bounds of the buckets, in seconds. What is above the last one counts as the last one."""

Counts = Mapping[float, int]
"""How many latencies fell into the bucket of this upper bound."""


def bound_of(seconds: float) -> float:
    """The bucket of this latency."""
    return LATENCY_BOUNDS[min(bisect_left(LATENCY_BOUNDS, seconds), len(LATENCY_BOUNDS) - 1)]


def encode_counts(counts: Counts) -> str:
    """`bound:count ...`, empty buckets left out."""
    return " ".join(f"{bound:g}:{count}" for bound, count in sorted(counts.items()) if count)


def decode_counts(texts: Iterable[str]) -> Counter[float]:
    """The sum of these counts. What cannot be read, from a worker of another version, counts as nothing."""
    total: Counter[float] = Counter()
    for part in (part for text in texts for part in text.split()):
        bound, _, count = part.partition(":")
        try:
            total[float(bound)] += int(count)
        except ValueError:
            continue
    return total


def quantile(counts: Counts, share: float) -> float | None:
    """The latency that this share (0 to 1) of all does not exceed, interpolated within its bucket; None: there were none."""
    num_all = sum(counts.values())
    if not num_all:
        return None
    rank, num_below = share * num_all, 0
    for bound, count in sorted(counts.items()):
        if count and num_below + count >= rank:
            place = bisect_left(LATENCY_BOUNDS, bound)
            lower = LATENCY_BOUNDS[place - 1] if place else 0.0
            return lower + (bound - lower) * (rank - num_below) / count
        num_below += count
    return max(counts)
