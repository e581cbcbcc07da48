"""The chaos suite's short form: one deployment under load, and one blow of each kind that needs no long wait (`make chaos` has all of them)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
import torch

from tests.chaos.battle import Suite
from tests.chaos.deployment import CONTEXT_LEN, ROOT
from tests.chaos.outages import kill_server
from tests.chaos.processes import drain, kill_engine, kill_worker
from tests.chaos.strikes import Row
from tests.chaos.undisturbed import Undisturbed

pytestmark = [pytest.mark.journey, pytest.mark.timeout(240)]

SEED = 20261124
LONGEST_SECONDS = 10.0
"""That a reader waits. `make chaos` has the real bounds, for two quiet cores; here other tests run beside it. Without leases it would be half a
minute and more."""


async def _fight(suite: Suite) -> list[Row]:
    async with suite.battle(concurrency=6, habits=("task", "task", "thread", "leaves")) as battle:
        battle.load.start_talks(2, num_turns=3)
        battle.load.start_documents(1)
        first, second = battle.workers
        await battle.until_live(first, 2)
        await kill_worker(battle, first)
        await battle.until_live(second, 2)
        await kill_engine(battle, second)
        await battle.until_live(number=3)
        await kill_server(battle)
        await battle.until_live(second, 2)
        await drain(battle, second, "SIGTERM of a worker")
        return await battle.verdicts()


def test_no_answer_is_lost_doubled_or_changed_whoever_dies(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    said: list[str] = []
    suite = Suite(
        folder=tmp_path,
        seed=SEED,
        undisturbed=Undisturbed(ROOT / "workers" / "models" / "demo", context_len=CONTEXT_LEN),
        workload_size=40,
        say=said.append,
    )
    begin = time.monotonic()

    rows = asyncio.run(_fight(suite))

    told = "\n".join(
        [
            *said,
            *(f"{row.event}: {problem}" for row in rows for problem in (*row.problems, *row.late)),
            f"{time.monotonic() - begin:.0f} s",
        ]
    )
    assert [
        row.event
        for row in rows
        if row.num_lost or row.num_duplicated or row.num_beyond_noise or row.problems
    ] == [], told
    assert [row.num_tries for row in rows] == [1, 1, 1, 1], told
    assert {row.event: row.longest_gap for row in rows if row.longest_gap > LONGEST_SECONDS} == {}, told
    # An answer may end just before the blow that was meant for it.
    assert sum(row.num_streams > 0 for row in rows) >= 3, told
