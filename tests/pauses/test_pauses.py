"""`make test-races` tests something: its pauses are where it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIST = """
import importlib, sitecustomize
for module, classes in sitecustomize.METHODS.items():
    for name, methods in classes.items():
        for method in methods:
            print(hasattr(getattr(getattr(importlib.import_module(module), name), method), "__wrapped__"))
"""


@pytest.mark.parametrize(("seconds", "expected"), [("0.01", {"True"}), ("", {"False"})])
def test_every_method_is_there_and_has_pauses_when_they_are_wanted(seconds: str, expected: set[str]) -> None:
    root, folder = Path(__file__).parents[2], Path(__file__).parent
    environ = {**os.environ, "PYTHONPATH": f"{folder}:{root}", "GLMQ_TEST_PAUSES": seconds}
    listed = subprocess.run(
        [sys.executable, "-c", LIST], env=environ, cwd=root, capture_output=True, text=True
    )
    assert listed.returncode == 0, listed.stderr
    assert set(listed.stdout.split()) == expected
