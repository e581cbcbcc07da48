"""Exit code 0 while the worker of this container is ready or draining; else what it says, and 1. Needs the standard library only."""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    port = int(os.environ.get("GLMQ_METRICS_PORT") or 9750) + int(os.environ.get("GLMQ_WORKER_INDEX") or 0)
    try:
        # No proxy of the environment: it is this container.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{port}/health", timeout=4) as answer:
            print(answer.read().decode())
            return 0
    except urllib.error.HTTPError as error:
        with error:
            print(error.read().decode())
    except OSError as error:
        print(f"port {port}: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
