"""An engine process that says it is ready and dies at once, or, with `ENGINE_NEVER_LOADS` in its environment, never says anything."""

import os
import sys
import time
from multiprocessing.connection import Connection

import msgspec

from workers.engine.messages import Ready

if __name__ == "__main__":
    connection = Connection(int(sys.argv[1]))
    if "ENGINE_NEVER_LOADS" in os.environ:
        time.sleep(600)
    ready = Ready(
        context_len=64, num_blocks=4, block_size=16, device="cpu", dtype="float32", load_seconds=0.0
    )
    connection.send_bytes(msgspec.msgpack.encode(ready))
    sys.exit(3)
