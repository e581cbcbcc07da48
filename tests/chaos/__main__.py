"""`python -m tests.chaos` (`make chaos`): everything that may break breaks while requests come in; one table of what came of it.

Exit code 1 if anything was lost, doubled, changed beyond float noise, or took longer than its bound.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import torch

from producer.embedded import NoServer, ServerBinary, binary_at, find_binary
from tests.chaos import clocks, outages, processes, traffic
from tests.chaos.battle import Suite
from tests.chaos.continuation import continuation
from tests.chaos.debian import Missing, redis_server
from tests.chaos.deployment import CONTEXT_LEN, ROOT
from tests.chaos.strikes import Row
from tests.chaos.table import print_table
from tests.chaos.undisturbed import Undisturbed
from tests.chaos.workload import Workload

Scenario = Callable[[Suite], Awaitable[list[Row]]]
SCENARIOS: Final[dict[str, Scenario]] = {
    "kills": processes.kills,
    "single-engine": processes.single_engine,
    "all-workers": processes.all_workers,
    "sigterm": processes.terminated,
    "rolling": processes.rolling_restart,
    "stopped-worker": processes.stopped_worker,
    "stopped-engine": processes.stopped_engine,
    "redis": outages.server_killed,
    "cut": outages.network_cut,
    "cut-off": outages.worker_cut_off,
    "disk": outages.disk_full,
    "readers": traffic.readers_leave,
    "tickets": traffic.tickets,
    "cancels": traffic.cancel_storm,
    "queue": traffic.queue_full,
    "poison": traffic.poison,
    "clocks": clocks.workers_clocks,
    "redis-clock": clocks.server_clock,
    "continuation": continuation,
}


async def run(suite: Suite, names: Sequence[str]) -> list[Row]:
    """All rows. A scenario that cannot be run to its end is a row with the reason."""
    found: list[Row] = []
    for name in names:
        begin = time.monotonic()
        suite.say(f"-- {name}: {(SCENARIOS[name].__doc__ or '').splitlines()[0]}")
        try:
            rows = await SCENARIOS[name](suite)
        except Exception as error:  # noqa: BLE001 the other scenarios are to be seen, too
            traceback.print_exc()
            rows = [Row(name, 0.0, problems=[f"{type(error).__name__}: {error}"])]
        for row in rows:
            for text in (*row.problems, *row.late, *row.notes):
                suite.say(f"   {row.event}: {text}")
        suite.say(f"   {time.monotonic() - begin:.0f} s")
        found += rows
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    seed = secrets.randbelow(1 << 31) if args.seed is None else args.seed
    try:
        binary = _server(args.server)
    except (Missing, NoServer) as error:
        print(f"--server: {error}", file=sys.stderr)
        return 2
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - begin:7.1f}  {text}", flush=True)

    names = args.only or list(SCENARIOS)
    say(
        f"seed {seed}, {binary.name} {'.'.join(map(str, binary.version))}, {len(names)} of {len(SCENARIOS)} scenarios"
    )
    # More threads spin while they wait, and starve the workers.
    torch.set_num_threads(1)
    undisturbed = Undisturbed(ROOT / "workers" / "models" / "demo", context_len=CONTEXT_LEN)
    workload_size = max(min(args.requests // 5, 200), 40)
    answers = undisturbed.answers(Workload(seed, pool_size=workload_size).pool)
    lens = sorted(len(answer.ids) for answer in answers)
    say(
        f"{len(answers)} undisturbed answers of {lens[0]} to {lens[-1]} tokens, {lens[len(lens) // 2]} at the median"
    )
    with tempfile.TemporaryDirectory(prefix="glmq-chaos-", ignore_cleanup_errors=True) as folder:
        suite = Suite(
            folder=args.keep / f"{seed}-{os.getpid()}" if args.keep else Path(folder),
            seed=seed,
            undisturbed=undisturbed,
            workload_size=workload_size,
            binary=binary,
            scale=args.scale,
            say=say,
            num_kills=args.kills,
            num_requests=args.requests,
            seconds=args.seconds or 5.0 * args.kills,
        )
        rows = asyncio.run(run(suite, names))
    print_table(rows)
    say(f"seed {seed}: {'all bounds hold' if all(row.is_right for row in rows) else 'A BOUND IS BROKEN'}")
    return 0 if all(row.is_right for row in rows) else 1


def _server(named: str | None) -> ServerBinary:
    """Raises Missing, NoServer."""
    if named is None:
        return find_binary()
    return binary_at(redis_server() if named == "debian" else Path(named).resolve())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument(
        "--kills",
        type=int,
        default=300,
        help="of workers and engines, in the scenario `kills` (default: 300)",
    )
    parser.add_argument("--requests", type=int, default=5000, help="that come in meanwhile (default: 5000)")
    parser.add_argument("--seconds", type=float, help="that the kills take (default: 5 a kill)")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="tries of every other event, relative to its usual number"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(SCENARIOS),
        metavar="SCENARIO",
        help=f"may be repeated: {', '.join(SCENARIOS)}",
    )
    parser.add_argument(
        "--seed", type=int, help="of everything random (default: another one each time; it is printed)"
    )
    parser.add_argument(
        "--server",
        metavar="PATH",
        help="a redis-server or valkey-server; `debian` fetches Debian's package (default: the embedded server's program)",
    )
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="where logs and data stay (default: they are deleted)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
