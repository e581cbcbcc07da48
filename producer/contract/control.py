"""What a worker can be told on its control channel, one line each, and how it replies. Pure data, no I/O.

`cancel R` and `look` get no reply: the ledger has it as well. A command about adapters carries an id; each worker leaves its reply
under it (`Keys.replies`).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from producer.contract.errors import InvalidRequest
from producer.contract.requests import Name

_LOAD, _UNLOAD, _CANCEL, _LOOK = "load-adapter", "unload-adapter", "cancel", "look"

_name: TypeAdapter[str] = TypeAdapter(Name)


class _Told(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class CancelCommand(_Told):
    """Stop answering this request."""

    request_id: str


class LookCommand(_Told):
    """There is work in the queue of which no ticket tells."""


class LoadAdapterCommand(_Told):
    """Answer with the adapter in this folder, as the worker's machine sees it, when a request asks for this name."""

    command_id: str
    name: Name
    folder: Annotated[str, Field(min_length=1)]


class UnloadAdapterCommand(_Told):
    """Do not answer with this adapter any more. Requests that have it finish with it."""

    command_id: str
    name: Name


AdapterCommand = LoadAdapterCommand | UnloadAdapterCommand
Command = CancelCommand | LookCommand | AdapterCommand


class Reply(_Told):
    """What came of a command at one worker."""

    worker: str
    problem: str = ""
    """Why it was not obeyed, and what to do; empty: it was."""
    note: str = ""
    """What else there is to know."""


def check_adapter_name(name: str) -> str:
    """The name, if a request can have it as its `adapter`. Raises InvalidRequest."""
    try:
        return _name.validate_python(name)
    except ValidationError as error:
        problem = f"{name[:128]!r} cannot be a request's adapter"
        raise InvalidRequest(
            "adapter", problem, "Use letters, digits and ._:/@- and begin with a letter or digit."
        ) from error


def encode_command(command: Command) -> str:
    """The command as one line of text."""
    if isinstance(command, CancelCommand):
        return f"{_CANCEL} {command.request_id}"
    if isinstance(command, LookCommand):
        return _LOOK
    verb = _LOAD if isinstance(command, LoadAdapterCommand) else _UNLOAD
    return f"{verb} {command.model_dump_json()}"


def decode_command(line: str) -> Command:
    """The command in this line. Raises ValueError when it is none that this code knows."""
    verb, _, argument = line.partition(" ")
    if verb == _CANCEL and argument:
        return CancelCommand(request_id=argument)
    if line == _LOOK:
        return LookCommand()
    if verb == _LOAD:
        return LoadAdapterCommand.model_validate_json(argument)
    if verb == _UNLOAD:
        return UnloadAdapterCommand.model_validate_json(argument)
    raise ValueError(f"{verb!r} is no command")
