"""The ledger's scripts against a model of them: 20,000 random steps of several workers, clients and readers on the real server.

`make model-check STEPS=100000` looks further, from another beginning each time. What is found comes with a value of
GLMQ_MODEL_CHECK_SEED that finds it again at once.
"""

from __future__ import annotations

import os
import secrets
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import redis
from hypothesis.stateful import run_state_machine_as_test

from producer.contract.keys import Keys
from producer.ledger import connect, scripts

pytest.register_assert_rewrite("tests.producer.ledger.model_check")

from tests.producer.ledger.model_check.machine import LedgerMachine  # noqa: E402
from tests.producer.ledger.model_check.mutants import MUTANTS  # noqa: E402
from tests.producer.ledger.model_check.server import Substitution  # noqa: E402

NUM_STEPS = int(os.environ.get("GLMQ_MODEL_CHECK_STEPS", "20000"))
SEED = os.environ.get("GLMQ_MODEL_CHECK_SEED", "5")
STEPS_A_RUN = 120
RUNS_A_ROUND = 20
MAX_MUTANT_STEPS = 20_000
HAPPENS = (
    "continuation",
    "doubled call",
    "document back from its pieces",
    "emission: FENCED",
    "emission: CANCEL_ASKED",
    "emission: ALREADY_WRITTEN",
    "fold: True",
    "lose: ended",
    "retry: None",
    "stream read to its end",
    "submit: QueueFull",
    "submit: ConversationBusy",
)
"""Of the tally: what must happen often if the machine is to be of use."""


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url) as connection:
        yield connection


def run(
    connection: redis.Redis,
    keys: Keys,
    seed: int,
    num_steps: int,
    substitutions: tuple[Substitution, ...] = (),
    *,
    shrinks: bool = True,
) -> Counter[str]:
    """At least so many steps; answers the tally. Raises what the machine raises, with the shortest steps that lead to it."""
    machine = type(
        "Ledger",
        (LedgerMachine,),
        {"connection": connection, "keys": keys, "substitutions": substitutions, "tally": Counter()},
    )
    tally: Counter[str] = machine.tally  # type: ignore[attr-defined]
    phases = [hypothesis.Phase.generate, *([hypothesis.Phase.shrink] if shrinks else [])]
    settings = hypothesis.settings(
        max_examples=RUNS_A_ROUND,
        stateful_step_count=STEPS_A_RUN,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
    )
    while tally["step"] < num_steps:
        hypothesis.seed(seed)(machine)
        try:
            run_state_machine_as_test(machine, settings=settings)
        except BaseException as error:
            error.add_note(f"GLMQ_MODEL_CHECK_SEED={seed} finds it again, after {tally['step']} steps now")
            raise
        seed += 1
    return tally


@pytest.mark.timeout(0 if NUM_STEPS > 20_000 else 600)
def test_no_interleaving_of_calls_breaks_the_ledger(connection: redis.Redis, keys: Keys) -> None:
    seed = secrets.randbits(32) if SEED == "random" else int(SEED)
    print(f"from GLMQ_MODEL_CHECK_SEED={seed} on")
    tally = run(connection, keys, seed, NUM_STEPS)
    for name, number in sorted(tally.items()):
        print(f"{number:8} {name}")
    assert tally["step"] >= NUM_STEPS
    rare = {name: tally[name] for name in HAPPENS if tally[name] < NUM_STEPS / 2_000}
    assert not rare, "the machine hardly looks where things go wrong any more"


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MUTANTS)
def test_a_ledger_that_is_broken_on_purpose_is_found_out(
    connection: redis.Redis, keys: Keys, name: str
) -> None:
    mutant = MUTANTS[name]
    with pytest.raises((AssertionError, redis.ResponseError)):
        run(connection, keys, mutant.seed, MAX_MUTANT_STEPS, (mutant,), shrinks=False)


@pytest.mark.parametrize("name", MUTANTS)
def test_each_broken_ledger_has_one_text_of_the_real_one_replaced(name: str) -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(scripts.__file__).parent.glob("*.lua")]
    assert sum(source.count(MUTANTS[name].old) for source in sources) == 1
