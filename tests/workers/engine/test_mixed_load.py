"""The short form of `make soak`, and that a soak finds what it looks for."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.soak import Broken, Memory, MixedLoad, checkpoint_load, main, soak


@pytest.fixture
def load(tiny_checkpoint, tmp_path: Path) -> MixedLoad:
    """By a clock of its steps, so that it is the same load on any machine."""
    load = checkpoint_load(tiny_checkpoint, tmp_path)
    load.clock = lambda: load.counts.steps
    return load


def test_a_mixed_load_loses_nobody_and_leaves_memory_where_it_was(load: MixedLoad) -> None:
    soak(load, 2000, report_seconds=1000)
    assert load.counts.ended + load.counts.aborted == load.counts.sequences > 100
    assert load.counts.adapter_changes > 0


def loses_sequences(load: MixedLoad) -> None:
    """Every third one, so that it matters little if the load itself aborts one of them."""
    add, numbers = load.engine.add, itertools.count()
    load.engine.add = lambda message: add(message) if next(numbers) % 3 else None


def loses_a_block(load: MixedLoad) -> None:
    load.engine.scheduler.block_manager._free.pop()


def says_it_again(load: MixedLoad) -> None:
    step = load.engine.step

    def twice():
        found = step()
        found.sequence_ids.extend(found.sequence_ids[-1:])
        found.token_ids.extend(found.token_ids[-1:])
        found.finish_reasons.extend(found.finish_reasons[-1:])
        return found

    load.engine.step = twice


def changes_its_mind(load: MixedLoad) -> None:
    with torch.no_grad():
        next(iter(load.engine._runner._model.parameters())).mul_(-1)


def hoards(load: MixedLoad) -> None:
    load.hoard = torch.ones(128 << 20, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (loses_sequences, "lost"),
        (loses_a_block, "belong to no sequence"),
        (says_it_again, "after its end|said more than|ended after"),
        (changes_its_mind, "in another way"),
        pytest.param(
            hoards,
            "resident memory grew",
            marks=pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc"),
        ),
    ],
)
def test_a_soak_finds_an_engine_that(
    load: MixedLoad, monkeypatch: pytest.MonkeyPatch, fault: Callable[[MixedLoad], None], words: str
) -> None:
    look, meddle = Memory.now, load.meddle
    faults: list[Callable[[MixedLoad], None]] = []

    def look_at_memory() -> Memory:
        faults.append(fault)
        return look()

    def meddle_and_break() -> None:
        """Once memory has been looked at."""
        meddle()
        if faults and load.engine.scheduler.running:
            monkeypatch.setattr(Memory, "now", look)
            faults.pop()(load)

    monkeypatch.setattr(Memory, "now", look_at_memory)
    load.meddle = meddle_and_break
    with pytest.raises(Broken, match=words):
        soak(load, 500)


@pytest.mark.parametrize(
    "arguments", [["--seconds", "0"], ["--seconds", "nan"], ["--kv", "int8"], ["--checkpoint", "nowhere"]]
)
def test_what_cannot_be_used_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["soak", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"error: {arguments[0]}" in capsys.readouterr().err
