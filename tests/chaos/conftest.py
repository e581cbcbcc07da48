"""The engine that makes undisturbed answers, once for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.chaos.undisturbed import Undisturbed


@pytest.fixture(scope="session")
def undisturbed(tiny_checkpoint: Path) -> Undisturbed:
    torch.set_num_threads(1)
    return Undisturbed(tiny_checkpoint)
