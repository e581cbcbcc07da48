"""Fixtures of the whole suite: a real server, and a namespace of its own for each test."""

from __future__ import annotations

import os
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest

from producer.client import Client
from producer.contract.keys import Keys
from producer.embedded import EmbeddedServer
from producer.ledger import Ledger
from producer.settings import Settings

# On a busy machine drawing an example can take long, which says nothing about the code.
hypothesis.settings.register_profile(
    "glmq", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("glmq")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded server; or the one in GLMQ_TEST_REDIS_URL, to try the suite on another version."""
    if given := os.environ.get("GLMQ_TEST_REDIS_URL"):
        yield given
        return
    with EmbeddedServer.start(tmp_path_factory.mktemp("server")) as server:
        yield server.url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """A deployment that no other test shares."""
    return Settings(
        redis_url=redis_url, namespace=f"test-{uuid.uuid4().hex[:12]}", state_dir=tmp_path / "state"
    )


@pytest.fixture
def keys(settings: Settings) -> Keys:
    return settings.keys


@pytest.fixture
def ledger(redis_url: str, keys: Keys) -> Iterator[Ledger]:
    ledger = Ledger.at(redis_url, keys)
    yield ledger
    ledger.close()


@pytest.fixture
def client(settings: Settings) -> Iterator[Client]:
    with Client(settings) as client:
        yield client


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small ChatGLM-6B of random weights and a tokenizer of its own."""
    from tests.random_checkpoint import write_random_checkpoint

    folder = tmp_path_factory.mktemp("tiny-checkpoint")
    write_random_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint_with_code(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random checkpoint with Python files in its folder, for the reference backend."""
    from tests.checkpoint_code import add_code

    folder = tmp_path_factory.mktemp("with-code") / "tiny"
    shutil.copytree(tiny_checkpoint, folder)
    add_code(folder)
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies of a checkpoint that the test may spoil, each in a folder of a name of its own."""

    def copy(checkpoint: Path) -> Path:
        folder = tmp_path / f"copy{uuid.uuid4().hex[:8]}"
        shutil.copytree(checkpoint, folder, copy_function=shutil.copyfile)
        return folder

    return copy


@pytest.fixture(scope="session")
def golden_root() -> Path:
    """Data that the original code made. GLMQ_TEST_GOLDEN names another folder than the one beside the repository."""
    folder = Path(os.environ.get("GLMQ_TEST_GOLDEN", Path(__file__).parents[2] / "shared" / "golden"))
    if not folder.is_dir():
        pytest.skip(f"the golden data is not at {folder}: set GLMQ_TEST_GOLDEN to its folder")
    return folder


@pytest.fixture(scope="session")
def prometheus_folder() -> Path:
    """Where prometheus and promtool are; fetched on a Debian machine that has none (ops/prometheus/fetch.sh)."""
    script = Path(__file__).parents[1] / "ops" / "prometheus" / "fetch.sh"
    fetched = subprocess.run([script], capture_output=True, text=True, timeout=300)
    if fetched.returncode == 0:
        return Path(fetched.stdout.strip())
    reason = fetched.stderr.strip().splitlines()[-1] if fetched.stderr.strip() else "fetch.sh failed"
    if os.environ.get("CI"):
        pytest.fail(f"CI must have Prometheus: {reason}")
    pytest.skip(reason)
