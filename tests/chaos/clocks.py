"""Clocks that jump: the wall clocks of workers, and Redis' own.

By libfaketime, preloaded into the processes (`fetch.sh` gets it where there is apt). Monotonic clocks stay true, as on a real machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from tests.chaos.battle import Suite
from tests.chaos.debian import Missing, libfaketime
from tests.chaos.deployment import Server
from tests.chaos.strikes import Row

JUMPS: Final = (3600, -7200, 3600)
"""Seconds; together 0."""


class Clock:
    """The wall clock of processes that were started with its environment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.jump(0)

    @property
    def environ(self) -> Mapping[str, str]:
        return {
            "LD_PRELOAD": str(libfaketime()),
            "FAKETIME_TIMESTAMP_FILE": str(self._path),
            # Asking the file at each call slows everything down that looks at a clock.
            "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_DONT_RESET": "1",
        }

    def jump(self, seconds: int) -> None:
        self._offset += seconds
        part = self._path.with_suffix(".part")
        part.write_text(f"{self._offset:+d}\n")
        part.replace(self._path)


async def workers_clocks(suite: Suite) -> list[Row]:
    """The wall clock of the workers jumps by an hour, there and back: nothing may hang on it."""
    event = "wall clock of workers jumps by an hour"
    suite.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(suite.folder / "workers-clock")
    try:
        environ = clock.environ
    except Missing as missing:
        return [Row(event, 0.0, skipped=str(missing))]
    async with suite.battle(environ=environ) as battle:
        for _ in range(suite.times(2)):
            for seconds in JUMPS:
                await battle.until_live(number=4)
                battle.strike(event, victims=None, bound=1.0)
                clock.jump(seconds)
                await asyncio.sleep(3.0)
        return await battle.verdicts()


async def server_clock(suite: Suite) -> list[Row]:
    """Redis' clock jumps, on which leases and deadlines are kept: forward, and all leases seem to have run out; back, and none does
    until it is renewed."""
    event = "clock of Redis jumps by an hour"
    suite.folder.mkdir(parents=True, exist_ok=True)
    clock = Clock(suite.folder / "server-clock")
    try:
        with _environ(clock.environ):
            server = Server(suite.folder / "jumping", suite.binary)
    except Missing as missing:
        return [Row(event, 0.0, skipped=str(missing))]
    async with suite.battle(server=server) as battle:
        for _ in range(suite.times(2)):
            for seconds in JUMPS:
                await battle.until_live(number=4)
                battle.strike(event, victims=None, bound=3.0)
                before = _time_of(battle.deployment.connection())
                clock.jump(seconds)
                await asyncio.sleep(3.0)
                moved = _time_of(battle.deployment.connection()) - before - 3.0
                if abs(moved - seconds) > 2.0:
                    return [Row(event, 0.0, skipped="this server's clock cannot be moved by libfaketime")]
        return await battle.verdicts()


def _time_of(connection: object) -> float:
    seconds, microseconds = connection.time()  # type: ignore[attr-defined]
    return float(seconds) + float(microseconds) / 1e6


@contextlib.contextmanager
def _environ(more: Mapping[str, str]) -> Iterator[None]:
    """What is started meanwhile has this, too."""
    before = dict(os.environ)
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
