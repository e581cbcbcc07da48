"""Which adapters an engine knows, which of them are loaded, and which sequences wait for one.

Files are read in a thread of its own while the engine goes on; everything else happens between steps. Knows nothing
about tensors: the bank has them.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from workers.engine.admission import CannotRun
from workers.engine.messages import AdaptersChanged, FromEngine, LoadAdapter, Refused, UnloadAdapter
from workers.engine.sequence import Sequence
from workers.models.adapter_bank import NO_ADAPTER, AdapterBank
from workers.models.lora import Adapter, AdapterError, read_adapter

logger = logging.getLogger(__name__)

ReadAdapter = Callable[[Path], Adapter]


@dataclass(slots=True, eq=False)
class KnownAdapter:
    """A name, and the folder that it stands for. A folder that is loaded anew is another one of the same name."""

    name: str
    folder: Path
    slot: int = NO_ADAPTER
    """Where it is loaded."""
    num_sequences: int = 0
    """Those that have its slot; it cannot be evicted while there are any."""
    waiting: list[Sequence] = field(default_factory=list)
    """Those for which it has to be loaded first."""
    last_use: int = 0
    is_leaving: bool = False
    """Its slot is promised to another one: sequences that have it end with it, new ones wait."""
    is_forgotten: bool = False
    """No new sequence can name it; those that have, or wait for it, still get it."""

    @property
    def is_idle(self) -> bool:
        return not self.num_sequences


@dataclass(slots=True, eq=False)
class _Load:
    """An adapter on its way into a slot."""

    adapter: KnownAdapter
    command_id: str | None = None
    """Of the command that asked for it; None: sequences did."""
    reading: Future[Adapter] | None = None
    needs_slot: bool = False
    """It has been read, and no slot is free."""

    @property
    def is_wanted(self) -> bool:
        return self.command_id is not None or bool(self.adapter.waiting)


class Adapters:
    """The adapters of one engine. A sequence keeps its adapter to its end, through preemptions, and whatever happens to
    the name meanwhile.

    When all slots are taken, the least recently used adapter without sequences is evicted. When every one has sequences,
    the least recently used takes no new ones, so that its slot comes free however many others are asked for.
    """

    def __init__(
        self,
        bank: AdapterBank | None,
        *,
        max_rank: int = 64,
        fixed: Iterable[str] = (),
        why_fixed: str = "this worker takes no adapters: start it with --max-adapters above 0",
    ) -> None:
        """bank: None when this engine has no slots. fixed: names that need none, and cannot be changed. why_fixed: what
        somebody is told who wants to load another one where there are no slots."""
        self.bank = bank
        self._fixed = frozenset(fixed)
        self._why_fixed = why_fixed
        self._max_rank = max_rank
        self._known: dict[str, KnownAdapter] = {}
        self._free_slots = [] if bank is None else list(range(bank.num_slots, 0, -1))
        self._loaded: list[KnownAdapter] = []
        self._holders: dict[Sequence, KnownAdapter] = {}
        """Of each sequence that has an adapter or waits for one."""
        self._loads: list[_Load] = []
        """Read one after another, the first one first."""
        self._reader: ThreadPoolExecutor | None = None
        self._uses = itertools.count(1)
        self._admitted: list[Sequence] = []
        self._news: list[FromEngine] = []

    @property
    def names(self) -> list[str]:
        """Those that a sequence can ask for."""
        return sorted(self._known.keys() | self._fixed)

    @property
    def loaded(self) -> list[str]:
        """Those in a slot, least recently used first."""
        return [adapter.name for adapter in self._by_age(self._loaded) if not adapter.is_forgotten]

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for their adapter."""
        return sum(not sequence.adapter_slot for sequence in self._holders)

    @property
    def is_loading(self) -> bool:
        """Whether `settle` has to be called again soon, even when nothing runs."""
        return bool(self._loads or self._news)

    # --- names --------------------------------------------------------------------------------------------------------

    def know(self, name: str, folder: Path) -> None:
        """From now on this name stands for this folder, which is read when a sequence first asks for it."""
        known = self._known.get(name)
        if known is None or known.folder != folder:
            self._replace(KnownAdapter(name, folder))

    def load_now(self, name: str, folder: Path) -> None:
        """Knows an adapter and loads it into a free slot. For the engine's start: it blocks. Raises AdapterError."""
        adapter = KnownAdapter(name, folder)
        if self.bank is None or not self._free_slots:
            raise AdapterError(
                folder, f"there is no slot left for the adapter {name}", "Raise --max-adapters"
            )
        self._put(adapter, self._read(folder))
        self._replace(adapter)

    def load(self, command: LoadAdapter) -> None:
        """Obeys: `settle` tells how it went. The name's present adapter answers until the new one has been read."""
        folder = Path(command.folder)
        if self.bank is None:
            self._tell(command.command_id, problem=self._why_fixed)
        elif not command.now:
            self.know(command.name, folder)
            self._tell(command.command_id)
        else:
            self._loads.append(_Load(KnownAdapter(command.name, folder), command.command_id))

    def unload(self, command: UnloadAdapter) -> None:
        """Obeys: new sequences cannot ask for it any more. Its slot comes free when the last one that has it ends."""
        for load in [load for load in self._loads if load.adapter.name == command.name]:
            if load.command_id is not None:
                self._loads.remove(load)
                self._tell(load.command_id, problem=f"{command.name} was unloaded before it was loaded")
        adapter = self._known.pop(command.name, None)
        if adapter is None:
            is_fixed = command.name in self._fixed
            reason = self._why_fixed if is_fixed else f"it is not known here ({self._known_text()})"
            self._tell(command.command_id, problem=f"{command.name}: {reason}")
            return
        num_sequences = adapter.num_sequences + len(adapter.waiting)
        self._forget(adapter)
        self._tell(command.command_id, num_sequences=num_sequences)

    # --- sequences ----------------------------------------------------------------------------------------------------

    def check(self, name: str | None) -> None:
        """Raises CannotRun `unknown_adapter` when no sequence can have this adapter."""
        if name is not None and name not in self._fixed and name not in self._known:
            raise CannotRun("unknown_adapter", f"adapter: {name!r} is not known here ({self._known_text()})")

    def take(self, sequence: Sequence, name: str | None) -> bool:
        """Gives the sequence its slot. False: it has to wait, and `settle` returns it once it may run."""
        if name is None or name in self._fixed:
            return True
        adapter = self._known[name]
        adapter.last_use = next(self._uses)
        self._holders[sequence] = adapter
        if adapter.slot and not adapter.is_leaving:
            self._admit(sequence, adapter)
            return True
        adapter.waiting.append(sequence)
        if all(load.adapter is not adapter for load in self._loads):
            self._loads.append(_Load(adapter))
        return False

    def release(self, sequence: Sequence) -> bool:
        """The sequence has ended or is aborted. False: it had never been let in."""
        adapter = self._holders.pop(sequence, None)
        if adapter is None:
            return True
        has_run = bool(sequence.adapter_slot)
        if has_run:
            adapter.num_sequences -= 1
            sequence.adapter_slot = NO_ADAPTER
        else:
            adapter.waiting.remove(sequence)
        self._evict_if_forgotten(adapter)
        return has_run

    def settle(self) -> tuple[list[Sequence], list[FromEngine]]:
        """What can be done between two steps: sequences that may run now, and what there is to tell the worker."""
        if self._loads:
            self._loads = [load for load in self._loads if not self._advance(load)]
            if any(load.needs_slot for load in self._loads):
                self._make_leave()
            else:
                self._stay()
        admitted, self._admitted = self._admitted, []
        news, self._news = self._news, []
        return admitted, news

    # --- loading ------------------------------------------------------------------------------------------------------

    def _advance(self, load: _Load) -> bool:
        """Does the next thing for this load. True: it is done with, one way or the other."""
        if not load.is_wanted:
            return True
        if load.adapter.slot:
            # It is to leave, and has new sequences waiting: either it stays after all, or it is loaded anew.
            return False
        if load.reading is None:
            if self._reader is None:
                self._reader = ThreadPoolExecutor(1, thread_name_prefix="adapters")
            load.reading = self._reader.submit(self._read, load.adapter.folder)
        if not load.reading.done():
            return False
        try:
            return self._place(load, load.reading.result())
        except AdapterError as error:
            self._fail(load, str(error))
        except Exception as error:  # one adapter is a boundary: the engine goes on with the others
            logger.exception("the adapter %s could not be loaded", load.adapter.name)
            self._fail(
                load, f"{load.adapter.folder}: it could not be loaded ({type(error).__name__}: {error})"
            )
        return True

    def _place(self, load: _Load, tensors: Adapter) -> bool:
        """Into a slot, when there is one. Raises AdapterError."""
        adapter = load.adapter
        if self._make_slot():
            self._put(adapter, tensors)
        elif adapter.waiting:
            load.needs_slot = True
            return False
        # Otherwise its files are in order, and it is loaded when it is asked for.
        if load.command_id is not None:
            self._replace(adapter)
        self._admit_waiting(adapter)
        self._tell(load.command_id or "")
        return True

    def _put(self, adapter: KnownAdapter, tensors: Adapter) -> None:
        assert self.bank is not None
        slot = self._free_slots.pop()
        try:
            self.bank.load(slot, tensors)
        except BaseException:
            self._free_slots.append(slot)
            raise
        adapter.slot = slot
        adapter.last_use = next(self._uses)
        self._loaded.append(adapter)

    def _fail(self, load: _Load, problem: str) -> None:
        if load.command_id is not None:
            self._tell(load.command_id, problem=problem)
        else:
            logger.warning("adapter %s: %s", load.adapter.name, problem)
        for sequence in load.adapter.waiting:
            del self._holders[sequence]
            self._news.append(Refused(sequence.sequence_id, "invalid_adapter", f"adapter: {problem}"))
        load.adapter.waiting = []

    def _admit(self, sequence: Sequence, adapter: KnownAdapter) -> None:
        adapter.num_sequences += 1
        sequence.adapter_slot = adapter.slot

    def _admit_waiting(self, adapter: KnownAdapter) -> None:
        for sequence in adapter.waiting:
            self._admit(sequence, adapter)
        self._admitted += adapter.waiting
        adapter.waiting = []

    def _read(self, folder: Path) -> Adapter:
        assert self.bank is not None
        return read_adapter(folder, self.bank.shapes, max_rank=self._max_rank)

    # --- slots --------------------------------------------------------------------------------------------------------

    def _make_slot(self) -> bool:
        """Whether a slot is free, once the least recently used adapter without sequences has left."""
        if not self._free_slots:
            idle = self._by_age(adapter for adapter in self._loaded if adapter.is_idle)
            if idle:
                self._evict(idle[0])
        return bool(self._free_slots)

    def _make_leave(self) -> None:
        if not any(adapter.is_leaving for adapter in self._loaded):
            self._by_age(self._loaded)[0].is_leaving = True

    def _stay(self) -> None:
        """No slot is wanted any more: the one that was to leave takes new sequences again."""
        for adapter in self._loaded:
            if adapter.is_leaving:
                adapter.is_leaving = False
                self._admit_waiting(adapter)

    def _evict(self, adapter: KnownAdapter) -> None:
        assert self.bank is not None
        self.bank.clear(adapter.slot)
        self._free_slots.append(adapter.slot)
        self._loaded.remove(adapter)
        adapter.slot, adapter.is_leaving = NO_ADAPTER, False

    def _replace(self, adapter: KnownAdapter) -> None:
        """This is now the adapter of its name."""
        before = self._known.get(adapter.name)
        self._known[adapter.name] = adapter
        if before is not None:
            self._forget(before)

    def _forget(self, adapter: KnownAdapter) -> None:
        adapter.is_forgotten = True
        self._evict_if_forgotten(adapter)

    def _evict_if_forgotten(self, adapter: KnownAdapter) -> None:
        if adapter.is_forgotten and adapter.slot and adapter.is_idle and not adapter.waiting:
            self._evict(adapter)

    @staticmethod
    def _by_age(adapters: Iterable[KnownAdapter]) -> list[KnownAdapter]:
        return sorted(adapters, key=lambda adapter: adapter.last_use)

    # --- words --------------------------------------------------------------------------------------------------------

    def _tell(self, command_id: str, *, problem: str = "", num_sequences: int = 0) -> None:
        self._news.append(
            AdaptersChanged(
                known=self.names,
                loaded=self.loaded,
                command_id=command_id,
                problem=problem,
                num_sequences=num_sequences,
            )
        )

    def _known_text(self) -> str:
        return f"known: {', '.join(self.names) or 'none'}"
