"""Without transformers 4.30.2 there is no reference to test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if all(importlib.util.find_spec(name) for name in ("transformers", "peft")):
        return
    skip = pytest.mark.skip(reason="the extra `reference` is not installed: it exists for Python 3.11 alone")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(skip)
