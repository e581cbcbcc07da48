"""`python -m tests.chaos.poisoned_worker`: a worker whose engine a certain request kills. Everything else is the real one."""

import sys

from workers import worker

if __name__ == "__main__":
    worker.ENGINES["native"] = "tests.chaos.poisoned_engine"
    sys.exit(worker.main())
