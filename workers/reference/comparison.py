"""A checkpoint held against its own code: tokenizer, prompts, logits and greedy answers of both, and where they differ.

The two models are loaded one after the other, so that only one is in memory.
"""

from __future__ import annotations

import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from workers.engine.config import EngineConfig
from workers.engine.engine import Engine
from workers.engine.messages import Generate, Sampling
from workers.models.adapter_bank import AdapterBank
from workers.models.config import ModelConfig
from workers.models.loader import load_model
from workers.models.lora import read_adapter
from workers.models.network import Network
from workers.models.prefill import pack_sequences
from workers.models.tokenizer import Tokenizer, chat_text
from workers.reference.adapters import ReferenceAdapters
from workers.reference.checkpoint import Reference, load_reference
from workers.reference.texts import CONVERSATIONS, RESPONSES, SPELLED_SPECIALS, TEXTS

TOLERANCES: Final = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 2.0}
"""Logits of two sound implementations differ by less. Half precision rounds 28 layers' sums in another order."""

NUM_RANDOM_SEQUENCES: Final = 50


@dataclass(frozen=True, slots=True)
class Comparison:
    """One thing that was compared."""

    what: str
    compared: str
    """How much of it."""
    worst: str
    """The worst difference, in words for whoever has to find its cause."""
    is_equal: bool
    verdict: str = ""
    """Other than equal or different."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the checkpoint's own code says."""

    text_ids: list[list[int]]
    special_ids: list[list[int]]
    """Of texts that spell special tokens."""
    texts_of: Callable[[Sequence[int]], str | None]
    """Its decode(); None where it raises."""
    responses: list[str]
    prompt_ids: list[list[int]]
    logits: list[torch.Tensor] = field(default_factory=list)
    """[S, V] float32 of each prompt, on the CPU."""
    adapter_logits: list[torch.Tensor] = field(default_factory=list)
    """The same with the adapter, when there is one."""
    answers: list[list[int]] = field(default_factory=list)
    margins: list[list[float]] = field(default_factory=list)
    """At each token of an answer: how far the best score is above the second."""


def compare(
    folder: Path,
    *,
    reference_folder: Path | None = None,
    device: torch.device,
    dtype: torch.dtype,
    max_new_tokens: int = 32,
    tolerance: float | None = None,
    adapter: Path | None = None,
) -> Iterator[Comparison]:
    """Compares this checkpoint with what the code in `reference_folder` (its own folder by default) makes of the weights
    there. The code runs: ask first.

    Raises CheckpointError for a folder that cannot be loaded (AdapterError: the adapter's), and ValueError for a device that
    is not there.
    """
    tolerance = TOLERANCES[dtype] if tolerance is None else tolerance
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder, config)
    reference = load_reference(reference_folder or folder, trust_remote_code=True, device=device, dtype=dtype)
    said = _listen(reference, max_new_tokens)
    if adapter is not None:
        adapters = ReferenceAdapters(reference.model)
        adapters.know(adapter.name, adapter)
        adapters.use(adapter.name)
        said.adapter_logits.extend(_reference_logits(reference, ids) for ids in said.prompt_ids)
        del adapters
    yield from _compare_tokenizers(said, tokenizer)
    del reference
    gc.collect()
    model = load_model(folder, dtype=dtype, device=device, config=config)
    ours = [_logits(model, tokenizer, ids) for ids in said.prompt_ids]
    yield _compare_logits("logits", said.logits, ours, tolerance)
    engine_config = EngineConfig(
        checkpoint=str(folder), max_num_seqs=len(said.prompt_ids), context_len=_room(said, max_new_tokens)
    )
    answers = _answers(Engine(model, tokenizer, engine_config), said.prompt_ids, max_new_tokens)
    yield _compare_answers(said, answers, tolerance)
    if adapter is not None:
        bank = AdapterBank(model, 1, dtype=model.dtype, device=model.device)
        bank.load(1, read_adapter(adapter, bank.shapes))
        ours = [_logits(model, tokenizer, ids, adapter_slot=1) for ids in said.prompt_ids]
        yield _compare_logits(f"logits with {adapter.name}", said.adapter_logits, ours, tolerance)


# --- the checkpoint's own code ---------------------------------------------------------------------------------------


def _listen(reference: Reference, max_new_tokens: int) -> Said:
    model, tokenizer = reference.model, reference.tokenizer

    def text_of(ids: Sequence[int]) -> str | None:
        try:
            return str(tokenizer.decode(list(ids)))
        except (IndexError, ValueError):
            return None

    said = Said(
        text_ids=[tokenizer.encode(text, add_special_tokens=False) for text in TEXTS],
        special_ids=[tokenizer.encode(text, add_special_tokens=False) for text in SPELLED_SPECIALS],
        texts_of=text_of,
        responses=[model.process_response(text) for text in RESPONSES],
        prompt_ids=[_prompt_ids(reference, turns) for turns in CONVERSATIONS],
    )
    for ids in said.prompt_ids:
        out = model.generate(
            input_ids=torch.tensor([ids], device=reference.device),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            return_dict_in_generate=True,
            output_scores=True,
        )
        best = [scores[0].float().topk(2).values.tolist() for scores in out.scores]
        said.logits.append(_reference_logits(reference, ids))
        said.answers.append(out.sequences[0, len(ids) :].tolist())
        said.margins.append([first - second for first, second in best])
    return said


@torch.inference_mode()
def _reference_logits(reference: Reference, ids: list[int]) -> torch.Tensor:
    """[S, V] float32 of one prompt, on the CPU."""
    prompt = torch.tensor([ids], device=reference.device)
    logits: torch.Tensor = reference.model(input_ids=prompt).logits[0].float().cpu()
    return logits


def _prompt_ids(reference: Reference, turns: Sequence[tuple[str, str]]) -> list[int]:
    """What chat() hands to generate(): the prompt that the original makes of these turns."""
    model = reference.model
    seen: list[list[int]] = []

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        seen.append(input_ids[0].tolist())
        return input_ids

    *history, (query, _) = turns
    model.generate = generate
    try:
        model.chat(reference.tokenizer, query, history=history)
    finally:
        del model.generate
    return seen[0]


# --- ours ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _logits(model: Network, tokenizer: Tokenizer, ids: list[int], adapter_slot: int = 0) -> torch.Tensor:
    """[S, V] float32 of one prompt, on the CPU."""
    batch = pack_sequences([ids], [tokenizer.layout(ids)], model.device)
    if adapter_slot:
        batch.adapter_slots = torch.full_like(batch.token_ids, adapter_slot)
    logits: torch.Tensor = model(batch, all_positions=True).float().cpu()
    return logits


def _answers(engine: Engine, prompts: Sequence[list[int]], max_new_tokens: int) -> list[list[int]]:
    """The engine's greedy answers to all prompts at once."""
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=0, temperature=0)
    for index, ids in enumerate(prompts):
        refused = engine.add(Generate(index, ids, sampling))
        if refused is not None:
            raise ValueError(refused.message)
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        step = engine.step()
        for sequence_id, token_id in zip(step.sequence_ids, step.token_ids, strict=True):
            answers[sequence_id].append(token_id)
    return answers


def _room(said: Said, max_new_tokens: int) -> int:
    return max(map(len, said.prompt_ids)) + max_new_tokens + 1


# --- the two side by side --------------------------------------------------------------------------------------------


def _compare_tokenizers(said: Said, tokenizer: Tokenizer) -> Iterator[Comparison]:
    ours = [tokenizer.encode(text) for text in TEXTS]
    yield _compare_items(
        "tokenizer: text to ids",
        f"{len(TEXTS)} texts, {sum(map(len, said.text_ids))} ids",
        list(zip(TEXTS, said.text_ids, ours, strict=True)),
    )
    sequences = [*said.text_ids, *_random_sequences(tokenizer)]
    yield _compare_items(
        "tokenizer: ids to text",
        f"{len(sequences)} sequences, {sum(map(len, sequences))} ids",
        [(str(ids[:8]), said.texts_of(ids), tokenizer.decode(ids)) for ids in sequences],
    )
    yield _compare_specials(said, tokenizer)
    yield _compare_items(
        "clean-up of an answer",
        f"{len(RESPONSES)} answers",
        list(zip(RESPONSES, said.responses, map(tokenizer.process_response, RESPONSES), strict=True)),
    )
    prompts = [tokenizer.build_prompt(turns[-1][0], history=turns[:-1]) for turns in CONVERSATIONS]
    yield _compare_items(
        "prompt",
        f"{len(prompts)} conversations of 1 to {max(map(len, CONVERSATIONS))} rounds",
        [
            (_text_of_turns(turns), theirs, mine)
            for turns, theirs, mine in zip(CONVERSATIONS, said.prompt_ids, prompts, strict=True)
        ],
    )


def _compare_items(what: str, compared: str, items: Sequence[tuple[str, Any, Any]]) -> Comparison:
    """items: (of what, theirs, ours)"""
    different = [item for item in items if item[1] != item[2]]
    if not different:
        return Comparison(what, compared, "none", True)
    name, theirs, ours = different[0]
    index = next(
        (i for i, (a, b) in enumerate(zip(theirs or "", ours or "", strict=False)) if a != b),
        min(len(theirs or ""), len(ours or "")),
    )
    worst = (
        f"{len(different)} differ, first {_short(name)}: from {index} on it is "
        f"{_short((theirs or '')[index : index + 4])}, ours {_short((ours or '')[index : index + 4])}"
    )
    return Comparison(what, compared, worst, False)


def _compare_specials(said: Said, tokenizer: Tokenizer) -> Comparison:
    """Here the two differ on purpose: what a user types must not move the prompt's boundaries."""
    special_ids = {
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.gmask_id,
        tokenizer.mask_id,
        tokenizer.pad_id,
    }
    ours = [special_ids.intersection(tokenizer.encode(text)) for text in SPELLED_SPECIALS]
    num_theirs = sum(bool(special_ids.intersection(ids)) for ids in said.special_ids)
    what, compared = "special tokens that a text spells", f"{len(SPELLED_SPECIALS)} texts"
    if any(ours):
        return Comparison(
            what, compared, f"{sum(map(bool, ours))} texts become special tokens of ours", False
        )
    worst = f"the original makes special tokens of {num_theirs} texts, ours of none"
    return Comparison(what, compared, worst, True, "by design")


def _compare_logits(
    what: str, theirs: Sequence[torch.Tensor], ours: Sequence[torch.Tensor], tolerance: float
) -> Comparison:
    num_positions = sum(len(logits) for logits in ours)
    compared = f"{len(ours)} prompts, {num_positions} positions x {ours[0].shape[-1]}"
    worst, place = 0.0, (0, 0)
    for index, (other, mine) in enumerate(zip(theirs, ours, strict=True)):
        if other.shape != mine.shape:
            shapes = f"{list(other.shape)}, ours {list(mine.shape)}"
            return Comparison(what, compared, f"the shape of prompt {index} is {shapes}", False)
        by_position = (other - mine).abs().amax(dim=-1)
        # NaN is the worst difference, and the first one counts.
        largest = math.inf if by_position.isnan().any() else float(by_position.max())
        if largest > worst:
            worst, place = largest, (index, int(by_position.nan_to_num(math.inf).argmax()))
    text = f"{worst:.2e} at prompt {place[0]}, position {place[1]} (allowed: {tolerance:g})"
    return Comparison(what, compared, text, worst <= tolerance)


def _compare_answers(said: Said, ours: Sequence[list[int]], tolerance: float) -> Comparison:
    """Where two scores are closer than both sides' errors, either token is right, and the rest cannot be compared."""
    num_same, num_ties = 0, 0
    different = ""
    for index, (theirs, mine) in enumerate(zip(said.answers, ours, strict=True)):
        same = next(
            (i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b),
            min(len(theirs), len(mine)),
        )
        num_same += same
        if same == len(theirs) == len(mine):
            continue
        margin = said.margins[index][same] if same < len(theirs) else math.inf
        if margin <= 2 * tolerance:
            num_ties += 1
        elif not different:
            found = f"{theirs[same : same + 1]}, ours {mine[same : same + 1]}"
            different = f"answer {index}, token {same}: {found}, margin {margin:.3g}"
    compared = f"{len(ours)} answers, {num_same} tokens"
    ties = f"{num_ties} answers part at a tie" if num_ties else "none"
    return Comparison("greedy answers", compared, different or ties, not different)


def _random_sequences(tokenizer: Tokenizer) -> list[list[int]]:
    """Ids that no text encodes to: incomplete characters, control pieces, spaces where none belong."""
    generator = random.Random(0)
    ids = range(tokenizer.first_id, tokenizer.end_id)
    return [generator.choices(ids, k=12) for _ in range(NUM_RANDOM_SEQUENCES)]


def _text_of_turns(turns: Sequence[tuple[str, str]]) -> str:
    return chat_text(turns[-1][0], turns[:-1])


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 48 else f"{text[:45]}..."
