"""A service that has only Celery and redis-py: the README's script, where nothing of this project can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery
from packaging.requirements import Requirement

from producer.celery_settings import celery_settings

pytestmark = [pytest.mark.journey, pytest.mark.timeout(120)]

SCRIPT = Path(__file__).parents[2] / "ops" / "examples" / "plain_celery.py"


def requirements(name: str, extra: str = "") -> set[str]:
    """This distribution and all that it needs."""
    found = {name}
    for line in distribution(name).requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
            found |= requirements(requirement.name, *requirement.extras)
    return found


@pytest.fixture
def bare_packages(tmp_path: Path) -> Path:
    """A folder with what `pip install celery[redis]` gives: Celery, redis-py and what they need, and nothing else."""
    folder = tmp_path / "site"
    folder.mkdir()
    for name in requirements("celery", "redis"):
        files = distribution(name).files or ()
        for top in {file.parts[0] for file in files if not file.parts[0].startswith("..")}:
            source = Path(str(distribution(name).locate_file(top)))
            if source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)
    return folder


def run(folder: Path, road: Any, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(folder),
        "PYTHONUTF8": "1",
        "REDIS_URL": road.settings.redis_url,
        "GLMQ_NAMESPACE": road.settings.namespace,
    }
    # -S: without this environment's own site-packages.
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        env=environ,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_nothing_of_this_project_can_be_imported_there(bare_packages: Path, road: Any) -> None:
    for name in ("producer", "workers", "pydantic", "torch"):
        assert "No module named" in run(bare_packages, road, "-c", f"import {name}").stderr
    assert run(bare_packages, road, "-c", "import celery, redis").returncode == 0


def test_the_script_sends_a_chat_by_name_and_reads_its_answer(bare_packages: Path, road: Any) -> None:
    answered = run(bare_packages, road, str(SCRIPT), "你好")

    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()


def test_the_script_is_told_what_is_wrong(bare_packages: Path, road: Any) -> None:
    answered = run(bare_packages, road, str(SCRIPT), "长" * 9000)

    assert answered.returncode == 1
    assert answered.stderr.startswith("context_exceeded: query: ")


@pytest.mark.parametrize(
    ("task", "kwargs", "last"),
    [
        ("glmq.summarize", {"text": "Drink water.", "style": "title", "max_length": 8}, "finished"),
        ("glmq.summarize", {"text": "Drink water.", "style": "poem"}, "failed"),
        ("glmq.chat", {"question": "hello"}, "failed"),
    ],
)
def test_plain_tasks_end_with_an_event_whatever_they_carry(
    road: Any, task: str, kwargs: dict[str, Any], last: str
) -> None:
    app = Celery("plain", set_as_current=False)
    app.conf.update(celery_settings(road.settings.redis_url, road.settings.namespace))
    request_id = uuid.uuid4().hex
    queue = road.settings.keys.celery_queue(road.settings.model)
    app.send_task(task, kwargs=kwargs, task_id=request_id, queue=queue)

    with redis.Redis.from_url(road.settings.redis_url, decode_responses=True) as server:
        deadline = time.monotonic() + 30
        while True:
            entries: Any = server.xrevrange(road.settings.keys.events(request_id), count=1)
            if entries and (event := json.loads(entries[0][1]["event"]))["type"] in ("finished", "failed"):
                break
            assert time.monotonic() < deadline
            time.sleep(0.05)
    app.close()

    assert event["type"] == last
    if last == "failed":
        assert event["code"] == "invalid_request"
