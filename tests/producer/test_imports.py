"""What a producing service installs is all that the producer imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CODE = """
import sys
# As if none of these were installed: importing one raises ImportError.
for name in ("torch", "numpy", "safetensors", "sentencepiece", "transformers", "peft", "msgspec", "prometheus_client", "workers"):
    sys.modules[name] = None
import producer, producer.cli
producer.Client, producer.AsyncClient
"""


def test_the_producer_imports_without_torch_and_without_the_worker() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
