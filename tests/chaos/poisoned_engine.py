"""The engine process, but for requests that kill it: whoever has a certain seed ends it, in the prefill or in the middle of the answer."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass
from typing import Final

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.model_runner import Launched
from workers.engine.process import main
from workers.engine.scheduler import Schedule


@dataclass(frozen=True, slots=True)
class Poison:
    """How a request kills its engine."""

    name: str
    signal: int
    token: int = 0
    """At the prefill (0), or at the step that would give the token after this one."""


POISONS: Final = {
    4_013_370_001: Poison("a fault in the prefill", signal.SIGSEGV),
    4_013_370_002: Poison("memory that runs out in the prefill", signal.SIGKILL),
    4_013_370_003: Poison("a fault at the sixth token", signal.SIGSEGV, 5),
}
"""By the seed of the request."""


def new_engine(config: EngineConfig) -> Engine:
    """The native engine of this config, with a weakness."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    engine = Engine.from_config(config)
    launch = engine._runner.launch

    def launch_or_die(schedule: Schedule) -> Launched:
        for sequence in schedule.sequences:
            poison = POISONS.get(sequence.sampling.seed)
            if poison is not None and sequence.num_generated >= poison.token:
                os.kill(os.getpid(), poison.signal)
        return launch(schedule)

    engine._runner.launch = launch_or_die  # type: ignore[method-assign]
    return engine


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], new_engine))
