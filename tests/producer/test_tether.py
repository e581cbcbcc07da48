"""A tethered program is the program itself, and starts only under the parent that wanted it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from producer.tether import tethered


def test_a_tethered_program_has_the_process_that_was_started() -> None:
    command = tethered(
        [sys.executable, "-c", "import os, sys; print(os.getpid(), sys.argv[1:])", "a b", "-x"]
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        said, _ = process.communicate(timeout=30)

    assert said == f"{process.pid} ['a b', '-x']\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is told on Linux only")
def test_the_launcher_gives_up_if_its_parent_is_gone_already() -> None:
    command = tethered([sys.executable, "-c", "print('ran')"])
    command[command.index(str(os.getpid()))] = "1"

    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)

    assert done.stdout == ""
