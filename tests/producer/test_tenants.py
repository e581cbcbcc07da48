"""Tenants through the client and the command: what is set, what each has here, and that it counts at once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from producer.cli import app
from producer.client import Client
from producer.contract import ChatRequest, InvalidRequest
from producer.contract.tenants import QueueOrder, TenantSettings
from producer.ledger import calls
from producer.settings import Settings
from producer.tenants import Tenants
from tests.producer.conftest import MODEL

if TYPE_CHECKING:
    from tests.producer.conftest import HandWorker


@pytest.fixture
def tenants(client: Client) -> Tenants:
    return Tenants(client)


def test_what_is_set_adds_up_and_can_be_taken_back(tenants: Tenants) -> None:
    tenants.set("clinic", TenantSettings(weight=3))
    assert tenants.set("clinic", TenantSettings(max_running=8)) == TenantSettings(weight=3, max_running=8)
    [status] = tenants.list()
    assert (status.tenant, status.settings) == ("clinic", TenantSettings(weight=3, max_running=8))
    tenants.unset("clinic")
    assert tenants.list() == []


def test_tenants_are_listed_with_what_they_have_here(
    client: Client, tenants: Tenants, worker: HandWorker
) -> None:
    for _ in range(3):
        worker.submit(ChatRequest(query="q", tenant="a"))
    worker.submit(ChatRequest(query="q", tenant="b:c/d"))
    claim = worker.claim()
    assert claim is not None
    a, b = tenants.list()
    assert (a.tenant, a.num_running, a.num_queued) == ("a", 1, 2)
    assert a.num_queued_tokens > 2 * 256
    assert (b.tenant, b.num_running, b.num_queued, b.num_used_tokens) == ("b:c/d", 0, 1, 0)
    worker.answer(claim, "x", "y")
    assert tenants.list()[0].num_used_tokens == 2
    assert Tenants(client, "another-model").list() == []


def test_a_raised_limit_lets_what_was_held_run_at_once(tenants: Tenants, worker: HandWorker) -> None:
    order = QueueOrder(tenant_max_running=1)
    for _ in range(3):
        worker.submit(ChatRequest(query="q", tenant="a"))

    def claim() -> calls.Claim | None:
        return worker.ledger.run(calls.claim(MODEL, "w", 5.0, order))

    assert claim() is not None
    assert claim() is None
    assert tenants.list()[0].is_held
    tenants.set("a", TenantSettings(max_running=2))
    assert not tenants.list()[0].is_held
    assert claim() is not None
    assert claim() is None
    tenants.set("a", TenantSettings(max_running=0))
    assert claim() is not None


def test_a_name_that_no_request_can_carry_is_refused(tenants: Tenants) -> None:
    with pytest.raises(InvalidRequest, match="tenant"):
        tenants.set("a b", TenantSettings(weight=2))


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.fixture
def glmq(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("REDIS_URL", str(settings.redis_url))
    monkeypatch.setenv("GLMQ_NAMESPACE", settings.namespace)
    monkeypatch.setenv("GLMQ_TENANT_MAX_RUNNING", "4")
    return CliRunner()


def test_the_command_sets_lists_and_unsets(glmq: CliRunner, worker: HandWorker) -> None:
    worker.submit(ChatRequest(query="q", tenant="clinic"))
    told = glmq.invoke(app, ["tenants", "set", "clinic", "--weight", "2.5", "--max-queued", "100"])
    assert told.output == "clinic: weight 2.5, max_queued 100\n"
    [status] = json.loads(glmq.invoke(app, ["tenants", "list", "--json"]).output)
    assert status["settings"] == {"weight": 2.5, "max_queued": 100}
    assert (status["queued"], status["running"]) == (1, 0)
    table = glmq.invoke(app, ["tenants", "list"]).output
    assert table.splitlines()[1].split() == [
        "clinic",
        "2.5",
        "0",
        "(4)",
        "1",
        "100",
        str(status["queued_tokens"]),
        "(5000000)",
        "0",
    ]
    assert glmq.invoke(app, ["tenants", "unset", "clinic"]).exit_code == 0
    [status] = json.loads(glmq.invoke(app, ["tenants", "list", "--json"]).output)
    assert status["settings"] == {}


def test_setting_nothing_or_nonsense_says_what_to_give(glmq: CliRunner) -> None:
    nothing = glmq.invoke(app, ["tenants", "set", "clinic"])
    assert isinstance(nothing.exception, InvalidRequest)
    assert "--weight" in str(nothing.exception)
    nonsense = glmq.invoke(app, ["tenants", "set", "clinic", "--weight", "0"])
    assert isinstance(nonsense.exception, InvalidRequest)
    assert "weight: " in str(nonsense.exception)
