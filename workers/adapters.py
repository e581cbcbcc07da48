"""The adapters that a worker answers with: names, the folders that they stand for, and what the engine has of them.

Names come from the worker's options, from a folder of adapters, and from commands that arrive while it serves. Imports no
torch: files are read by the engine.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

from producer.contract import InvalidRequest
from producer.contract.control import AdapterCommand, LoadAdapterCommand, Reply, check_adapter_name
from workers.engine.messages import AdaptersChanged, LoadAdapter, Ready, UnloadAdapter

logger = logging.getLogger(__name__)

CONFIG_FILE: Final = "adapter_config.json"
"""What makes a folder an adapter's."""


class ServedAdapters(Collection[str]):
    """The names that a request can ask for. Safe to share between threads.

    A folder in `directory` is an adapter of that name; one that appears there later is found when a request asks for it.
    """

    def __init__(
        self, worker: str, named: Mapping[str, Path] | None = None, directory: Path | None = None
    ) -> None:
        """worker: who replies to commands. named: adapters that are loaded at the start."""
        self._worker = worker
        self._named = dict(named or {})
        self._directory = directory
        self._is_readable = True
        self._lock = threading.Lock()
        self._loaded_by_command: dict[str, Path] = {}
        self._told: set[str] = set()
        """Names that the engine knows."""
        self._in_memory: list[str] = []
        self._pending: dict[str, AdapterCommand] = {}
        self._heard: deque[str] = deque(maxlen=256)
        """Ids of commands: whoever waits for a reply repeats them."""

    # --- for requests -------------------------------------------------------------------------------------------------

    def __contains__(self, name: object) -> bool:
        if not isinstance(name, str):
            return False
        with self._lock:
            return name in self._told or self._in_directory(name) is not None

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            names = set(self._told)
        return iter(sorted(names | self._directory_names()))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def introduce(self, name: str | None) -> LoadAdapter | None:
        """What the engine has to be told before a sequence with this adapter; None: nothing."""
        with self._lock:
            if name is None or name in self._told:
                return None
            folder = self._in_directory(name)
            if folder is None:
                return None
            self._told.add(name)
        return LoadAdapter(name, str(folder), now=False)

    # --- for the engine -----------------------------------------------------------------------------------------------

    def at_start(self, *, is_first: bool) -> tuple[dict[str, str], dict[str, str]]:
        """(adapters to load, adapters to know) of an engine that starts, as names and folders.

        An engine that starts again loads them as requests ask for them: a fault in one must not keep it from starting.
        """
        with self._lock:
            known = {name: self._directory_folder(name) for name in self._directory_names()}
            named = {**self._named, **self._loaded_by_command}
        if not is_first:
            known, named = {**known, **named}, {}
        return _texts(named), _texts({name: folder for name, folder in known.items() if name not in named})

    def on_ready(self, ready: Ready) -> None:
        with self._lock:
            self._told, self._in_memory = set(ready.adapters), ready.loaded_adapters

    def on_changed(self, changed: AdaptersChanged) -> Reply | None:
        """Takes note of what the engine says; the reply when it says it because of a command."""
        with self._lock:
            self._told, self._in_memory = set(changed.known), changed.loaded
            command = self._pending.pop(changed.command_id, None)
            if command is None:
                return None
            if changed.problem:
                logger.warning("adapter %s: %s", command.name, changed.problem)
                return Reply(worker=self._worker, problem=changed.problem)
            if isinstance(command, LoadAdapterCommand):
                self._loaded_by_command[command.name] = Path(command.folder)
                done, note = f"loaded from {command.folder}", ""
                if command.name not in changed.loaded:
                    note = "all slots are in use: it is checked, and comes into memory on its first use"
            else:
                self._loaded_by_command.pop(command.name, None)
                self._named.pop(command.name, None)
                done, note = "unloaded", self._note_of_unload(command.name, changed.num_sequences)
            logger.info("adapter %s: %s%s", command.name, done, f" ({note})" if note else "")
            return Reply(worker=self._worker, note=note)

    # --- for commands -------------------------------------------------------------------------------------------------

    def obey(self, command: AdapterCommand) -> LoadAdapter | UnloadAdapter | None:
        """What the engine is to be told; None: nothing, the command was heard before. `on_changed` gives the reply once the
        engine has answered."""
        with self._lock:
            if command.command_id in self._heard:
                return None
            self._heard.append(command.command_id)
            self._pending[command.command_id] = command
        if isinstance(command, LoadAdapterCommand):
            return LoadAdapter(command.name, command.folder, command.command_id)
        return UnloadAdapter(command.name, command.command_id)

    def give_up(self, command_id: str | None = None) -> list[tuple[str, Reply]]:
        """The engine has died: (command id, reply) of this command, or of all that it had not answered."""
        with self._lock:
            ids = [id_ for id_ in self._pending if command_id in (None, id_)]
            for id_ in ids:
                del self._pending[id_]
        problem = "the engine is not running: it starts again in a moment, then repeat the command"
        return [(id_, Reply(worker=self._worker, problem=problem)) for id_ in ids]

    def about(self) -> dict[str, str]:
        """What the worker says of them: names, separated by commas."""
        names = list(self)
        with self._lock:
            return {"adapters": ",".join(names), "adapters_loaded": ",".join(self._in_memory)}

    # --- the directory ------------------------------------------------------------------------------------------------

    def _directory_names(self) -> set[str]:
        if self._directory is None:
            return set()
        try:
            names = {path.name for path in self._directory.iterdir()}
        except OSError as error:
            if self._is_readable:
                logger.warning("%s: the folder of adapters cannot be read: %s", self._directory, error)
            self._is_readable = False
            return set()
        self._is_readable = True
        return {name for name in names if self._in_directory(name) is not None}

    def _directory_folder(self, name: str) -> Path:
        assert self._directory is not None
        return self._directory / name

    def _in_directory(self, name: str) -> Path | None:
        """The folder of this adapter in the directory, if there is one. A name with a path in it has none."""
        if self._directory is None or Path(name).name != name:
            return None
        try:
            check_adapter_name(name)
        except InvalidRequest:
            return None
        folder = self._directory / name
        return folder if (folder / CONFIG_FILE).is_file() else None

    def _note_of_unload(self, name: str, num_sequences: int) -> str:
        notes = []
        if num_sequences:
            notes.append(f"{num_sequences} running answers finish with it")
        if self._in_directory(name) is not None:
            notes.append(
                f"its folder is still in {self._directory}, so a request that names it loads it again"
            )
        return "; ".join(notes)


def _texts(folders: Mapping[str, Path]) -> dict[str, str]:
    return {name: str(folder) for name, folder in folders.items()}
