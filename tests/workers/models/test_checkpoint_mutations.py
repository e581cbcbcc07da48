"""Thousands of damaged checkpoints and adapters, each loaded in a process that would show a crash, a hang or code that ran.

GLMQ_TEST_MUTATIONS is how many; 10,000 take a few minutes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
NUM_CASES = int(os.environ.get("GLMQ_TEST_MUTATIONS", "1500"))
SECONDS_PER_CASE = 0.2


@pytest.mark.timeout(120 + NUM_CASES * SECONDS_PER_CASE)
def test_damaged_files_are_refused_by_name_or_load() -> None:
    command = [sys.executable, "-m", "tests.checkpoint_mutations", "--count", str(NUM_CASES)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line for line in answer.stdout.splitlines() if line.startswith("case ")]
    last = lines[-1] if lines else "no case at all"
    assert answer.returncode == 0, f"exit code {answer.returncode} at {last}:\n{answer.stderr[-3000:]}"
    assert len(lines) == NUM_CASES
    outcomes = Counter((line.split()[5].rstrip(":"), line.split()[4].rstrip(":")) for line in lines)
    # Damage that is never noticed, or nothing but damage that is found at once, would test nothing.
    for file in {file for file, _ in outcomes}:
        assert outcomes[file, "refused"] > outcomes[file, "loaded"] > 0, outcomes
