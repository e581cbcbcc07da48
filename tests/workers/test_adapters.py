"""The names that a worker answers to, and what it tells the engine and the operator about them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from producer.contract.control import LoadAdapterCommand, Reply, UnloadAdapterCommand
from workers.adapters import ServedAdapters
from workers.engine.messages import AdaptersChanged, LoadAdapter, Ready, UnloadAdapter


def ready(*known: str, loaded: tuple[str, ...] = ()) -> Ready:
    return Ready(100, 10, 8, "cpu", "float32", 0.1, list(known), list(loaded))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


@pytest.fixture
def put(directory: Path) -> Callable[[str], Path]:
    """Puts an adapter's folder into the directory."""

    def put(name: str) -> Path:
        folder = directory / name
        folder.mkdir()
        (folder / "adapter_config.json").touch()
        return folder

    return put


def test_names_are_the_engines_and_those_of_the_directory(
    directory: Path, put: Callable[[str], Path]
) -> None:
    put("law")
    (directory / "notes").mkdir()
    (directory / "readme.txt").touch()
    put("-not a name")
    adapters = ServedAdapters("w", {"fitness": Path("/a/fitness")}, directory)

    assert adapters.at_start(is_first=True) == ({"fitness": "/a/fitness"}, {"law": str(directory / "law")})
    adapters.on_ready(ready("fitness", "law", loaded=("fitness",)))

    assert list(adapters) == ["fitness", "law"]
    assert len(adapters) == 2
    assert adapters.about() == {"adapters": "fitness,law", "adapters_loaded": "fitness"}
    assert "notes" not in adapters
    assert 7 not in adapters


def test_a_folder_that_appears_later_is_introduced_once(directory: Path, put: Callable[[str], Path]) -> None:
    adapters = ServedAdapters("w", directory=directory)
    adapters.on_ready(ready())
    assert "late" not in adapters
    assert adapters.introduce("late") is None

    folder = put("late")

    assert "late" in adapters
    assert adapters.introduce("late") == LoadAdapter("late", str(folder), now=False)
    assert adapters.introduce("late") is None
    assert adapters.introduce(None) is None


@pytest.mark.parametrize("name", ["a/../../outside", "../outside", "..", ".", "", "a\0b", "outside/."])
def test_a_name_cannot_lead_out_of_the_directory(
    directory: Path, put: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    put("a")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/adapter_config.json").touch()
    adapters = ServedAdapters("w", directory=directory)
    adapters.on_ready(ready("a"))
    assert name not in adapters
    assert adapters.introduce(name) is None


def test_a_directory_that_is_gone_takes_its_names_with_it_and_nothing_else(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = ServedAdapters("w", directory=directory)
    adapters.on_ready(ready("fitness"))
    directory.rmdir()
    for _ in range(3):
        assert list(adapters) == ["fitness"]
    assert caplog.text.count("cannot be read") == 1


def test_a_load_is_confirmed_when_the_engine_has_answered() -> None:
    adapters = ServedAdapters("w")
    adapters.on_ready(ready())
    command = LoadAdapterCommand(command_id="c1", name="law", folder="/a/law")

    assert adapters.obey(command) == LoadAdapter("law", "/a/law", "c1")
    assert "law" not in adapters

    assert adapters.on_changed(AdaptersChanged(["law"], ["law"], "c1")) == Reply(worker="w")
    assert "law" in adapters
    assert adapters.on_changed(AdaptersChanged(["law"], ["law"], "c1")) is None


def test_a_command_that_is_repeated_is_obeyed_once() -> None:
    adapters = ServedAdapters("w")
    command = UnloadAdapterCommand(command_id="c1", name="law")
    assert adapters.obey(command) is not None
    assert adapters.obey(command) is None
    adapters.on_changed(AdaptersChanged([], [], "c1"))
    assert adapters.obey(command) is None


def test_a_load_that_found_no_slot_says_so() -> None:
    adapters = ServedAdapters("w")
    adapters.obey(LoadAdapterCommand(command_id="c1", name="law", folder="/a/law"))
    reply = adapters.on_changed(AdaptersChanged(["law"], [], "c1"))
    assert reply is not None
    assert "first use" in reply.note


def test_a_load_that_failed_changes_nothing() -> None:
    adapters = ServedAdapters("w")
    adapters.on_ready(ready("fitness"))
    adapters.obey(LoadAdapterCommand(command_id="c1", name="law", folder="/a/law"))
    reply = adapters.on_changed(AdaptersChanged(["fitness"], [], "c1", problem="it is broken"))
    assert reply == Reply(worker="w", problem="it is broken")
    assert list(adapters) == ["fitness"]
    assert adapters.at_start(is_first=False) == ({}, {})


def test_unloading_says_who_still_has_it_and_that_it_can_come_back(
    directory: Path, put: Callable[[str], Path]
) -> None:
    put("law")
    adapters = ServedAdapters("w", directory=directory)
    adapters.on_ready(ready("law", loaded=("law",)))
    command = UnloadAdapterCommand(command_id="c2", name="law")
    assert adapters.obey(command) == UnloadAdapter("law", "c2")
    reply = adapters.on_changed(AdaptersChanged([], [], "c2", num_sequences=3))
    assert reply is not None
    assert reply.note.startswith("3 running answers finish with it; its folder is still in")
    assert adapters.introduce("law") is not None


def test_a_new_engine_knows_everything_and_loads_nothing_by_itself(
    directory: Path, put: Callable[[str], Path]
) -> None:
    put("law")
    adapters = ServedAdapters("w", {"fitness": Path("/a/fitness"), "old": Path("/a/old")}, directory)
    for number, command in enumerate(
        [
            LoadAdapterCommand(command_id="0", name="new", folder="/a/new"),
            LoadAdapterCommand(command_id="1", name="fitness", folder="/b/fitness"),
            UnloadAdapterCommand(command_id="2", name="old"),
        ]
    ):
        adapters.obey(command)
        adapters.on_changed(AdaptersChanged([], [], str(number)))

    assert adapters.at_start(is_first=False) == (
        {},
        {"law": str(directory / "law"), "fitness": "/b/fitness", "new": "/a/new"},
    )


def test_commands_of_an_engine_that_died_are_answered() -> None:
    adapters = ServedAdapters("w")
    for id_ in ("c1", "c2", "c3"):
        adapters.obey(UnloadAdapterCommand(command_id=id_, name="law"))
    assert [id_ for id_, _ in adapters.give_up("c2")] == ["c2"]
    given_up = adapters.give_up()
    assert [id_ for id_, _ in given_up] == ["c1", "c3"]
    assert all("starts again" in reply.problem for _, reply in given_up)
    assert adapters.give_up() == []


def test_threads_may_ask_while_names_change(put: Callable[[str], Path], directory: Path) -> None:
    adapters = ServedAdapters("w", directory=directory)
    put("law")
    stop = threading.Event()
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not stop.is_set():
                assert "law" in adapters
                list(adapters)
                adapters.introduce("law")
        except Exception as error:  # noqa: BLE001  (an assertion counts too)
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(300):
        adapters.on_changed(AdaptersChanged([f"n{number}"], []))
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
