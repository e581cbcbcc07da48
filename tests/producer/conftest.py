"""A worker without an engine: says to the ledger what a real one would, one step at a time."""

from __future__ import annotations

import pytest

from producer.contract import Failed, Finished, Request, Started, Token
from producer.ledger import Claim, Emission, EmitCode, Ledger, calls

MODEL = "chatglm-6b"


class HandWorker:
    """Claims, emits and finishes when the test says so."""

    def __init__(self, ledger: Ledger, name: str = "worker-1") -> None:
        self.ledger = ledger
        self.name = name

    def submit(self, request: Request, **options: str | float) -> str:
        """Into the ledger alone: no ticket."""
        return self.ledger.run(calls.submit(request, model=MODEL, **options)).request_id

    def claim(self, lease_seconds: float = 5.0) -> Claim | None:
        return self.ledger.run(calls.claim(MODEL, self.name, lease_seconds))

    def start(self, claim: Claim) -> EmitCode:
        event = Started(attempt=claim.attempt, worker=self.name, prompt_tokens=7)
        return self._emit(claim, event)

    def emit(self, claim: Claim, index: int, *texts: str) -> EmitCode:
        """Tokens with these texts, the last of them with this index; the id of token i is 100 + i."""
        ids = tuple(100 + i for i in range(index - len(texts) + 1, index + 1))
        return self._emit(claim, Token(index=index, ids=ids, texts=texts))

    def finish(self, claim: Claim, text: str, reason: str = "stop") -> bool:
        event = Finished.model_validate({"reason": reason, "text": text, "attempts": claim.attempt})
        return self.ledger.run(calls.finish(claim.request_id, claim.attempt, event))

    def fail(self, claim: Claim, code: str) -> bool:
        event = Failed(code=code, message="It cannot be answered. Send another.")
        return self.ledger.run(calls.fail(claim.request_id, claim.attempt, event))

    def answer(self, claim: Claim, *texts: str) -> None:
        """One token an event, to the end."""
        assert self.start(claim) is EmitCode.WRITTEN
        for index, text in enumerate(texts, 1):
            assert self.emit(claim, index, text) is EmitCode.WRITTEN
        assert self.finish(claim, "".join(texts))

    def _emit(self, claim: Claim, event: Started | Token) -> EmitCode:
        [code] = self.ledger.run(calls.emit([Emission(claim.request_id, claim.attempt, event)]))
        return code


@pytest.fixture
def worker(ledger: Ledger) -> HandWorker:
    return HandWorker(ledger)


@pytest.fixture
def other_worker(ledger: Ledger) -> HandWorker:
    return HandWorker(ledger, "worker-2")
