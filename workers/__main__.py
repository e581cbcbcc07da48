"""`python -m workers`: a worker in the foreground."""

import sys

from workers.worker import main

if __name__ == "__main__":
    sys.exit(main())
