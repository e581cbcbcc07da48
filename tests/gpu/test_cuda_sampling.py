"""Sampling on the GPU against the engine's sampler, which defines it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from workers.engine.messages import Sampling
from workers.engine.sampler import Sampler
from workers.engine.sequence import Sequence
from workers.models.layout import Layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

VOCABULARY, FIRST, END, EOS = 130528, 1, 130344, 130005


def sample(logits: torch.Tensor, settings: list[Sampling], token_index: int) -> torch.Tensor:
    from workers.models.kernels import cuda_ops

    rows = len(settings)

    def column(values: list[Any], dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device="cuda")

    inputs = cuda_ops.SamplingInputs(
        temperatures=column([s.temperature for s in settings], torch.float32),
        top_ks=column([s.top_k for s in settings], torch.int32),
        top_ps=column([s.top_p for s in settings], torch.float64),
        seeds=column([s.seed for s in settings], torch.int64),
        token_indexes=column([token_index] * rows, torch.int64),
        min_new_tokens=column([s.min_new_tokens for s in settings], torch.int32),
        rows=torch.arange(rows, dtype=torch.int32, device="cuda").flip(0),
    )
    tokens = torch.full((rows,), -1, device="cuda")
    last_tokens = torch.full((rows + 1,), -1, device="cuda")
    cuda_ops.run_sample(
        logits, inputs, tokens, last_tokens, first_id=FIRST, end_id=END, eos_id=EOS, invalid_token=5
    )
    assert torch.equal(last_tokens[:-1].flip(0), tokens)
    assert last_tokens[-1] == -1
    return tokens


def expected(logits: torch.Tensor, settings: list[Sampling], token_index: int) -> torch.Tensor:
    sampler = Sampler(
        first_id=FIRST, end_id=END, eos_id=EOS, max_num_seqs=len(settings), device=torch.device("cuda")
    )
    sequences = [
        Sequence(row, row, [5, 6], 2, Layout(1, 0), one, 100, row=row) for row, one in enumerate(settings)
    ]
    indexes = torch.full((len(settings),), token_index, device="cuda")
    return sampler.sample(logits, sampler.batch(sequences), indexes)


def random_logits(rows: int, spread: float) -> torch.Tensor:
    return (torch.randn(rows, VOCABULARY, device="cuda") * spread).half()


@pytest.mark.parametrize("rows", [1, 3, 64, 255])
@pytest.mark.parametrize("spread", [0.5, 2.0, 6.0])
def test_the_draws_are_those_of_the_engines_sampler(rows: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    settings = [
        Sampling(
            max_new_tokens=9,
            seed=int(torch.randint(2**62, (1,), generator=generator)),
            temperature=[0.0, 0.2, 0.95, 1.7][row % 4],
            top_k=[1, 5, 50, 256][row // 4 % 4],
            top_p=[0.7, 1.0, 0.95, 0.1][row // 16 % 4],
        )
        for row in range(rows)
    ]
    num_equal = 0
    for token_index in range(20):
        logits = random_logits(rows, spread)
        num_equal += int(
            (sample(logits, settings, token_index) == expected(logits, settings, token_index)).sum()
        )
    # A draw on the border of two tokens may fall to either: the sums are rounded differently.
    assert num_equal >= 20 * rows * 0.997 - 1


def test_the_largest_score_wins_and_the_smaller_id_of_two() -> None:
    logits = random_logits(4, 1.0)
    logits[:, 777] = 40.0
    logits[:, 99999] = 40.0
    logits[:, END:] = 60.0
    logits[:, 0] = 60.0
    greedy = [Sampling(max_new_tokens=9, seed=1, temperature=0.0)] * 4
    assert sample(logits, greedy, 0).tolist() == [777] * 4


def test_the_end_token_waits_for_the_minimum() -> None:
    logits = random_logits(2, 1.0)
    logits[:, EOS] = 50.0
    for temperature in (0.0, 0.9):
        settings = [
            Sampling(max_new_tokens=9, seed=1, temperature=temperature, min_new_tokens=least)
            for least in (4, 3)
        ]
        tokens = sample(logits, settings, 3)
        assert tokens[0] != EOS
        assert tokens[1] == EOS


@pytest.mark.parametrize("invalid", [float("nan"), float("inf"), float("-inf")])
def test_an_invalid_score_yields_token_five_in_its_row_alone(invalid: float) -> None:
    logits = random_logits(3, 1.0)
    logits[1, 4321] = invalid
    for temperature in (0.0, 0.9):
        settings = [Sampling(max_new_tokens=9, seed=1, temperature=temperature)] * 3
        found = sample(logits, settings, 0)
        assert found[1] == FIRST + 5
        assert torch.equal(found, expected(logits, settings, 0))


def test_draws_follow_the_probabilities() -> None:
    logits = torch.full((512, VOCABULARY), -20.0, device="cuda").half()
    logits[:, [10, 20, 30]] = torch.tensor([0.6, 0.3, 0.1], device="cuda").log().half()
    settings = [Sampling(max_new_tokens=9, seed=seed, temperature=1.0, top_p=1.0) for seed in range(512)]
    counts = torch.zeros(VOCABULARY)
    for token_index in range(40):
        counts += torch.bincount(sample(logits, settings, token_index).cpu(), minlength=VOCABULARY)
    shares = counts[[10, 20, 30]] / counts.sum()
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), atol=0.015, rtol=0)
