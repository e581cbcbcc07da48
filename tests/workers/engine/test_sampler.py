from __future__ import annotations

import json
import math

import pytest
import torch

from workers.engine.messages import Sampling
from workers.engine.sampler import (
    INVALID_TOKEN,
    MAX_TOP_K,
    Candidates,
    Sampler,
    _mix,
    _sorted_candidates,
    uniform,
)
from workers.engine.sequence import Sequence
from workers.models.layout import Layout

EOS = 2
FLAT = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}


def sequence(row: int = 0, tokens: list[int] | None = None, **sampling) -> Sequence:
    return Sequence(
        sequence_id=row,
        arrival=row,
        token_ids=tokens or [9],
        prompt_len=1,
        layout=Layout(0, 0),
        sampling=Sampling(**{"max_new_tokens": 10, "seed": row, **sampling}),
        max_len=100,
        row=row,
    )


def sampler(num_ids: int = 1000, first_id: int = 0, max_num_seqs: int = 4096) -> Sampler:
    return Sampler(
        first_id=first_id,
        end_id=first_id + num_ids,
        eos_id=first_id + EOS,
        max_num_seqs=max_num_seqs,
        device=torch.device("cpu"),
    )


def sample(logits: torch.Tensor, sequences: list[Sequence], indexes: list[int] | None = None) -> list[int]:
    chooser = sampler(logits.shape[1])
    for one in sequences:
        chooser.add(one)
    token_indexes = torch.tensor(indexes or [0] * len(sequences))
    return chooser.sample(logits, chooser.batch(sequences), token_indexes).tolist()


def filtered(
    scores: torch.Tensor, *, temperature: float, top_k: int, top_p: float, num: int
) -> dict[int, float]:
    candidates = Candidates(
        scores.unsqueeze(0),
        torch.tensor([temperature]),
        torch.tensor([top_k]),
        torch.tensor([top_p], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
    )
    indexes, probabilities = candidates.filtered(num)
    total = probabilities.sum().item()
    return {
        index: probability / total
        for index, probability in zip(indexes[0].tolist(), probabilities[0].tolist(), strict=True)
        if probability > 0
    }


def test_what_is_kept_and_how_likely_it_is_equals_the_originals(golden_root):
    for name in ("chatglm-6b-tiny", "chatglm-6b-realvocab"):
        data = json.loads((golden_root / name / "golden_model.json").read_text(encoding="utf-8"))["sampling"]
        kept = filtered(
            torch.tensor(data["logits"]),
            temperature=data["temperature"],
            top_k=data["top_k"],
            top_p=data["top_p"],
            num=data["top_k"],
        )
        assert sorted(kept) == data["kept"]
        for index, probability in zip(data["kept"], data["probs_kept"], strict=True):
            assert kept[index] == pytest.approx(probability, abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {}, FLAT])
def test_one_invalid_score_gives_the_token_that_the_original_gives_but_to_that_row_alone(bad, sampling):
    torch.manual_seed(0)
    logits = torch.randn(3, 1000)
    sequences = [sequence(row, **sampling) for row in range(3)]
    expected = sample(logits, sequences)
    logits[1, 77] = bad
    assert sample(logits, sequences) == [expected[0], INVALID_TOKEN, expected[2]]


@pytest.mark.parametrize("top_k", [0, 3, 50, MAX_TOP_K, MAX_TOP_K + 1, 5000])
def test_draws_follow_the_filtered_distribution(top_k):
    scores = torch.linspace(3, 0, 1000) * torch.tensor([1.0, -1.0]).repeat(500)
    expected = filtered(scores, temperature=0.8, top_k=top_k or 1000, top_p=0.9, num=1000)
    num_draws = 4000
    sequences = [sequence(row, temperature=0.8, top_k=top_k, top_p=0.9) for row in range(num_draws)]
    drawn = sample(scores.repeat(num_draws, 1), sequences)
    assert set(drawn) <= set(expected)
    # Pearson's statistic over the likeliest tokens has their number as its mean, and twice that as its variance.
    likely = sorted(expected, key=expected.__getitem__)[-40:]
    statistic = sum(
        (drawn.count(index) - num_draws * expected[index]) ** 2 / (num_draws * expected[index])
        for index in likely
    )
    assert statistic < len(likely) + 4 * math.sqrt(2 * len(likely))


def test_a_draw_is_the_same_beside_any_other_sequences():
    torch.manual_seed(0)
    # Half precision has many equal scores, whose order must not depend on the path that finds them.
    logits = (torch.randn(40, 3000) * 2).half()
    kinds = [{"top_k": 50}, {"top_k": 0}, {"temperature": 0.0}, {"top_k": 7, "top_p": 1.0}, {"top_k": 1000}]
    sequences = [sequence(row, **kinds[row % 5]) for row in range(40)]
    indexes = list(range(40))
    together = sample(logits, sequences, indexes)
    alone = [sample(logits[row : row + 1], [sequences[row]], [indexes[row]])[0] for row in range(40)]
    assert together == alone


def test_candidates_are_the_same_from_a_partial_and_from_a_full_sort():
    torch.manual_seed(0)
    scores = torch.randint(0, 2000, (50, 5000)).float()
    values, indexes = _sorted_candidates(scores, 5000)
    few_values, few_indexes = _sorted_candidates(scores, 50)
    assert few_values.shape[1] < 5000
    assert torch.equal(few_values[:, :50], values[:, :50])
    assert torch.equal(few_indexes[:, :50], indexes[:, :50])


def test_greedy_is_the_best_score_in_every_kind_of_batch():
    torch.manual_seed(0)
    logits = torch.randn(6, 500)
    best = logits.argmax(-1).tolist()
    greedy = [sequence(row, temperature=0.0) for row in range(6)]
    assert sample(logits, greedy) == best
    mixed = [*greedy[:3], *(sequence(row, **FLAT) for row in range(3, 6))]
    assert sample(logits, mixed)[:3] == best[:3]
    assert sample(logits, [sequence(row, temperature=1e-4) for row in range(6)]) == best


def test_rows_without_a_piece_are_never_chosen():
    logits = torch.zeros(1, 130)
    logits[0, :20] = 50.0
    logits[0, 120:] = 100.0
    chooser = sampler(num_ids=100, first_id=20)
    for sampling in ({"temperature": 0.0}, FLAT, {}):
        for seed in range(50):
            one = sequence(0, seed=seed, **sampling)
            token = chooser.sample(logits, chooser.batch([one]), torch.tensor([0])).item()
            assert 20 <= token < 120


def test_the_end_token_cannot_come_before_the_minimum():
    logits = torch.zeros(2, 100)
    logits[:, EOS] = 50.0
    sequences = [sequence(row, min_new_tokens=3) for row in range(2)]
    first, second = sample(logits, sequences, [2, 3])
    assert first != EOS
    assert second == EOS


def test_a_bias_is_added_to_its_own_token_of_its_own_sequence():
    logits = torch.zeros(3, 100)
    logits[:, 7] = 5.0
    sequences = [
        sequence(0, temperature=0.0, logit_bias={7: -100.0, 9: 1.0}),
        sequence(1, temperature=0.0),
        sequence(2, temperature=0.0, logit_bias={11: 6.0, 99999: 3.0}),
    ]
    assert sample(logits, sequences) == [9, 7, 11]


def test_the_repetition_penalty_reaches_prompt_and_answer():
    chooser = sampler(num_ids=20)
    scores = torch.tensor([[0.0, 0, 0, 3, 2, 0, 0, -1, -1.5, *[-9] * 11]])
    one = sequence(0, tokens=[3, 7], temperature=0.0, repetition_penalty=2.0)
    other = sequence(1, tokens=[3, 7], temperature=0.0)
    chooser.add(one)
    chooser.add(other)
    batch = chooser.batch([one, other])
    zero = torch.tensor([0, 0])
    # 3 counts half, so 4 is better; once it was chosen, it counts half as well, and 3 is better again.
    chosen = [chooser.sample(scores.repeat(2, 1), batch, zero).tolist() for _ in range(3)]
    assert chosen == [[4, 3], [3, 3], [3, 3]]
    negative = torch.where(scores == -1.5, scores, scores.clamp(max=-1))
    negative[0, :7] = -50
    # -1 becomes -2, below -1.5.
    assert chooser.sample(negative.repeat(2, 1), batch, zero).tolist() == [8, 7]


def test_a_row_that_is_used_again_forgets_what_the_last_sequence_said():
    chooser = sampler(num_ids=10)
    scores = torch.tensor([[0.0, 0, 0, 3, 2, 0, 0, 0, 0, 0]])
    for tokens, best in (([3], 4), ([4], 3)):
        one = sequence(0, tokens=tokens, temperature=0.0, repetition_penalty=2.0)
        chooser.add(one)
        assert chooser.sample(scores, chooser.batch([one]), torch.tensor([0])).item() == best


def splitmix_uniform(seed: int, counter: int) -> float:
    """The same in Python's integers."""
    mask = (1 << 64) - 1

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    mixed = mix((mix(seed) + counter * 0x9E3779B97F4A7C15) & mask)
    return (mixed >> 12) * 2.0**-52


def test_random_numbers_are_those_of_the_published_hash():
    pairs = [(0, 0), (0, 1), (1, 0), (7, 100_000), (2**63 - 1, 5), (123456789012345678, 2047)]
    seeds, counters = (torch.tensor(column) for column in zip(*pairs, strict=True))
    assert uniform(seeds, counters).tolist() == [splitmix_uniform(*pair) for pair in pairs]
    # splitmix64's first output for the state 0.
    assert _mix(torch.tensor(0)).item() % 2**64 == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("varies", ["seed", "counter"])
def test_random_numbers_are_uniform_and_neighbours_are_unrelated(varies):
    numbers = torch.arange(100_000)
    fixed = torch.full_like(numbers, 42)
    draws = uniform(numbers, fixed) if varies == "seed" else uniform(fixed, numbers)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=100, min=0, max=1)
    assert ((counts - 1000) ** 2 / 1000).sum() < 100 + 4 * math.sqrt(200)
    centered = draws - 0.5
    for lag in (1, 2, 7):
        correlation = (centered[:-lag] * centered[lag:]).mean() * 12
        assert abs(correlation) < 4 / math.sqrt(100_000)
