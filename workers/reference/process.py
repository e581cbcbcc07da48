"""The engine process of the reference backend: the native one's loop around the checkpoint's own code.

Started by `EngineClient` as `python -m workers.reference.process FD PARENT_PID`.
"""

from __future__ import annotations

import sys

from workers.engine.config import EngineConfig
from workers.engine.process import ServedEngine, main


def _reference_engine(config: EngineConfig) -> ServedEngine:
    # torch is imported here: only now is the environment complete.
    from workers.reference.engine import ReferenceEngine  # noqa: PLC0415

    return ReferenceEngine.from_config(config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], _reference_engine))
