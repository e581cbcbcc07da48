"""Whole sequences as one prefill without a cache: what measures a model, rather than serves with it, runs on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from workers.models.batch import Batch
from workers.models.layout import AnyLayout


def pack_sequences(
    sequences: Sequence[Sequence[int]], layouts: Sequence[AnyLayout], device: torch.device | str = "cpu"
) -> Batch:
    """A prefill of these sequences one after another, with the layout of each. For `model(batch, all_positions=True)`."""
    lens = [len(sequence) for sequence in sequences]
    positions = [layout.positions(0, num) for layout, num in zip(layouts, lens, strict=True)]
    starts = torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Batch(
        is_prefill=True,
        token_ids=torch.tensor(list(chain.from_iterable(sequences)), device=device),
        positions=torch.tensor(
            [list(chain.from_iterable(both[row] for both in positions)) for row in (0, 1)], device=device
        ),
        slots=torch.zeros(sum(lens), dtype=torch.int64, device=device),
        kv_lens=torch.tensor(lens, dtype=torch.int32, device=device),
        block_tables=torch.zeros((len(lens), 1), dtype=torch.int32, device=device),
        query_starts=starts.to(device),
        prefix_lens=torch.tensor([layout.prefix_len for layout in layouts], dtype=torch.int32, device=device),
        max_query_len=max(lens),
        max_kv_len=max(lens),
    )
