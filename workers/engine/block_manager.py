"""Who owns which block of the KV cache. Knows block numbers only, no memory."""

from __future__ import annotations

from workers.engine.sequence import Sequence


class BlockManager:
    """Hands out blocks 1 to num_blocks - 1; block 0 is never given to a sequence (see `KVCache`)."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError(
                f"num_blocks is {num_blocks}: at least 2 are needed, because block 0 is never used"
            )
        self.block_size = block_size
        self.num_blocks = num_blocks
        # Taken from the end, so that the blocks of the last sequence to end are reused first.
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def num_usable_blocks(self) -> int:
        return self.num_blocks - 1

    def num_missing_blocks(self, sequence: Sequence) -> int:
        """Blocks that this sequence lacks to hold all its present tokens."""
        return -(-len(sequence) // self.block_size) - len(sequence.blocks)

    def allocate(self, sequence: Sequence) -> bool:
        """Gives this sequence the blocks that it lacks; False, and nothing given, when there are not enough."""
        num_missing = self.num_missing_blocks(sequence)
        if num_missing > len(self._free):
            return False
        for _ in range(num_missing):
            sequence.blocks.append(self._free.pop())
        return True

    def allocate_ahead(self, sequence: Sequence, num_tokens: int, num_reserved: int) -> bool:
        """Room for so many more tokens than it has, if that leaves `num_reserved` blocks free; False, and nothing given."""
        num_missing = -(-(len(sequence) + num_tokens) // self.block_size) - len(sequence.blocks)
        if num_missing > 0 and num_missing + num_reserved > len(self._free):
            return False
        for _ in range(num_missing):
            sequence.blocks.append(self._free.pop())
        return True

    def free(self, sequence: Sequence) -> None:
        """Takes all blocks of this sequence back."""
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks.clear()
