"""docker-compose.yml, and the files that its containers are given: what can be tested where no container can run.

`docker compose config` (or the older docker-compose) checks the file where there is one; the rest is looked at as data, and the server
is really started with its configuration.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from producer.embedded import find_binary
from workers.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "ops" / "docker"
PROFILES = {"cpu": ["cpu0", "cpu1"]} | {
    f"gpu{'' if num == 1 else num}": [f"gpu{index}" for index in range(num)] for num in (1, 2, 4, 8)
}
OUR_VARIABLES = re.compile(r"GLMQ_[A-Z_]+")


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    return loaded["services"]


def started(services: dict[str, Any], profile: str) -> dict[str, Any]:
    return {
        name: service for name, service in services.items() if profile in service.get("profiles", [profile])
    }


def environment_of(service: dict[str, Any], **given: str) -> dict[str, str]:
    """As the container gets it: `${NAME:-default}` replaced."""
    return {
        name: re.sub(r"\$\{(\w+):-([^}]*)\}", lambda match: given.get(match[1]) or match[2], str(value))
        for name, value in service["environment"].items()
    }


def compose_command() -> list[str]:
    if shutil.which("docker"):
        command = ["docker", "compose"]
        if subprocess.run([*command, "version"], capture_output=True).returncode == 0:
            return command
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    pytest.skip("neither `docker compose` nor docker-compose is installed")


@pytest.mark.parametrize("profile", [*PROFILES, "tools"])
def test_compose_takes_the_file_in_every_profile(profile: str) -> None:
    checked = subprocess.run(
        [*compose_command(), "--profile", profile, "config", "--quiet"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )

    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(("profile", "workers"), PROFILES.items())
def test_a_profile_starts_a_server_its_workers_and_what_watches_exactly_them(
    services: dict[str, Any], profile: str, workers: list[str]
) -> None:
    names = started(services, profile)

    assert sorted(names) == sorted(["valkey", "grafana", f"prometheus-{profile}", *workers])
    mounted = [
        volume.partition(":")[0]
        for volume in names[f"prometheus-{profile}"]["volumes"]
        if volume.endswith(":/etc/prometheus/targets/workers.yml:ro")
    ]
    (group,) = yaml.safe_load((ROOT / mounted[0]).read_text())
    ports = {
        name: int(names[name]["environment"]["GLMQ_METRICS_PORT"])
        + int(names[name]["environment"]["GLMQ_WORKER_INDEX"])
        for name in workers
    }
    assert group["targets"] == [f"{name}:{port}" for name, port in ports.items()]


def test_each_gpu_has_one_worker_that_sees_it_alone(services: dict[str, Any]) -> None:
    for index in range(8):
        service = services[f"gpu{index}"]
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "device_ids": [str(index)], "capabilities": ["gpu"]}
        # The only card of its container is number 0 there.
        assert service["environment"]["GLMQ_DEVICE"] == "cuda:0"
        assert service["environment"]["GLMQ_WORKER_INDEX"] == str(index)


def test_every_setting_of_a_worker_is_one_that_it_reads_and_takes(
    services: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = set(OUR_VARIABLES.findall("".join(path.read_text() for path in (ROOT / "workers").glob("*.py"))))
    known |= set(OUR_VARIABLES.findall((ROOT / "producer" / "settings.py").read_text()))
    for name, service in services.items():
        if not name.startswith(("cpu", "gpu")):
            continue
        environ = environment_of(service)
        assert {variable for variable in environ if variable.startswith("GLMQ_")} <= known
        settings = WorkerSettings.from_environ({**environ, "GLMQ_ADAPTERS_DIR": str(tmp_path)})
        assert settings.checkpoint == Path("/checkpoint")
        assert settings.device == environ["GLMQ_DEVICE"]
        assert settings.queue.redis_url == "redis://valkey:6379/0"


def test_a_worker_has_time_to_drain_before_it_is_killed(services: dict[str, Any]) -> None:
    for name, service in services.items():
        if name.startswith(("cpu", "gpu")):
            grace = float(service["environment"]["GLMQ_GRACE_SECONDS"])
            assert float(service["stop_grace_period"].removesuffix("s")) >= grace + 10


def test_everything_that_is_mounted_is_there(services: dict[str, Any]) -> None:
    volumes = [volume for service in services.values() for volume in service.get("volumes", [])]
    sources = {re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0] for volume in volumes}

    for source in sources:
        if source.startswith("."):
            assert (ROOT / source).exists(), source
    named = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["volumes"]
    assert {source for source in sources if not source.startswith(".")} == named.keys()


def test_nothing_is_reachable_from_other_machines_and_nothing_has_more_rights_than_it_needs(
    services: dict[str, Any],
) -> None:
    for name, service in services.items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.get("privileged"), name
        # Whatever runs for long says how it is.
        assert name == "glmq" or "healthcheck" in service or service["image"] == "glmq-worker", name


def test_the_images_run_as_a_user_and_the_producers_has_no_torch() -> None:
    dockerfile = (DOCKER / "Dockerfile").read_text()
    stages = dict(re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", dockerfile, re.M | re.S))

    for image in ("producer", "worker"):
        assert "USER glmq" in stages[image]
        assert f"COPY --from={image}-build" in stages[image]
        assert not re.search(r"^RUN .*pip", stages[image], re.M)
    wanted = {
        extra: subprocess.run(
            [sys.executable, DOCKER / "requirements.py", *extra], capture_output=True, text=True, check=True
        ).stdout
        for extra in ((), ("worker",))
    }
    assert "torch" not in wanted[()]
    assert "torch" in wanted[("worker",)]
    assert set(wanted[()].split("\n")) < set(wanted[("worker",)].split("\n"))


def test_an_unknown_extra_is_refused() -> None:
    refused = subprocess.run(
        [sys.executable, DOCKER / "requirements.py", "wroker"], capture_output=True, text=True
    )

    assert refused.returncode == 1
    assert "no such extra: wroker" in refused.stderr


@pytest.fixture
def server(tmp_path: Path) -> Iterator[redis.Redis]:
    """A server with ops/redis/valkey.conf, given the options that its container is given."""
    socket = tmp_path / "socket"
    process = subprocess.Popen(
        [
            *(find_binary().path, ROOT / "ops" / "redis" / "valkey.conf", "--dir", tmp_path),
            *("--port", "0", "--unixsocket", socket),
        ],
        stdout=subprocess.DEVNULL,
    )
    connection = redis.Redis(unix_socket_path=str(socket), decode_responses=True)
    deadline = time.monotonic() + 30
    while True:
        try:
            connection.ping()
            break
        except redis.ConnectionError:
            assert process.poll() is None, "the server does not take this configuration"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    yield connection
    connection.close()
    process.terminate()
    process.wait(30)


def test_the_server_takes_its_configuration_and_forgets_nothing(server: redis.Redis) -> None:
    config: Any = server.config_get("*")

    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "everysec"
    assert config["maxmemory-policy"] == "noeviction"
    assert config["save"] == ""
    assert "pubsub 33554432 8388608 60" in config["client-output-buffer-limit"]


class _Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.server.is_well else 503)  # type: ignore[attr-defined]
        self.end_headers()
        self.wfile.write(b'{"state": "it is asked for"}')

    def log_message(self, *_: object) -> None:
        return None


@pytest.mark.parametrize(("is_well", "code"), [(True, 0), (False, 1)])
def test_a_containers_health_is_what_its_worker_says(is_well: bool, code: int) -> None:
    with HTTPServer(("127.0.0.1", 0), _Health) as server:
        server.is_well = is_well  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        asked = subprocess.run(
            [sys.executable, DOCKER / "health.py"],
            env={
                **os.environ,
                "GLMQ_METRICS_PORT": str(server.server_port - 3),
                "GLMQ_WORKER_INDEX": "3",
                "http_proxy": "http://127.0.0.1:9",
            },
            capture_output=True,
            text=True,
            timeout=30,
        )
        server.shutdown()
        thread.join()

    assert asked.returncode == code
    assert "it is asked for" in asked.stdout


def test_a_worker_that_does_not_listen_is_not_well() -> None:
    asked = subprocess.run(
        [sys.executable, DOCKER / "health.py"],
        env={**os.environ, "GLMQ_METRICS_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=30,
    )

    assert asked.returncode == 1
    assert "Traceback" not in asked.stderr
