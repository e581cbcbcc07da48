"""What the worker and the engine process say to each other. Grouped by who receives it.

Plain data (msgspec): this module imports no torch, so the worker can use it.
"""

from __future__ import annotations

import msgspec


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """Sampling parameters as the engine needs them: all resolved, no None."""

    max_new_tokens: int
    seed: int
    min_new_tokens: int = 0
    temperature: float = 0.95
    """0 is greedy."""
    top_p: float = 0.7
    top_k: int = 50
    """0 switches it off."""
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}


# --- to the engine ---------------------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, tag=True):
    """Answer this prompt. Tokens already emitted by an earlier attempt are prefilled after it and not repeated."""

    sequence_id: int
    """Chosen by the worker, unique for the life of the engine process."""
    prompt_ids: list[int]
    """The whole prompt, with its [gMASK] and <sop>."""
    sampling: Sampling
    emitted_ids: list[int] = []
    adapter: str | None = None


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget this sequence and free its cache. No output follows; an unknown id is ignored."""

    sequence_id: int


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """This name stands for the adapter in this folder. What answered to the name before finishes its sequences."""

    name: str
    folder: str
    command_id: str = ""
    """Comes back in the `AdaptersChanged` that answers."""
    now: bool = True
    """Read it at once, so that a fault is known, and load it if a slot can be had; else when it is first asked for."""


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Nobody can ask for this adapter any more. Sequences that have it keep it to their end."""

    name: str
    command_id: str = ""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop at once."""


ToEngine = Generate | Abort | LoadAdapter | UnloadAdapter | Shutdown

# --- to the worker ---------------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    context_len: int
    """Tokens of prompt and answer together, at most."""
    num_blocks: int
    block_size: int
    device: str
    dtype: str
    load_seconds: float
    adapters: list[str] = []
    """Names that a sequence can ask for."""
    loaded_adapters: list[str] = []


class Prefilling(msgspec.Struct, frozen=True, tag=True):
    """A prefill of these sequences begins. If the engine dies before they have a token, they are under suspicion."""

    sequence_ids: list[int]


class Step(msgspec.Struct, frozen=True, tag=True):
    """The tokens of one engine step, three parallel lists, and the engine's state after it."""

    sequence_ids: list[int]
    token_ids: list[int]
    finish_reasons: list[str]
    """"" while it goes on, "stop" (the token is the end token, or minimum reached and it ended), "length"."""
    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    """Since the engine started."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """This sequence cannot be run here at all."""

    sequence_id: int
    code: str
    """`context_exceeded`, `unknown_adapter`, `invalid_adapter`, `invalid_request`."""
    message: str


class AdaptersChanged(msgspec.Struct, frozen=True, tag=True):
    """The answer to LoadAdapter and UnloadAdapter; and without a command, when one was loaded because it was asked for."""

    known: list[str]
    """Names that a sequence can ask for."""
    loaded: list[str]
    """Those in memory, least recently used first."""
    command_id: str = ""
    problem: str = ""
    """Why the command was not obeyed, and what to do."""
    num_sequences: int = 0
    """Those that still have what was unloaded."""


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine process is about to exit: the model could not be loaded, or a step failed."""

    message: str


FromEngine = Ready | Prefilling | Step | Refused | AdaptersChanged | Fatal

to_engine_encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
