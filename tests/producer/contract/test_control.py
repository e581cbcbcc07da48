"""Lines on a worker's control channel: what is said is what is heard."""

from __future__ import annotations

import pytest

from producer.contract import InvalidRequest
from producer.contract.control import (
    CancelCommand,
    Command,
    LoadAdapterCommand,
    LookCommand,
    Reply,
    UnloadAdapterCommand,
    check_adapter_name,
    decode_command,
    encode_command,
)


@pytest.mark.parametrize(
    "command",
    [
        CancelCommand(request_id="4f2a"),
        LookCommand(),
        LoadAdapterCommand(command_id="c1", name="fitness", folder="/adapters/my fitness\nv2/健身"),
        UnloadAdapterCommand(command_id="c2", name="org/fitness@v1.2"),
    ],
)
def test_a_command_is_one_line_and_comes_back_whole(command: Command) -> None:
    line = encode_command(command)
    assert "\n" not in line
    assert decode_command(line) == command


def test_a_cancellation_reads_as_the_ledger_writes_it() -> None:
    assert decode_command("cancel abc") == CancelCommand(request_id="abc")


def test_a_call_to_look_reads_as_the_ledger_writes_it() -> None:
    assert decode_command("look") == LookCommand()


@pytest.mark.parametrize(
    "line",
    [
        "",
        "cancel",
        "dance now",
        "load-adapter",
        "load-adapter {}",
        'load-adapter {"command_id": "c", "name": "../x", "folder": "/a"}',
        'load-adapter {"command_id": "c", "name": "x", "folder": ""}',
        "unload-adapter nonsense",
    ],
)
def test_what_is_no_command_is_a_value_error(line: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        decode_command(line)


def test_a_command_of_a_later_version_is_still_understood() -> None:
    line = 'unload-adapter {"command_id": "c", "name": "x", "later": 1}'
    assert decode_command(line) == UnloadAdapterCommand(command_id="c", name="x")


@pytest.mark.parametrize("name", ["", "../x", "a b", "健身", "x" * 129])
def test_a_name_that_no_request_could_give_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"adapter: .*Use letters"):
        check_adapter_name(name)


def test_a_reply_survives_the_wire() -> None:
    reply = Reply(worker="w", problem="", note="3 running answers finish with it")
    assert Reply.model_validate_json(reply.model_dump_json()) == reply
