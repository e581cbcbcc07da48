"""The fleet's plans, its pauses, and its supervision of real processes that stand for workers."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from producer.contract import InvalidSetting
from producer.fleet import Backoff, Fleet, WorkerPlan, cpu_plans, gpu_plans, num_cores

# A worker in small: says who it is in a file, is ready when it has, drains on the first SIGTERM as long as `drain` exists.
STANDS_FOR_A_WORKER = """
import os, pathlib, signal, sys, time
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
seen = 0
def on_term(*_):
    global seen
    seen += 1
signal.signal(signal.SIGTERM, on_term)
lives = folder / f"{name}.lives"
with lives.open("a") as file:
    file.write(f"{os.getpid()}\\n")
if (folder / f"{name}.broken").exists():
    time.sleep(float((folder / f"{name}.broken").read_text() or 0))
    print("cannot start: GLMQ_SLOTS: 'many' is not a whole number")
    sys.exit(1)
(folder / f"{os.getpid()}.ready").touch()
print(f"pinned to {os.environ.get('PIN')}", flush=True)
while not seen or (seen == 1 and (folder / "busy").exists()):
    time.sleep(0.01)
print("released" if seen > 1 else "drained", flush=True)
"""


class Harness:
    """A fleet in a thread, and what it and its workers have said."""

    def __init__(self, folder: Path, names: Collection[str]) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.log = io.StringIO()
        self.num_all_ready = 0
        self.code: int | None = None
        self.fleet = Fleet(
            [WorkerPlan(name, (name,), {"PIN": name.upper()}) for name in names],
            [sys.executable, "-I", "-S", "-c", STANDS_FOR_A_WORKER, str(folder)],
            self._ready_pids,
            environ=os.environ,
            say=self.said.append,
            log=self.log,
            on_all_ready=self._on_all_ready,
            new_backoff=lambda: Backoff(first=0.05, longest=0.2, healthy=60),
        )
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        self.code = self.fleet.run()

    def _ready_pids(self) -> Collection[int]:
        return {int(path.stem) for path in self.folder.glob("*.ready")}

    def _on_all_ready(self) -> None:
        self.num_all_ready += 1

    def start(self) -> None:
        self.thread.start()

    def lives(self, name: str) -> list[int]:
        path = self.folder / f"{name}.lives"
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def wait(self, condition: Callable[[], bool], seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.said, self.log.getvalue())
            time.sleep(0.01)

    def end(self) -> int | None:
        self.fleet.drain()
        self.thread.join(30)
        assert not self.thread.is_alive(), self.said
        return self.code


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[Callable[..., Harness]]:
    started: list[Harness] = []

    def new(*names: str, broken: str = "", after: float = 0) -> Harness:
        if broken:
            (tmp_path / f"{broken}.broken").write_text(str(after))
        harness = Harness(tmp_path, names)
        started.append(harness)
        harness.start()
        return harness

    yield new
    for each in started:
        for _ in range(3):
            each.fleet.drain()
        each.thread.join(30)


# --- what there is to start -------------------------------------------------------------------------------------------


def pins(plans: list[WorkerPlan]) -> dict[str, tuple[str, str]]:
    return {
        plan.name: (plan.environ["CUDA_VISIBLE_DEVICES"], plan.environ["GLMQ_WORKER_INDEX"]) for plan in plans
    }


def no_driver() -> int:
    raise AssertionError("the driver must not be asked")


def test_each_gpu_has_one_worker_that_sees_no_other() -> None:
    plans = gpu_plans("all", {}, lambda: 3)

    assert pins(plans) == {"gpu0": ("0", "0"), "gpu1": ("1", "1"), "gpu2": ("2", "2")}
    assert all(plan.arguments == ("--device", "cuda:0") for plan in plans)
    assert {plan.environ["CUDA_DEVICE_ORDER"] for plan in plans} == {"PCI_BUS_ID"}


def test_indices_count_the_cards_that_we_may_see() -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "4,GPU-abc,6"}

    assert pins(gpu_plans("all", environ, no_driver)) == {
        "gpu0": ("4", "0"),
        "gpu1": ("GPU-abc", "1"),
        "gpu2": ("6", "2"),
    }
    assert pins(gpu_plans("2, 1", environ, no_driver)) == {"gpu2": ("6", "2"), "gpu1": ("GPU-abc", "1")}
    assert pins(gpu_plans("GPU-abc", environ, no_driver)) == {"gpu1": ("GPU-abc", "1")}


def test_slices_of_a_card_get_indices_of_their_own() -> None:
    plans = gpu_plans("MIG-a,MIG-b", {}, lambda: 1)

    assert len({plan.environ["GLMQ_WORKER_INDEX"] for plan in plans}) == 2
    assert {plan.environ["CUDA_VISIBLE_DEVICES"] for plan in plans} == {"MIG-a", "MIG-b"}


@pytest.mark.parametrize(
    ("selection", "visible", "problem"),
    [
        ("0,3", None, "'3' is none of the 2"),
        ("first", None, "'first' is none of the 2"),
        ("", None, "'' is none of the 2"),
        ("1,1", None, "names one twice"),
        ("0,GPU-a", "GPU-a", "names one twice"),
        ("all", "", "no GPU can be seen"),
        ("all", "-1,0", "no GPU can be seen"),
    ],
)
def test_a_selection_that_cannot_be_had_is_refused(selection: str, visible: str | None, problem: str) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    with pytest.raises(InvalidSetting, match=rf"--gpus: .*{problem}"):
        gpu_plans(selection, environ, lambda: 2)


def test_cpu_workers_are_told_apart_and_share_the_cores() -> None:
    plans = cpu_plans(2, 3)

    assert [plan.name for plan in plans] == ["cpu0", "cpu1"]
    assert [plan.environ["GLMQ_WORKER_INDEX"] for plan in plans] == ["0", "1"]
    assert {plan.environ["GLMQ_THREADS"] for plan in plans} == {"3"}
    assert all(plan.arguments == ("--device", "cpu") for plan in plans)
    assert "GLMQ_THREADS" not in cpu_plans(1, None)[0].environ


@pytest.mark.parametrize(
    ("quota", "cores"), [("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", None)]
)
def test_a_containers_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int | None) -> None:
    cpu_max = tmp_path / "cpu.max"
    cpu_max.write_text(quota)

    assert num_cores(cpu_max) == (cores or num_cores(tmp_path / "none"))


# --- how long it waits ------------------------------------------------------------------------------------------------


def test_pauses_double_up_to_the_longest_and_begin_anew_after_a_healthy_minute() -> None:
    backoff = Backoff()

    assert [backoff.on_death(10) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [backoff.on_death(59.9), backoff.on_death(60), backoff.on_death(0)] == [60, 1, 2]


@given(st.lists(st.floats(0, 1e6), max_size=3000))
def test_a_pause_is_never_shorter_than_the_first_nor_longer_than_the_longest(lives: list[float]) -> None:
    backoff = Backoff(first=0.5, longest=30)

    assert all(0.5 <= backoff.on_death(seconds) <= 30 for seconds in lives)


def test_a_thousand_deaths_do_not_overflow() -> None:
    backoff = Backoff()

    assert [backoff.on_death(0) for _ in range(3000)][-1] == 60


# --- supervision ------------------------------------------------------------------------------------------------------


def test_every_worker_gets_what_is_its_own_and_its_lines_its_name(harness: Callable[..., Harness]) -> None:
    fleet = harness("a", "b")
    fleet.wait(lambda: fleet.num_all_ready == 1)

    assert fleet.end() == 0

    lines = fleet.log.getvalue().splitlines()
    assert sorted(lines) == ["a | drained", "a | pinned to A", "b | drained", "b | pinned to B"]
    assert fleet.said[:2] in (
        ["a is ready: 1 of 2", "b is ready: 2 of 2"],
        ["b is ready: 1 of 2", "a is ready: 2 of 2"],
    )
    assert fleet.said[2].startswith("draining: a, b.")
    assert sorted(fleet.said[3:]) == ["a has stopped", "b has stopped"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_is_started_again_and_the_others_do_not_notice(
    harness: Callable[..., Harness], number: signal.Signals
) -> None:
    """SIGTERM from somebody else: that worker was drained, which is how one is renewed in a running fleet."""
    fleet = harness("a", "b")
    fleet.wait(lambda: fleet.num_all_ready == 1)

    os.kill(fleet.lives("a")[0], number)

    fleet.wait(lambda: "a is ready again: 2 of 2" in fleet.said)
    assert len(fleet.lives("a")) == 2
    assert len(fleet.lives("b")) == 1
    how = "killed by SIGKILL" if number == signal.SIGKILL else "exit code 0"
    assert f"a has ended ({how}); it is started again in 0.05 s" in fleet.said
    # What is said when all are ready is said once.
    assert fleet.num_all_ready == 1
    assert fleet.end() == 0


def test_a_worker_that_was_ready_once_is_started_again_however_its_starts_fail(
    harness: Callable[..., Harness],
) -> None:
    fleet = harness("a", "b")
    fleet.wait(lambda: fleet.num_all_ready == 1)
    broken = fleet.folder / "a.broken"
    broken.touch()
    os.kill(fleet.lives("a")[0], signal.SIGKILL)
    fleet.wait(lambda: len(fleet.lives("a")) >= 4)
    broken.unlink()

    fleet.wait(lambda: "a is ready again: 2 of 2" in fleet.said)

    assert "a has ended (exit code 1); it is started again in 0.1 s" in fleet.said
    assert fleet.end() == 0


@pytest.mark.parametrize("after", [0, 1])
def test_a_worker_with_a_bad_setting_is_not_started_again_and_its_reason_is_told(
    harness: Callable[..., Harness], after: float
) -> None:
    fleet = harness("a", "b", broken="a", after=after)
    fleet.wait(lambda: fleet.num_all_ready == 1)
    time.sleep(0.3)

    assert fleet.end() == 1

    assert len(fleet.lives("a")) == 1
    said = "\n".join(fleet.said)
    assert "a could not start (exit code 1): cannot start: GLMQ_SLOTS: 'many' is not a whole number" in said
    assert "b is ready: 1 of 2" in said
    assert "b has stopped" in said


def test_a_fleet_of_which_nothing_can_start_ends_by_itself(harness: Callable[..., Harness]) -> None:
    fleet = harness("a", broken="a")

    fleet.thread.join(30)

    assert fleet.code == 1
    assert fleet.num_all_ready == 0
    assert len(fleet.lives("a")) == 1


def test_the_second_signal_releases_and_the_third_kills(harness: Callable[..., Harness]) -> None:
    (folder := harness("a", "b")).wait(lambda: folder.num_all_ready == 1)
    (folder.folder / "busy").touch()
    folder.fleet.drain()
    folder.wait(lambda: any(line.startswith("draining: ") for line in folder.said))
    time.sleep(0.2)
    assert folder.thread.is_alive()
    os.kill(folder.lives("b")[0], signal.SIGSTOP)

    folder.fleet.drain()
    folder.wait(lambda: "a has stopped" in folder.said)
    assert "a | released" in folder.log.getvalue()
    assert folder.thread.is_alive()
    folder.fleet.drain()
    folder.thread.join(30)

    assert "killing: b" in folder.said
    assert "b has stopped (killed by SIGKILL)" in folder.said
    assert folder.code == 0


def test_a_worker_that_waits_for_its_next_start_is_not_started_in_a_drain(
    harness: Callable[..., Harness],
) -> None:
    fleet = harness("a", "b")
    fleet.wait(lambda: fleet.num_all_ready == 1)
    os.kill(fleet.lives("a")[0], signal.SIGKILL)
    fleet.wait(lambda: any(line.startswith("a has ended") for line in fleet.said))

    assert fleet.end() == 0

    assert len(fleet.lives("a")) <= 2
    lives = fleet.lives("a")
    time.sleep(0.3)
    assert fleet.lives("a") == lives


def test_lines_of_json_stay_json(tmp_path: Path) -> None:
    log = io.StringIO()
    fleet = Fleet(
        [WorkerPlan("a"), WorkerPlan("b")],
        [sys.executable, "-c", "import sys; print('{\"event\":\"x\"}'); print('{not json'); sys.exit(3)"],
        lambda: (),
        environ=os.environ,
        say=lambda _line: None,
        log=log,
    )

    assert fleet.run() == 3

    assert sorted(set(log.getvalue().splitlines())) == [
        "a | {not json",
        "b | {not json",
        '{"from":"a","event":"x"}',
        '{"from":"b","event":"x"}',
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="the death of a parent is told on Linux only")
def test_a_supervisor_that_is_killed_takes_its_workers_along(tmp_path: Path) -> None:
    import subprocess

    script = "import os, sys, test_fleet, pathlib; h = test_fleet.Harness(pathlib.Path(sys.argv[1]), ('a', 'b')); h.fleet.run()"
    root = Path(__file__).parents[2]
    supervisor = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{root}:{Path(__file__).parent}"},
    )
    try:
        deadline = time.monotonic() + 60
        while len(ready := list(tmp_path.glob("*.ready"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        supervisor.kill()
        supervisor.wait()

    def is_running(pid: str) -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return stat.exists() and " Z " not in stat.read_text()

    deadline = time.monotonic() + 20
    while any(is_running(path.stem) for path in ready):
        assert time.monotonic() < deadline
        time.sleep(0.02)
