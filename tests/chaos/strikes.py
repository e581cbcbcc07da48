"""What was done to the deployment, when, and which readers noticed: the gaps in the streams that were hit."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from producer.contract import Finished, Started, Token
from tests.chaos.readers import Heard, Stream
from tests.chaos.verdicts import Verdict

AFTER_SECONDS: Final = 6.0
"""A gap is a strike's if it begins no later than so long after the strike's effect ended, and before the next strike."""


@dataclass
class Strike:
    """One blow. Its effect lasts from `at` to `until` (monotonic seconds); after that the readers may wait for recovery."""

    event: str
    victims: frozenset[str] | None
    """Worker ids; None: it hits every live stream."""
    bound: float
    """The longest gap that a reader of a hit stream may see, in seconds."""
    at: float = field(default_factory=time.monotonic)
    until: float = 0.0
    streams: list[Stream] = field(default_factory=list)
    """Given where the strike hits particular ones."""
    is_lasting: bool = False
    """It goes on until `until`, and hits streams that begin meanwhile, too."""

    def hits(self, stream: Stream) -> bool:
        """Whether this stream's answer was in progress in the hands of a victim."""
        if self.streams:
            return stream in self.streams
        begin = max(self.at, self.until) if self.is_lasting else self.at
        if not stream.heard or stream.heard[0].at > begin or (stream.end and stream.heard[-1].at < self.at):
            return False
        if self.is_lasting:
            return True
        worker = stream.worker_at(self.at)
        return worker is not None and (self.victims is None or worker in self.victims)


def longest_gap(stream: Stream, strike: Strike, before: float) -> tuple[float, str]:
    """The longest time between two events of an answer in progress, of those that this strike may have caused, and where it was; 0: none.

    before: when the next strike came. Readers that pause on purpose are no measure.
    """
    end = min(max(strike.at, strike.until) + AFTER_SECONDS, before)
    seen = [heard for heard in stream.heard if isinstance(heard.event, Started | Token | Finished)]
    gaps = [
        (later.at - earlier.at, _gap_text(earlier, later, strike))
        for earlier, later in itertools.pairwise(seen)
        if later.at > strike.at and earlier.at < end
    ]
    if stream.end is None and seen:
        gaps.append((time.monotonic() - seen[-1].at, "it waits for ever"))
    return max(gaps, default=(0.0, ""))


def _gap_text(earlier: Heard, later: Heard, strike: Strike) -> str:
    return (
        f"from {earlier.event.type} at {earlier.at - strike.at:+.2f} s to {later.event.type} at {later.at - strike.at:+.2f} s"
        + (f" from {later.event.worker}" if isinstance(later.event, Started) else "")
    )


@dataclass
class Row:
    """One line of the table: all strikes of one kind."""

    event: str
    bound: float
    """Seconds; the greatest, where it is measured anew for each strike."""
    num_tries: int = 0
    num_streams: int = 0
    """Hit ones; the columns after it count all streams of the run."""
    num_lost: int = 0
    num_duplicated: int = 0
    num_differing: int = 0
    num_beyond_noise: int = 0
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """(the longest one of a stream that was hit, its bound)"""
    late: list[str] = field(default_factory=list)
    """Those beyond their bound."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What else was measured, and differences within noise."""
    skipped: str = ""
    """Why it was not tried."""

    @property
    def longest_gap(self) -> float:
        return max((gap for gap, _ in self.gaps), default=0.0)

    @property
    def num_late(self) -> int:
        """Streams with a gap beyond the bound."""
        return sum(gap > bound for gap, bound in self.gaps)

    @property
    def is_right(self) -> bool:
        return bool(self.skipped) or not (
            self.num_lost
            or self.num_duplicated
            or self.num_beyond_noise
            or self.problems
            or self.num_late
            or self.num_tries == 0
        )


def rows(strikes: Sequence[Strike], verdicts: Iterable[Verdict]) -> list[Row]:
    """A row for each kind of strike. What is wrong with a stream is put down to the last strike that hit it, or else to the last
    one before its end."""
    by_event: dict[str, Row] = {}
    for strike in strikes:
        row = by_event.setdefault(strike.event, Row(strike.event, strike.bound))
        row.bound = max(row.bound, strike.bound)
        row.num_tries += 1
    ordered = sorted(strikes, key=lambda strike: strike.at)
    for verdict in verdicts:
        stream = verdict.stream
        hitting: Strike | None = None
        for place, strike in enumerate(ordered):
            if not strike.hits(stream):
                continue
            hitting = strike
            before = ordered[place + 1].at if place + 1 < len(ordered) else float("inf")
            row = by_event[strike.event]
            row.num_streams += 1
            if stream.habit in ("task", "thread"):
                gap, where = longest_gap(stream, strike, before)
                row.gaps.append((gap, strike.bound))
                if gap > strike.bound:
                    row.late.append(
                        f"{stream.request_id} waited {gap:.2f} s, the bound is {strike.bound:.2f} s: {where}"
                    )
        _count(by_event[(hitting or _last_before(ordered, stream)).event], verdict)
    return list(by_event.values())


def _last_before(strikes: Sequence[Strike], stream: Stream) -> Strike:
    end = stream.heard[-1].at if stream.heard else float("inf")
    return next((strike for strike in reversed(strikes) if strike.at <= end), strikes[0])


def _count(row: Row, verdict: Verdict) -> None:
    name = f"{verdict.stream.request_id} ({verdict.stream.request.kind}, {verdict.stream.habit})"
    row.num_lost += bool(verdict.lost)
    row.num_duplicated += bool(verdict.duplicated)
    row.problems += [f"{name}: {problem}" for problem in (*verdict.lost, *verdict.duplicated)]
    row.num_differing += verdict.is_differing
    row.num_beyond_noise += verdict.is_beyond_noise
    told = row.problems if verdict.is_beyond_noise else row.notes
    told += [f"{name}: {difference}" for difference in verdict.differences]
