"""The adapters of a reference engine: PeftModel around the checkpoint's own model, one adapter active at a time.

Each is checked by the native reader first: PEFT takes one that does not fit without a word, and it then does nothing.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from workers.engine.admission import CannotRun
from workers.engine.messages import AdaptersChanged, LoadAdapter, UnloadAdapter
from workers.models.lora import AdapterError, linear_shapes, read_adapter


class ReferenceAdapters:
    """Names, the folders that they stand for, and which of them PEFT holds. Files are read between two answers."""

    def __init__(self, model: Any, *, max_adapters: int = 8) -> None:
        self._model = model
        self._shapes = linear_shapes(model)
        self._max_adapters = max_adapters
        self._peft_model: Any = None
        self._known: dict[str, Path] = {}
        self._loaded: dict[str, str] = {}
        """Name → PEFT's name for it, least recently used first. PEFT's are never used twice."""
        self._peft_names = itertools.count(1)
        self._merged: str | None = None
        self._commands: list[LoadAdapter | UnloadAdapter] = []

    @property
    def names(self) -> list[str]:
        """Those that a sequence can ask for."""
        return sorted([*self._known, *([self._merged] if self._merged else [])])

    @property
    def loaded(self) -> list[str]:
        """Those that PEFT holds, least recently used first."""
        return list(self._loaded)

    @property
    def is_loading(self) -> bool:
        """Whether `settle` has something to do."""
        return bool(self._commands)

    def know(self, name: str, folder: Path) -> None:
        """From now on this name stands for this folder, which is read when a sequence first asks for it."""
        self._drop(name)
        self._known[name] = folder

    def merge(self, name: str, folder: Path) -> None:
        """Adds the adapter to the weights, as PEFT's merge_and_unload does. Raises AdapterError."""
        self.know(name, folder)
        self.use(name)
        self._peft_model.merge_and_unload()
        self._peft_model = None
        self._known.clear()
        self._loaded.clear()
        self._merged = name

    def check(self, name: str | None) -> None:
        """Raises CannotRun `unknown_adapter` when no sequence can have this adapter."""
        if name is not None and name != self._merged and name not in self._known:
            raise CannotRun("unknown_adapter", f"adapter: {name!r} is not known here ({self._known_text()})")

    def use(self, name: str | None) -> None:
        """The model answers with this adapter from now on; None: as it was loaded. Raises AdapterError, KeyError."""
        if name is None or name == self._merged:
            if self._peft_model is not None:
                self._peft_model.base_model.disable_adapter_layers()
            return
        peft_name = self._loaded.pop(name, None) or self._load(self._known[name])
        self._loaded[name] = peft_name
        self._peft_model.base_model.enable_adapter_layers()
        self._peft_model.set_adapter(peft_name)
        while len(self._loaded) > max(self._max_adapters, 1):
            self._drop(next(iter(self._loaded)))

    def load(self, command: LoadAdapter) -> None:
        """Obeys before the next answer: `settle` tells how it went."""
        self._commands.append(command)

    def unload(self, command: UnloadAdapter) -> None:
        """Obeys before the next answer: `settle` tells how it went."""
        self._commands.append(command)

    def settle(self) -> list[AdaptersChanged]:
        """Obeys the commands that have come. Call it only while no answer is in the making."""
        commands, self._commands = self._commands, []
        return [self._obey(command) for command in commands]

    def _obey(self, command: LoadAdapter | UnloadAdapter) -> AdaptersChanged:
        problem = ""
        if isinstance(command, UnloadAdapter):
            if command.name in self._known:
                self._drop(command.name)
                del self._known[command.name]
            else:
                problem = f"{command.name} is not known here ({self._known_text()})"
        else:
            try:
                self._replace(command)
            except AdapterError as error:
                problem = str(error)
        return AdaptersChanged(
            known=self.names, loaded=self.loaded, command_id=command.command_id, problem=problem
        )

    def _replace(self, command: LoadAdapter) -> None:
        """The name's present adapter stays when the new one is at fault."""
        folder = Path(command.folder)
        if command.now:
            read_adapter(folder, self._shapes)
        self.know(command.name, folder)
        if command.now:
            self.use(command.name)

    def _load(self, folder: Path) -> str:
        """Gives the adapter to PEFT. Returns PEFT's name for it."""
        read_adapter(folder, self._shapes)
        from peft.peft_model import PeftModel  # noqa: PLC0415  (an extra)

        peft_name = f"adapter{next(self._peft_names)}"
        device = str(next(self._model.parameters()).device)
        try:
            if self._peft_model is None:
                self._peft_model = PeftModel.from_pretrained(
                    self._model, str(folder), adapter_name=peft_name, torch_device=device
                )
            else:
                self._peft_model.load_adapter(str(folder), adapter_name=peft_name, torch_device=device)
        except Exception as error:
            raise AdapterError(
                folder,
                f"PEFT could not load it ({type(error).__name__}: {str(error)[:300]})",
                "It may come from another version of PEFT: the native backend reads those too",
            ) from error
        return peft_name

    def _drop(self, name: str) -> None:
        peft_name = self._loaded.pop(name, None)
        if peft_name is not None:
            self._peft_model.delete_adapter(peft_name)

    def _known_text(self) -> str:
        return f"known: {', '.join(self.names)}" if self.names else "none is known"
