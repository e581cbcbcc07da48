"""A real engine process: started, asked, broken, killed, orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.poisoned_engine import Poison
from workers.engine.client import EngineClient, EngineDied, _pin_device
from workers.engine.config import EngineConfig
from workers.engine.messages import Abort, Generate, Refused, Sampling, Step
from workers.models.tokenizer import Tokenizer

START_SECONDS = 90
"""Importing torch on a busy machine takes a while."""


@pytest.fixture(scope="module")
def config(tiny_checkpoint) -> EngineConfig:
    return EngineConfig(checkpoint=str(tiny_checkpoint), device="cpu", num_threads=1, block_size=8)


@pytest.fixture(scope="module")
def prompt_ids(tiny_checkpoint) -> list[int]:
    return Tokenizer.from_folder(tiny_checkpoint).build_prompt("你好")


@pytest.fixture(scope="module")
def engine(config) -> Iterator[EngineClient]:
    with EngineClient(config) as client:
        client.wait_until_ready(START_SECONDS)
        yield client


def has_ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    # A child of nobody stays a zombie where no init collects it.
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until_ended(pid: int, seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.05)


def greedy(max_new_tokens: int) -> Sampling:
    return Sampling(max_new_tokens=max_new_tokens, seed=0, temperature=0.0, min_new_tokens=max_new_tokens)


def collect(engine: EngineClient, sequence_ids: set[int]) -> dict[int, list[int]]:
    """The tokens of these sequences, until each has ended."""
    answers: dict[int, list[int]] = {id_: [] for id_ in sequence_ids}
    open_ids = set(sequence_ids)
    for message in engine.messages():
        assert isinstance(message, Step)
        for id_, token, reason in zip(
            message.sequence_ids, message.token_ids, message.finish_reasons, strict=True
        ):
            answers[id_].append(token)
            if reason:
                open_ids.discard(id_)
        if not open_ids:
            return answers
    raise AssertionError("the engine ended")


def test_sequences_are_answered(engine, prompt_ids):
    for id_ in (1, 2):
        engine.send(Generate(id_, prompt_ids, greedy(12)))
    answers = collect(engine, {1, 2})
    assert len(answers[1]) == 12
    assert answers[1] == answers[2]


def test_an_aborted_sequence_is_silent_and_gives_its_blocks_back(engine, prompt_ids):
    engine.send(Generate(11, prompt_ids, greedy(400)))
    engine.send(Generate(12, prompt_ids, greedy(30)))
    first = engine.receive(10)
    assert isinstance(first, Step)
    engine.send(Abort(11))
    steps = []
    # A step may have several tokens of a sequence.
    while not (steps and set(steps[-1].sequence_ids) == {12} and steps[-1].finish_reasons[-1:] == ["length"]):
        message = engine.receive(10)
        assert isinstance(message, Step)
        steps.append(message)
    assert 11 not in steps[-1].sequence_ids
    assert steps[-1].num_running == 0
    engine.send(Generate(13, prompt_ids, greedy(1)))
    last = engine.receive(10)
    assert isinstance(last, Step)
    assert last.num_free_blocks > first.num_free_blocks


def test_a_sequence_that_cannot_run_is_refused(engine, prompt_ids):
    engine.send(Generate(21, [400] * 600 + prompt_ids, greedy(5)))
    refused = engine.receive(10)
    assert isinstance(refused, Refused)
    assert (refused.sequence_id, refused.code) == (21, "context_exceeded")


def test_an_idle_engine_says_nothing(engine):
    assert engine.receive(0.1) is None
    assert engine.is_alive


def test_any_thread_may_send(engine, prompt_ids):
    ids = set(range(100, 140))
    threads = [
        threading.Thread(
            target=lambda part=part: [engine.send(Generate(i, prompt_ids, greedy(3))) for i in part]
        )
        for part in (range(start, start + 10) for start in range(100, 140, 10))
    ]
    for thread in threads:
        thread.start()
    answers = collect(engine, ids)
    for thread in threads:
        thread.join()
    assert all(len(answers[id_]) == 3 for id_ in ids)


def test_a_closed_engine_has_ended_and_its_reader_comes_to_the_end(config):
    client = EngineClient(config)
    client.wait_until_ready(START_SECONDS)
    received: list[object] = []
    reader = threading.Thread(target=lambda: received.extend(client.messages()))
    reader.start()
    client.close()
    reader.join(5)
    assert not reader.is_alive()
    assert (received, client.exit_code) == ([], 0)
    with pytest.raises(EngineDied):
        client.send(Abort(1))


def test_a_killed_engine_is_noticed(config, prompt_ids):
    client = EngineClient(config)
    client.wait_until_ready(START_SECONDS)
    client.kill()
    with pytest.raises(EngineDied, match="signal 9") as raised:
        for _ in client.messages():
            pass
    assert raised.value.exit_code == -signal.SIGKILL
    with pytest.raises(EngineDied):
        client.send(Generate(1, prompt_ids, greedy(1)))
    client.close()


def test_a_checkpoint_with_a_missing_file_is_the_reason(tiny_checkpoint, tmp_path):
    for name in ("config.json", "ice_text.model"):
        (tmp_path / name).write_bytes((tiny_checkpoint / name).read_bytes())
    client = EngineClient(EngineConfig(checkpoint=str(tmp_path), device="cpu"))
    with pytest.raises(EngineDied, match=r"it has no weights.*Download") as raised:
        client.wait_until_ready(START_SECONDS)
    assert raised.value.exit_code == 1
    client.close()


def test_a_step_that_fails_ends_the_engine_with_its_reason(config, prompt_ids, tmp_path):
    (tmp_path / "breaking_engine.py").write_text(
        textwrap.dedent(
            """
            import sys
            from workers.engine import process
            from workers.engine.engine import Engine

            def step(self):
                raise RuntimeError("the device is lost")

            Engine.step = step
            sys.exit(process.main(sys.argv[1:]))
            """
        )
    )
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    client = EngineClient(config, module="breaking_engine", environ=environ)
    client.wait_until_ready(START_SECONDS)
    client.send(Generate(1, prompt_ids, greedy(5)))
    with pytest.raises(EngineDied, match="RuntimeError: the device is lost"):
        client.receive(10)
    client.close()


@pytest.mark.parametrize(
    ("poison", "prefilling"), [(Poison.CRASH_IN_PREFILL, {2}), (Poison.CRASH_IN_DECODE, set())]
)
def test_a_dead_engine_tells_over_which_prefill_it_died(config, prompt_ids, poison, prefilling):
    client = EngineClient(config, module="tests.poisoned_engine")
    client.wait_until_ready(START_SECONDS)
    client.send(Generate(1, prompt_ids, greedy(100)))
    assert isinstance(client.receive(10), Step)
    assert client.prefilling == set()
    client.send(Generate(2, prompt_ids, Sampling(max_new_tokens=9, seed=poison)))
    with pytest.raises(EngineDied, match="signal 11") as raised:
        for _ in client.messages():
            pass
    assert raised.value.prefilling == prefilling
    assert not raised.value.is_killed
    client.close()


@pytest.mark.parametrize("is_ready", [True, False])
def test_an_engine_does_not_outlive_its_parent(config, is_ready):
    code = textwrap.dedent(
        f"""
        import os
        from workers.engine.client import EngineClient
        from workers.engine.config import EngineConfig
        client = EngineClient(EngineConfig(checkpoint={config.checkpoint!r}, device="cpu"))
        if {is_ready}:
            client.wait_until_ready({START_SECONDS})
        print(client.pid, flush=True)
        os.kill(os.getpid(), 9)
        """
    )
    parent = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    wait_until_ended(int(parent.stdout))


def test_an_engine_that_is_not_ready_in_time_is_reported(config):
    client = EngineClient(config)
    with pytest.raises(TimeoutError):
        client.wait_until_ready(0.01)
    client.close(timeout_seconds=0.1)
    assert not client.is_alive


def test_a_gpu_of_the_machine_becomes_the_only_one_that_the_process_sees():
    config = EngineConfig(checkpoint="x", device="cuda:1")
    pinned, environ = _pin_device(config, {})
    assert (pinned.device, environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "1")
    pinned, environ = _pin_device(config, {"CUDA_VISIBLE_DEVICES": "4,GPU-77"})
    assert (pinned.device, environ["CUDA_VISIBLE_DEVICES"]) == ("cuda", "GPU-77")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        _pin_device(config, {"CUDA_VISIBLE_DEVICES": "4"})
    for device in ("cpu", "auto", "cuda"):
        assert _pin_device(EngineConfig(checkpoint="x", device=device), {})[1] == {}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("dtype", "int8"),
        ("max_num_seqs", 0),
        ("block_size", 0),
        ("num_blocks", 1),
        ("cache_gib", 0.0),
        ("context_len", 1),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(field, value):
    with pytest.raises(ValueError, match=field):
        EngineConfig(checkpoint="x", **{field: value})
