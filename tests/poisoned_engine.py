"""An engine process that certain requests kill: the real one, in which a request's seed may say how.

`python -m tests.poisoned_engine` is what a worker runs instead of its engine when it was started by `WORKER`; nothing of this can be
reached from the code that is shipped.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from enum import IntEnum

from workers.engine import process


class Poison(IntEnum):
    """Seeds, and what a request that has one does to its engine."""

    CRASH_IN_PREFILL = 666_001
    CRASH_IN_DECODE = 666_002
    RAISE_IN_PREFILL = 666_003
    HANG_IN_PREFILL = 666_004
    HANG_IN_DECODE = 666_005


def poison_engine() -> None:
    """From now on the engine of this process dies of them."""
    from workers.engine.model_runner import Launched, ModelRunner
    from workers.engine.scheduler import Schedule

    launch = ModelRunner.launch

    def poisoned_launch(self: ModelRunner, schedule: Schedule) -> Launched:
        seeds = {sequence.sampling.seed for sequence in schedule.sequences}
        if schedule.is_prefill:
            if Poison.CRASH_IN_PREFILL in seeds:
                os.kill(os.getpid(), signal.SIGSEGV)
            if Poison.RAISE_IN_PREFILL in seeds:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            if Poison.HANG_IN_PREFILL in seeds:
                time.sleep(600)
        else:
            if Poison.CRASH_IN_DECODE in seeds:
                os.kill(os.getpid(), signal.SIGSEGV)
            if Poison.HANG_IN_DECODE in seeds:
                time.sleep(600)
        return launch(self, schedule)

    ModelRunner.launch = poisoned_launch  # type: ignore[method-assign]


WORKER = (
    "import sys; from workers import worker; worker.ENGINES['native'] = 'tests.poisoned_engine'; "
    "sys.exit(worker.main())"
)
"""`python -c WORKER` is a worker with such an engine."""

if __name__ == "__main__":
    if "POISONED_LOADING" in os.environ:
        time.sleep(600)
    poison_engine()
    sys.exit(process.main(sys.argv[1:]))
