"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.contract import SamplingParams

Adapter = Annotated[str | None, typer.Option(help="The LoRA adapter to answer with.")]
Greedy = Annotated[bool, typer.Option("--greedy", help="Always take the most likely token (temperature 0).")]
MaxNewTokens = Annotated[
    int | None, typer.Option(help="At most so many answer tokens. Default: what the context leaves.")
]
Priority = Annotated[int, typer.Option(min=0, max=9, help="0 is the most urgent.")]
Seed = Annotated[int | None, typer.Option(min=0, help="The same seed gives the same answer.")]
Stats = Annotated[
    bool, typer.Option("--stats", help="After each answer, print tokens and speed (to stderr).")
]
Temperature = Annotated[float | None, typer.Option(min=0, help="Default: the model card's 0.95.")]
TopP = Annotated[float | None, typer.Option(help="Default: the model card's 0.7.")]


def sampling(
    *,
    greedy: bool = False,
    max_new_tokens: int | None = None,
    seed: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
) -> SamplingParams:
    """The sampling parameters of a command line; what was not given keeps the contract's default."""
    given = {
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "temperature": 0.0 if greedy else temperature,
        "top_p": top_p,
    }
    return SamplingParams(**{name: value for name, value in given.items() if value is not None})
