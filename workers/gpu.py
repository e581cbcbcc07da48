"""The GPU of a worker as its driver sees it (NVML): memory, load, temperature, power. Imports no torch, and nothing of the kind is needed here."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What the driver says at one moment; None: this card does not say it."""

    name: str
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    utilization: float | None = None
    """Share of the last moment in which a kernel ran, 0 to 1."""
    temperature_celsius: float | None = None
    power_watts: float | None = None


class Gpu:
    """One card. Reading costs well under a millisecond."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle
        name = nvml.nvmlDeviceGetName(handle)
        self.name = name.decode() if isinstance(name, bytes) else str(name)

    @classmethod
    def find(cls, device: str, environ: Mapping[str, str] | None = None) -> Gpu | None:
        """The card that this device (cuda, cuda:N) of a process with these variables stands for; None: it cannot be read."""
        try:
            import pynvml  # noqa: PLC0415  (the driver's library is loaded only where there is a GPU)

            pynvml.nvmlInit()
            selector = selected(device, os.environ if environ is None else environ)
            if selector.isdigit():
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(selector))
            else:
                handle = pynvml.nvmlDeviceGetHandleByUUID(selector)
            return cls(pynvml, handle)
        except Exception as error:  # noqa: BLE001  (a worker answers without these figures, whatever the driver's trouble)
            logger.warning("the GPU cannot be watched: %s", error)
            return None

    def read(self) -> GpuReading:
        memory = self._ask(self._nvml.nvmlDeviceGetMemoryInfo)
        rates = self._ask(self._nvml.nvmlDeviceGetUtilizationRates)
        power = self._ask(self._nvml.nvmlDeviceGetPowerUsage)
        celsius = self._ask(
            lambda handle: self._nvml.nvmlDeviceGetTemperature(handle, self._nvml.NVML_TEMPERATURE_GPU)
        )
        return GpuReading(
            self.name,
            memory_used_bytes=None if memory is None else int(memory.used),
            memory_total_bytes=None if memory is None else int(memory.total),
            utilization=None if rates is None else rates.gpu / 100,
            temperature_celsius=None if celsius is None else float(celsius),
            power_watts=None if power is None else power / 1000,
        )

    def _ask(self, question: Callable[[Any], T]) -> T | None:
        """Cards do not answer every question: a slice of one has no power, for example."""
        try:
            return question(self._handle)
        except self._nvml.NVMLError:
            return None


def selected(device: str, environ: Mapping[str, str]) -> str:
    """Index or UUID of the card, as CUDA_VISIBLE_DEVICES and the driver name it."""
    index = int(device.partition(":")[2] or 0)
    visible = [name.strip() for name in environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not visible:
        return str(index)
    return visible[index] if index < len(visible) else str(index)
