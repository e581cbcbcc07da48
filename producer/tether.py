"""Programs that end when the process that started them does, however that ends. On Linux only; elsewhere they are started as they are."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

# Exec'd in the place of the program, which so gets SIGTERM when the thread dies that started it. Not with preexec_fn, which runs
# Python between fork and exec: in a process with threads it can hang there.
_LAUNCHER: Final = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)
if os.getppid() != parent:
    sys.exit(0)
os.execv(sys.argv[2], sys.argv[2:])
"""


def tethered(command: Sequence[str]) -> list[str]:
    """A command that does the same in the same process, and gets SIGTERM when the thread that started it is gone.

    Its first word is a path, because PATH is not searched.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *command]
