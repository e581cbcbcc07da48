"""Random pauses between the steps of a worker's threads, in every Python process of a test run: who looks too early is found out.

`make test-races` puts this folder on PYTHONPATH, and Python imports the module by its name when it starts. Does nothing unless GLMQ_TEST_PAUSES
says how many seconds a pause may take.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

MAX_SECONDS = float(os.environ.get("GLMQ_TEST_PAUSES") or 0)
SHARE = 0.3
"""So often there is one."""
METHODS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "producer.ledger.ledger": {"Ledger": ["run", "run_many"]},
    "workers.claims": {"Claims": ["_begin", "resume"]},
    "workers.leases": {"Leases": ["renew", "_reap"]},
    "workers.pool": {"Ticket": ["accept", "complete"]},
    "workers.publisher": {"Publisher": ["end", "_settle", "_publish_loss", "_publish_ends"]},
    "workers.running": {"RunningRequests": ["add", "bind", "unbind", "remove"]},
}
"""Module, class, and the methods before and after which there are pauses."""


def pause() -> None:
    # The main thread belongs to Celery's hub, to an event loop or to the test itself, none of which may be held up.
    if threading.current_thread() is not threading.main_thread() and random.random() < SHARE:
        time.sleep(random.random() * MAX_SECONDS)


def paused(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def between_pauses(*args: Any, **kwargs: Any) -> Any:
        pause()
        try:
            return method(*args, **kwargs)
        finally:
            pause()

    return between_pauses


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        for class_name, names in METHODS[module.__name__].items():
            class_ = getattr(module, class_name)
            for name in names:
                # A name that is gone ends the run here, instead of making it a test of nothing.
                setattr(class_, name, paused(getattr(class_, name)))


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in METHODS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Loader(fullname, spec.origin)
        return spec


if MAX_SECONDS:
    sys.meta_path.insert(0, _Finder())
