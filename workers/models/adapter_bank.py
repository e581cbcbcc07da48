"""The loaded adapters of one network, stacked by slot, and the linear layers that add them to what the base gives.

Each token of a batch names its slot, so that one forward pass serves many adapters over a base of any form (plain or
quantized). Knows nothing about names, files or requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Protocol, cast

import numpy as np
import torch
from torch import nn

from workers.models.batch import Batch
from workers.models.lora import Adapter, AdapterError, Factors, linear_shapes

NO_ADAPTER: Final = 0
"""The slot of tokens that the base alone answers."""

_RANK_STEP: Final = 8
"""Stacks grow by so many ranks: tensor cores want multiples of it."""


class AdapterBank:
    """Room for `num_slots` adapters beside slot 0, which stays empty.

    The network stays as it is until an adapter is loaded. Then each layer that it has factors for gets a stack of them
    beside it, which grows when an adapter of a larger rank comes. `generation` changes with every new stack: whatever
    was captured with the old tensors must be captured anew.
    """

    def __init__(
        self, model: nn.Module, num_slots: int, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        """dtype, device: of the network's computation, and so of the stacks."""
        self.num_slots = num_slots
        self.dtype, self.device = dtype, torch.device(device)
        self.shapes = linear_shapes(model)
        self.generation = 0
        self.rows: TokenRows | None = None
        """Whose tokens are in the present forward pass; None: no adapter at all, and no cost."""
        self._model = model
        self._layers: dict[str, LoraLinear] = {}
        """Those with a stack."""

    @property
    def num_bytes(self) -> int:
        """Memory of all stacks."""
        return sum(layer.num_bytes for layer in self._layers.values())

    def stack(self, path: str) -> LoraLinear | None:
        """The layer of this name when adapters have factors for it: for a network that is not made of modules."""
        return self._layers.get(path)

    @torch.no_grad()
    def load(self, slot: int, adapter: Adapter) -> None:
        """Puts this adapter into a slot, whatever was there. Copies only, when it is in the network's dtype already.

        Raises AdapterError when it does not fit into memory, or into the range of the network's dtype; the slot is empty
        then.
        """
        if not 1 <= slot <= self.num_slots:
            raise ValueError(f"slot {slot} is not one of 1 to {self.num_slots}")
        self.clear(slot)
        if any(factors.a.dtype != self.dtype for factors in adapter.factors.values()):
            adapter = adapter.to(self.dtype)
        try:
            for path, factors in adapter.factors.items():
                layer = self._layers.get(path) or self._install(path)
                self.generation += layer.make_room(factors.rank)
                layer.load(slot, factors)
        except (torch.OutOfMemoryError, MemoryError) as error:
            self.clear(slot)
            raise AdapterError(
                adapter.folder,
                f"there is no memory for {self.num_slots} adapters of rank {adapter.rank} ({error})",
                "Lower --max-adapters or --cache-gib",
            ) from error

    @torch.no_grad()
    def clear(self, slot: int) -> None:
        """Empties a slot. Its memory stays, for the next one."""
        for layer in self._layers.values():
            layer.clear(slot)

    def _install(self, path: str) -> LoraLinear:
        """Puts a layer that can have adapters into this one's place."""
        if not self._layers:
            self._model.register_forward_pre_hook(self._on_forward)
        parent, _, name = path.rpartition(".")
        layer = self._layers[path] = LoraLinear(self._model.get_submodule(path), self)
        setattr(self._model.get_submodule(parent), name, layer)
        return layer

    def _on_forward(self, model: nn.Module, args: tuple[object, ...]) -> None:
        slots = cast(Batch, args[0]).adapter_slots
        if slots is None:
            self.rows = None
        elif slots.device.type == "cpu":
            self.rows = GroupedRows(slots)
        else:
            self.rows = MaskedRows(slots, self.num_slots)


class LoraLinear(nn.Module):
    """A linear layer of any form, and beside it the factors of the loaded adapters.

    a: [num_slots + 1, rank, inputs], b: [num_slots + 1, rank, outputs]; ranks that an adapter does
    not have are zero. None until the first adapter is loaded.
    """

    def __init__(self, base: nn.Module, bank: AdapterBank) -> None:
        super().__init__()
        self.base = base
        self.in_features = cast(int, base.in_features)
        self.out_features = cast(int, base.out_features)
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self.ranks = [0] * (bank.num_slots + 1)
        """Of each slot, 0 where its adapter has nothing for this layer."""
        self._bank = bank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[T, inputs] -> [T, outputs]"""
        y = self.base(x)
        rows = self._bank.rows
        if rows is None or self.a is None or self.b is None:
            return y
        return rows.add(y, x, self.a, self.b, self.ranks)

    @property
    def num_bytes(self) -> int:
        return sum(stack.nbytes for stack in (self.a, self.b) if stack is not None)

    def make_room(self, rank: int) -> bool:
        """Lets each slot have so many ranks. True: the stacks are new tensors."""
        has_rank = 0 if self.a is None else self.a.shape[1]
        if rank <= has_rank:
            return False
        rank = -(-rank // _RANK_STEP) * _RANK_STEP
        self.a, self.b = (
            self._grown(self.a, rank, self.in_features),
            self._grown(self.b, rank, self.out_features),
        )
        return True

    def load(self, slot: int, factors: Factors) -> None:
        """Puts these factors into a slot that has room for them."""
        if self.a is None or self.b is None:
            raise ValueError("there is no room yet")
        for stack, values in ((self.a[slot], factors.a), (self.b[slot], factors.b)):
            stack[: factors.rank].copy_(values)
            stack[factors.rank :].zero_()
        self.ranks[slot] = factors.rank

    def clear(self, slot: int) -> None:
        """Nothing is in the slot any more. Its factors become zeros: the next adapter may have none for this layer, and a
        graph multiplies with what is there."""
        rank, self.ranks[slot] = self.ranks[slot], 0
        for stack in (self.a, self.b):
            if rank and stack is not None:
                stack[slot, :rank].zero_()

    def _grown(self, stack: torch.Tensor | None, rank: int, width: int) -> torch.Tensor:
        grown = _zeros((len(self.ranks), rank, width), self._bank.dtype, self._bank.device)
        if stack is not None:
            for slot, slot_rank in enumerate(self.ranks):
                grown[slot, :slot_rank] = stack[slot, :slot_rank]
        return grown


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a CPU memory that nobody has written to yet costs nothing: slots that are never used stay free."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    values: np.ndarray = np.zeros(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(values).view(dtype).view(shape)


class TokenRows(Protocol):
    """Which tokens of a forward pass have which adapter."""

    def add(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ranks: Sequence[int]
    ) -> torch.Tensor:
        """y [T, outputs], to which each token's adapter has been added; y itself is changed."""


class GroupedRows:
    """One product for each adapter in the batch. For a CPU, where what is not computed is not paid for."""

    def __init__(self, slots: torch.Tensor) -> None:
        self._groups: list[tuple[int, torch.Tensor | None]] = []
        """Slot, and its tokens; None: all of them."""
        for slot in slots.unique().tolist():
            if slot != NO_ADAPTER:
                tokens = (slots == slot).nonzero().squeeze(1)
                self._groups.append((slot, None if len(tokens) == len(slots) else tokens))

    def add(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ranks: Sequence[int]
    ) -> torch.Tensor:
        for slot, tokens in self._groups:
            rank = ranks[slot]
            if not rank:
                continue
            slot_a, slot_b = a[slot, :rank], b[slot, :rank]
            if tokens is None:
                y.addmm_(x @ slot_a.T, slot_b)
            else:
                y.index_add_(0, tokens, (x[tokens] @ slot_a.T) @ slot_b)
        return y


class MaskedRows:
    """Every token with every slot, and what is not its own set to zero: the same two products whoever is in the batch.

    Nothing in it depends on values, so that a GPU can run it without the host, also from a captured graph. The factors
    are narrow: eight slots of rank 8 cost a layer of 4096 inputs what 64 more outputs cost.
    """

    def __init__(self, slots: torch.Tensor, num_slots: int) -> None:
        all_slots = torch.arange(num_slots + 1, device=slots.device)
        self._is_foreign = (slots.unsqueeze(1) != all_slots).unsqueeze(2)
        """[T, num_slots + 1, 1]"""
        self._is_foreign[:, NO_ADAPTER] = True

    def add(
        self, y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, ranks: Sequence[int]
    ) -> torch.Tensor:
        num_slots, rank, _ = a.shape
        narrow = (x @ a.flatten(0, 1).T).view(len(x), num_slots, rank)
        # Filled, not multiplied: another adapter's product may have left the range of half precision.
        narrow = narrow.masked_fill(self._is_foreign, 0).flatten(1)
        return y.addmm_(narrow, b.flatten(0, 1))
