"""What happens to Redis: it dies and comes back, the network to it is cut, its disk is full."""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from pathlib import Path
from typing import Final

from tests.chaos.battle import Battle, Suite
from tests.chaos.deployment import Server
from tests.chaos.proxy import Proxy
from tests.chaos.strikes import Row

RESTART_SECONDS: Final = 1.0
RESTART_BOUND: Final = 4.0
CUT_SECONDS: Final = 10.0
FULL_SECONDS: Final = 5.0
RECOVERY_SECONDS: Final = 3.0
"""After an outage without a restart, until the last reader hears again: what a restart of 1 s leaves of its bound."""


async def kill_server(battle: Battle) -> None:
    strike = battle.strike("kill -9 of Redis, back after 1 s", victims=None, bound=RESTART_BOUND)
    await asyncio.to_thread(battle.deployment.server.kill)
    await asyncio.sleep(RESTART_SECONDS)
    await asyncio.to_thread(battle.deployment.server.start)
    strike.until = time.monotonic()
    await asyncio.sleep(3.0)


async def server_killed(suite: Suite) -> list[Row]:
    """kill -9 of Redis, and its start again after 1 s, with its append-only file."""
    async with suite.battle() as battle:
        for _ in range(suite.times(5)):
            await battle.until_live(number=4)
            await kill_server(battle)
        return await battle.verdicts()


async def network_cut(suite: Suite) -> list[Row]:
    """Nobody reaches Redis for 10 s: everything sent is silently held up."""
    server = Server(suite.folder / "cut", suite.binary)
    proxy = Proxy(server.url)
    try:
        async with suite.battle(server=server, redis_url=proxy.url) as battle:
            bound = CUT_SECONDS + RECOVERY_SECONDS
            for _ in range(suite.times(2)):
                await battle.until_live(number=4)
                await _cut(battle, proxy, "network to Redis cut for 10 s", bound)
            return await battle.verdicts()
    finally:
        proxy.close()


async def worker_cut_off(suite: Suite) -> list[Row]:
    """One worker alone does not reach Redis for 10 s: another takes over, and what the first one says afterwards is fenced."""
    server = Server(suite.folder / "cut-off", suite.binary)
    proxy = Proxy(server.url)
    try:
        async with suite.battle(server=server, worker_urls={"worker0": proxy.url}) as battle:
            for _ in range(suite.times(2)):
                worker = battle.deployment.workers["worker0"]
                await battle.until_live(worker, 2)
                strike = battle.strike("network of one worker cut for 10 s", victims=[worker], bound=3.0)
                proxy.cut()
                await asyncio.sleep(CUT_SECONDS)
                proxy.mend()
                strike.until = time.monotonic()
                await asyncio.sleep(2.0)
            return await battle.verdicts()
    finally:
        proxy.close()


async def _cut(battle: Battle, proxy: Proxy, event: str, bound: float) -> None:
    strike = battle.strike(event, victims=None, bound=bound)
    proxy.cut()
    await asyncio.sleep(CUT_SECONDS)
    proxy.mend()
    strike.until = time.monotonic()
    await asyncio.sleep(4.0)


async def disk_full(suite: Suite) -> list[Row]:
    """The append-only file cannot grow for 5 s, and the server takes no writes meanwhile.

    By a limit on the size of its files, which needs no rights: the write fails halfway, as on a full disk.
    """
    event = "full disk under AOF for 5 s"
    if not sys.platform.startswith("linux"):
        return [Row(event, 0.0, skipped="needs Linux's prlimit")]
    async with suite.battle() as battle:
        server, unlimited = battle.deployment.server, resource.RLIM_INFINITY
        for _ in range(suite.times(2)):
            await battle.until_live(number=4)
            strike = battle.strike(event, victims=None, bound=FULL_SECONDS + RECOVERY_SECONDS)
            size = max(path.stat().st_size for path in _append_only_files(server))
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size + 1000, unlimited))
            await asyncio.sleep(FULL_SECONDS)
            with battle.deployment.connection() as connection:
                state = connection.info("persistence")["aof_last_write_status"]
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
            strike.until = time.monotonic()
            if state != "err":
                return [Row(event, 0.0, problems=[f"the server's append-only file could grow: {state}"])]
            await asyncio.sleep(4.0)
        return await battle.verdicts()


def _append_only_files(server: Server) -> list[Path]:
    return [path for path in (server.state_dir / "data").rglob("*.aof*") if path.is_file()]
