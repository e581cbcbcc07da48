"""Where Debian's redis-server and libfaketime are, fetched where there is apt (`fetch.sh`)."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path


class Missing(Exception):
    """It is not here and cannot be fetched; the message says why."""


@functools.cache
def folder() -> Path:
    """Raises Missing."""
    environ = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    fetched = subprocess.run(
        [Path(__file__).with_name("fetch.sh")], capture_output=True, text=True, timeout=300, env=environ
    )
    if fetched.returncode != 0:
        said = fetched.stderr.strip().splitlines()
        raise Missing(said[-1] if said else "fetch.sh failed")
    return Path(fetched.stdout.strip())


def redis_server() -> Path:
    """Raises Missing."""
    return folder() / "redis-server"


def libfaketime() -> Path:
    """Raises Missing."""
    found = sorted(folder().glob("usr/lib/*/faketime/libfaketimeMT.so.1"))
    if not found:
        raise Missing("libfaketime is not in Debian's package for this machine")
    return found[0]
