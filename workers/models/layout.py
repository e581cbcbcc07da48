"""Where the parts of a sequence lie: the prompt that sees itself in both directions, and the positions of every token.

Knows nothing about tensors on a device; a list of ids is all it needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Layout:
    """ChatGLM-6B's layout (CHATGLM.md A6): the context, then bos and the answer."""

    context_len: int
    """Tokens before the first bos; they see each other in both directions."""
    mask_position: int
    """First position of bos and of every token after it."""

    @classmethod
    def of_prompt(cls, ids: Sequence[int], *, bos_id: int, gmask_id: int, mask_id: int) -> Layout:
        """The layout of a prompt.

        Raises ValueError when it has no bos, or neither of the mask tokens: the model cannot run it.
        """
        try:
            context_len = ids.index(bos_id)
        except ValueError:
            raise ValueError(f"the prompt has no <sop> (id {bos_id})") from None
        for id_ in (gmask_id, mask_id):
            if id_ in ids:
                return cls(context_len, ids.index(id_))
        raise ValueError(f"the prompt has neither [gMASK] (id {gmask_id}) nor [MASK] (id {mask_id})")

    @property
    def prefix_len(self) -> int:
        """So many first tokens see each other in both directions."""
        return self.context_len

    def positions(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        """First and block positions of the tokens from `begin` up to `end`."""
        boundary = min(max(self.context_len, begin), end)
        num_after = end - boundary
        first_block = boundary - self.context_len + 1
        return (
            [*range(begin, boundary), *[self.mask_position] * num_after],
            [*[0] * (boundary - begin), *range(first_block, first_block + num_after)],
        )

    def position(self, index: int) -> tuple[int, int]:
        """First and block position of one token."""
        if index < self.context_len:
            return index, 0
        return self.mask_position, index - self.context_len + 1


@dataclass(frozen=True, slots=True)
class CausalLayout:
    """ChatGLM2-6B's layout: every token sees those before it, and positions count from 0. There are no block positions."""

    @property
    def prefix_len(self) -> int:
        return 0

    def positions(self, begin: int, end: int) -> tuple[list[int], list[int]]:
        return [*range(begin, end)], [0] * (end - begin)

    def position(self, index: int) -> tuple[int, int]:
        return index, 0


AnyLayout = Layout | CausalLayout
