"""One answer in the making: its tokens, what it may use, and where it stands. Knows nothing about tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workers.engine.messages import Sampling
from workers.models.layout import AnyLayout

if TYPE_CHECKING:
    from workers.engine.speculation import PromptLookup


@dataclass(slots=True, eq=False)
class Sequence:
    """A prompt and its answer so far. Waiting while it has no row; running from its prefill on."""

    sequence_id: int
    arrival: int
    """Counts the sequences of an engine: the smaller, the older."""
    token_ids: list[int]
    """Prompt and answer, those tokens included that an earlier attempt emitted."""
    prompt_len: int
    layout: AnyLayout
    sampling: Sampling
    max_len: int
    """Tokens of prompt and answer, at most: from max_new_tokens and the context's length."""
    blocks: list[int] = field(default_factory=list)
    """Its blocks of the KV cache, in order."""
    row: int = -1
    """Its place in the tables that the runner keeps; -1 while it waits."""
    adapter_slot: int = 0
    """Where its adapter is loaded; 0: it has none."""

    lookup: PromptLookup | None = None
    """What it may copy; None: nobody has looked."""

    num_pending: int = 0
    """Tokens that a step on its way will add: the host knows that they come, but not what they are."""

    def __len__(self) -> int:
        """Tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending

    @property
    def num_generated(self) -> int:
        """Answer tokens so far, pending ones included."""
        return len(self) - self.prompt_len

    @property
    def can_grow(self) -> bool:
        """Whether another step may add a token, as far as is known."""
        return len(self) < self.max_len

    def finish_reason(self, eos_id: int) -> str:
        """ "stop" when its last token ends it, "length" when it may not grow any more, "" while it goes on."""
        if self.token_ids[-1] == eos_id:
            return "stop"
        return "length" if len(self.token_ids) >= self.max_len else ""
