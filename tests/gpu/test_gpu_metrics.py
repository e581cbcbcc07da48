"""What the driver says about a real card, through the code that the metrics use."""

from __future__ import annotations

import pytest
import torch

from workers.gpu import Gpu

pytest.importorskip("pynvml")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def test_memory_that_is_allocated_is_seen() -> None:
    gpu = Gpu.find("cuda")
    assert gpu is not None
    torch.zeros(1, device="cuda")
    before = gpu.read()

    held = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    after = gpu.read()

    assert before.memory_used_bytes is not None
    assert after.memory_used_bytes is not None
    assert after.memory_total_bytes is not None
    assert after.memory_used_bytes - before.memory_used_bytes >= 2**29
    assert after.memory_used_bytes < after.memory_total_bytes
    del held


def test_a_card_tells_what_it_can() -> None:
    gpu = Gpu.find("cuda")
    assert gpu is not None
    reading = gpu.read()

    assert reading.name == torch.cuda.get_device_name(0)
    assert reading.utilization is None or 0 <= reading.utilization <= 1
    assert reading.temperature_celsius is None or 10 < reading.temperature_celsius < 110
    assert reading.power_watts is None or 5 < reading.power_watts < 2000
