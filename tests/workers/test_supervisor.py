"""Engines that die young, and what becomes of the next one. The processes are real, what they run is not an engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.workers.conftest import wait_for
from workers import supervisor
from workers.engine.config import EngineConfig
from workers.engine.messages import FromEngine
from workers.pool import StartFailed
from workers.supervisor import Death, Supervisor, Toll

CONFIG = EngineConfig(checkpoint="nowhere", device="cpu")
NOBODY = Toll(0, 0)


@dataclass
class Watched:
    """A supervisor, and what it told."""

    toll: Toll = NOBODY
    load_seconds: float = 60.0
    new_config: Callable[[bool], EngineConfig] = lambda _is_first: CONFIG
    messages: list[FromEngine] = field(default_factory=list)
    deaths: list[Death] = field(default_factory=list)
    num_down: int = 0

    def __post_init__(self) -> None:
        self.supervisor = Supervisor(
            "tests.brief_engine",
            stall_seconds=60.0,
            load_seconds=self.load_seconds,
            new_config=self.new_config,
            num_generating=lambda: 0,
            num_prefill_tokens=len,
            on_message=self.messages.append,
            on_down=self._on_down,
            on_death=self._on_death,
        )

    def _on_down(self) -> None:
        self.num_down += 1

    def _on_death(self, death: Death) -> Toll:
        self.deaths.append(death)
        return self.toll


@pytest.fixture
def watch() -> Iterator[Callable[..., Watched]]:
    """Starts supervisors, and stops them."""
    started: list[Watched] = []

    def new(**fields: object) -> Watched:
        watched = Watched(**fields)  # type: ignore[arg-type]
        started.append(watched)
        watched.supervisor.start()
        return watched

    yield new
    for watched in started:
        watched.supervisor.stop()


def test_an_engine_that_dies_is_started_again_after_a_while(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_SECONDS", (0.0, 600.0))

    watched = watch()

    wait_for(lambda: len(watched.deaths) == 2, seconds=30)
    assert [death.cause for death in watched.deaths] == ["exit code 3"] * 2
    assert watched.num_down == 2
    time.sleep(0.5)
    assert watched.supervisor.num_restarts == 2
    assert len(watched.messages) == 2


def test_while_suspects_wait_for_their_trials_it_is_started_again_soon(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RESTART_SECONDS", (0.0, 600.0))
    monkeypatch.setattr(supervisor, "RESTART_FOR_SUSPECTS_SECONDS", 0.01)

    watched = watch(toll=Toll(2, 1))

    wait_for(lambda: len(watched.deaths) >= 4, seconds=30)


def test_an_engine_that_does_not_load_in_time_is_stuck_and_the_reason_names_the_setting(
    watch: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_NEVER_LOADS", "1")
    watched = watch(load_seconds=0.2)
    assert not watched.supervisor.is_stuck()
    wait_for(watched.supervisor.is_stuck)

    watched.supervisor.kill_stuck()

    with pytest.raises(StartFailed, match="GLMQ_LOAD_SECONDS"):
        watched.supervisor.wait_until_ready(lambda: None)
    assert watched.deaths == []
    assert not watched.supervisor.is_stuck()


def test_a_setting_that_only_the_engine_can_judge_ends_the_start(watch: Callable[..., Watched]) -> None:
    def refuse(_is_first: bool) -> EngineConfig:
        raise ValueError("device is cuda:9, but there are only 2")

    watched = watch(new_config=refuse)

    with pytest.raises(StartFailed, match="cuda:9"):
        watched.supervisor.wait_until_ready(lambda: None)


def test_a_machine_without_room_for_a_process_ends_the_start_with_its_reason(
    watch: Callable[..., Watched],
) -> None:
    def fail(_is_first: bool) -> EngineConfig:
        raise OSError("Cannot allocate memory")

    watched = watch(new_config=fail)

    with pytest.raises(StartFailed, match="allocate memory"):
        watched.supervisor.wait_until_ready(lambda: None)
