"""Adapters from the command line to the answer: loaded while a real worker serves, asked for by name, unloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from producer.adapters import Adapters
from producer.client import Client
from producer.contract import Finished, RequestFailed
from producer.settings import Settings
from tests.journey.conftest import WorkerProcess
from tests.lora_adapter import write_adapter
from workers.models.config import ModelConfig

pytestmark = [pytest.mark.journey, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
GREEDY = {"temperature": 0.0, "max_new_tokens": 12, "min_new_tokens": 12}
Glmq = Callable[..., subprocess.CompletedProcess[str]]
NewWorker = Callable[..., Any]


@pytest.fixture(scope="module")
def folders(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of the checkpoint, and one of another model."""
    config = ModelConfig.from_folder(tiny_checkpoint)
    root = tmp_path_factory.mktemp("adapters")

    def shapes(hidden: int) -> dict[str, tuple[int, int]]:
        return {
            f"transformer.layers.{index}.attention.query_key_value": (3 * hidden, hidden)
            for index in range(config.num_layers)
        }

    return {
        "law": write_adapter(root / "law", shapes(config.hidden_size), seed=1),
        "fitness": write_adapter(root / "fitness", shapes(config.hidden_size), seed=2, as_bin=True),
        "foreign": write_adapter(root / "foreign", shapes(4096), seed=3),
    }


@pytest.fixture(scope="module")
def served(
    redis_url: str, tiny_checkpoint: Path, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Settings]:
    """A deployment whose worker has two adapters from its start."""
    folder = tmp_path_factory.mktemp("served")
    settings = Settings(redis_url=redis_url, namespace=f"served-{uuid.uuid4().hex[:8]}", state_dir=folder)
    options = [f"--adapter={name}={folders[name]}" for name in ("law", "fitness")]
    worker = WorkerProcess(settings, tiny_checkpoint, folder / "worker.log", tuple(options))
    worker.wait_for_log("ready: ")
    yield settings
    assert worker.end() == 0, worker.log
    assert "Traceback" not in worker.log


@pytest.fixture
def served_client(served: Settings) -> Iterator[Client]:
    with Client(served) as client:
        yield client


@pytest.fixture
def glmq() -> Glmq:
    def run(settings: Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from producer.cli import main; main()", "adapters", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={
                **os.environ,
                "REDIS_URL": settings.redis_url or "",
                "GLMQ_NAMESPACE": settings.namespace,
                "GLMQ_STATE_DIR": str(settings.state_dir),
                "COLUMNS": "200",
                "TERM": "dumb",
            },
        )

    return run


def answer(client: Client, adapter: str | None, **sampling: Any) -> Finished:
    return client.chat("你好", adapter=adapter, sampling={**GREEDY, **sampling}).result(60)


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_adapter_is_loaded_asked_for_and_unloaded_while_the_worker_serves(
    new_worker: NewWorker,
    tiny_checkpoint: Path,
    folders: dict[str, Path],
    client: Client,
    glmq: Glmq,
) -> None:
    settings = client.settings
    worker = new_worker(checkpoint=tiny_checkpoint)
    assert "no adapters" in glmq(settings, "list").stdout
    base = answer(client, None).text
    with pytest.raises(RequestFailed, match=r"unknown_adapter.*'law' is not loaded here \(loaded: none\)"):
        answer(client, "law")
    streaming = client.chat("你好", sampling={**GREEDY, "max_new_tokens": 300, "min_new_tokens": 300})

    loaded = glmq(settings, "load", "law", str(folders["law"]))

    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert loaded.stdout.endswith(": law is loaded\n")
    assert "adapter law: loaded from" in worker.log
    with_law = answer(client, "law").text
    assert with_law != base
    assert answer(client, None).text == base

    # Another one in its place: what has begun ends with the first.
    long = client.chat(
        "你好", adapter="law", sampling={**GREEDY, "max_new_tokens": 400, "min_new_tokens": 400}
    )
    next(event for event in long.stream() if event.type == "token")
    assert glmq(settings, "load", "law", str(folders["fitness"])).returncode == 0
    assert answer(client, "law").text not in (base, with_law)
    unloaded = glmq(settings, "unload", "law")
    assert unloaded.returncode == 0
    assert ": law is unloaded" in unloaded.stdout
    assert long.result(60).usage.completion_tokens == 400
    assert long.result().text.startswith(with_law)

    with pytest.raises(RequestFailed, match="unknown_adapter"):
        answer(client, "law")
    assert glmq(settings, "unload", "law").returncode == 1
    assert streaming.result(60).text.startswith(base)
    assert worker.end() == 0
    assert "Traceback" not in worker.log


def test_an_adapter_that_does_not_fit_is_refused_by_name_and_harms_nobody(
    served: Settings, folders: dict[str, Path], served_client: Client, glmq: Glmq
) -> None:
    refused = glmq(served, "load", "other", str(folders["foreign"]))

    assert refused.returncode == 1
    assert "lora_A.weight has the shape [4, 4096], but" in refused.stdout
    assert "Use the checkpoint that the adapter was trained on" in refused.stdout
    with pytest.raises(RequestFailed, match=r"unknown_adapter.*loaded: fitness, law"):
        answer(served_client, "other")
    assert answer(served_client, "fitness").text != answer(served_client, None).text
    assert glmq(served, "load", "bad name", "/x").stderr.startswith("glmq: adapter: 'bad name'")
    (listed,) = json.loads(glmq(served, "list", "--json").stdout)
    assert listed["known"] == ["fitness", "law"]
    assert sorted(listed["loaded"]) == ["fitness", "law"]


def test_many_adapters_at_once_each_give_what_they_give_alone(served_client: Client) -> None:
    names = [None, "law", "fitness"]
    alone = {name: answer(served_client, name).text for name in names}
    together = [served_client.chat("你好", adapter=names[index % 3], sampling=GREEDY) for index in range(24)]
    assert [one.result(60).text for one in together] == [alone[names[index % 3]] for index in range(24)]
    assert len(set(alone.values())) == 3


def test_a_merged_adapter_is_in_every_answer(
    new_worker: NewWorker,
    tiny_checkpoint: Path,
    folders: dict[str, Path],
    client: Client,
    served_client: Client,
) -> None:
    new_worker("--adapter", f"law={folders['law']}", "--merge", checkpoint=tiny_checkpoint)

    expected = answer(served_client, "law").text
    assert answer(client, None).text == answer(client, "law").text == expected
    (refused,) = Adapters(client).load("fitness", folders["fitness"])
    assert "merged into the weights" in refused.problem


def test_a_folder_of_adapters_is_loaded_as_it_is_asked_for(
    new_worker: NewWorker, tiny_checkpoint: Path, folders: dict[str, Path], client: Client, tmp_path: Path
) -> None:
    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "law").symlink_to(folders["law"])
    new_worker("--adapters-dir", str(directory), "--max-adapters", "1", checkpoint=tiny_checkpoint)
    adapters = Adapters(client)
    assert [(worker.known, worker.loaded) for worker in adapters.of_workers()] == [(("law",), ())]

    with_law = answer(client, "law").text
    (directory / "later").symlink_to(folders["fitness"])
    with_later = answer(client, "later").text

    assert len({with_law, with_later, answer(client, None).text}) == 3
    wait_for(lambda: [(w.known, w.loaded) for w in adapters.of_workers()] == [(("later", "law"), ("later",))])
    assert answer(client, "law").text == with_law


def test_adapters_that_were_loaded_by_command_survive_the_engine(
    new_worker: NewWorker, tiny_checkpoint: Path, folders: dict[str, Path], client: Client
) -> None:
    worker = new_worker(checkpoint=tiny_checkpoint)
    assert [reply.problem for reply in Adapters(client).load("law", folders["law"])] == [""]
    expected = answer(client, "law").text

    os.kill(worker.engine_pid(), 9)
    worker.wait_for_log("the engine died")
    wait_for(lambda: worker.log.count("ready: ") == 2)

    assert answer(client, "law").text == expected


def test_an_adapter_that_cannot_be_loaded_stops_the_start(
    new_worker: NewWorker, tiny_checkpoint: Path, folders: dict[str, Path]
) -> None:
    worker = new_worker("--adapter", f"x={folders['foreign']}", checkpoint=tiny_checkpoint, ready=False)
    assert worker.process.wait(60) == 1
    assert "lora_A.weight has the shape" in worker.log


def test_without_a_worker_the_command_says_so(glmq: Glmq, settings: Settings) -> None:
    assert settings.redis_url
    for arguments in (("list",), ("load", "law", "/adapters/law"), ("unload", "law")):
        asked = glmq(settings, *arguments)
        assert asked.returncode == 3
        assert "no worker is alive" in asked.stdout
