"""Every Redis key and its lifetime, on one page.

All keys of one deployment share the hash tag `{<namespace>}`, so that scripts which touch several of them also run on
Redis Cluster. `R` is a request id, `C` the name of a conversation (`conversation_name`): its tenant and its id.

======================================  =========  ==============================================================
key                                     type       content and lifetime
======================================  =========  ==============================================================
{ns}:request:R                          hash       the request and its state (fields below); while it lives,
                                                   then `retention_seconds`
{ns}:events:R                           stream     its events, id `<token index>-<n>`, one field, `event` (JSON);
                                                   same lifetime
{ns}:queue:<model>                      zset       queued request ids by (priority, age); no expiry
{ns}:queued:<priority>:<model>|<tenant> zset       those of one tenant and priority by age; no expiry, empty when none is queued
{ns}:shares:<model>                     zset       `<priority>|<tenant>` by (priority, virtual time), for each tenant with something
                                                   queued at that priority that may run; no expiry
{ns}:usage:<model>|<tenant>             hash       what a tenant has here (fields below); an hour after nothing is
{ns}:load:<model>                       hash       what a queue has and how fast it drains (fields below); no expiry
{ns}:deadlines                          zset       queued ids by deadline (ms), where they have one; no expiry
{ns}:promised:<model>                   zset       the line of refused submissions: `<tenant>|<digest>` by the time (ms) of the first
                                                   refusal; a minute. `{ns}:promised:<model>|<tenant>`: at one tenant's bound
{ns}:expected:<model>                   zset       the same by the time (ms) at which each was told to come back; also by tenant
{ns}:tenants                            hash       tenant → `TenantSettings` (JSON); no expiry
{ns}:leases                             zset       running request ids by the time (ms) at which their lease ends;
                                                   no expiry
{ns}:running:<worker>                   set        request ids that this worker has claimed; no expiry, empty when idle
{ns}:idempotency:<tenant>:<key>         string     `R <digest of the body>`, the key percent-encoded;
                                                   `idempotency_seconds`
{ns}:worker:<worker>                    hash       what a worker says of itself (model, slots, speed,
                                                   adapters); `worker_seconds`, renewed with the leases
{ns}:workers                            zset       worker ids by last sign of life (ms); pruned when read
{ns}:conversation:C                     hash       a conversation (fields below); its lifetime, renewed by each turn
{ns}:turns:C                            list       its finished turns, oldest first: `ArchivedTurn` (JSON); same lifetime
{ns}:conversations                      zset       names of conversations by the time (ms) at which they expire (+inf
                                                   while an answer is in progress); pruned when read or written
{ns}:rejected:<model>                   hash       reason → submissions refused at the door or expired in the queue; no expiry
{ns}:dead                               zset       dead letters: ids of requests that were lost at too many attempts, by
                                                   the time (ms); at most 1,000, the oldest make room. Their requests
                                                   and events do not expire before they are dropped
{ns}:push:<reader>                      channel    events of all requests that this reader process follows: lines of
                                                   R, id of the entry before, id of the entry, event; tabs between
{ns}:control:<worker>                   channel    commands (`contract.control`): `cancel R`, `look`, or a verb and JSON
{ns}:replies:<command>                  list       a `Reply` (JSON) of each worker that has got the command;
                                                   `reply_seconds`
======================================  =========  ==============================================================

Fields of a request: `request` (JSON), `digest` (of the body as it was submitted), `state` (queued, running, waiting, done, failed,
cancelled, dead), `model`, `tenant`, `priority`, `attempt` (the fencing token), `worker`, `started` (the attempt whose Started is in the stream),
`count` (answer tokens emitted), `last` (id of the stream's last entry), `readers` (comma-separated), `cancel` (1 when asked for),
`count_before` (tokens when its last attempt began), `failures` (attempts in a row that were lost without a new token), `losses` (JSON: time, attempt,
worker, tokens and what happened, of the last lost attempts), `retention` (ms), `tokens` (that it will take, by estimate), `charged` (those for which its tenant was charged, from its first claim to its end), and times in ms on Redis' clock: `submitted`, `claimed` (first), `deadline`, `ended`. One that belongs to a conversation
also has `conversation` (C), and from its first prompt on `memory` (JSON): what that prompt consists of, so that every attempt builds the same.
A text that is too long for the context is a document: from its first split on it has `levels` (numbers of pieces, comma-separated), `left` (pieces
of the last level that are not done), and of all pieces that are done `pieces`, `piece_prompt_tokens`, `piece_completion_tokens`. Its pieces are requests
`<R>.<level>.<number>` with `document` (R) and, once one has failed, `retried` (the attempt); they are kept as long as it lives, then as long as itself.

Fields of a tenant's usage: `time` (virtual: tokens that it has had, divided by its weight), `used` (tokens), `running`, `queued`, `queued_tokens`, `held` (1 while it has as
much running as it may) and, as of a queue's load: `drained` (tokens of answers that ended while something was queued) in `drained_ms`, both fading within
a minute of such time, `drained_at` (ms: counted up to here). A load also has `tokens:<priority>` (queued), `time` (the virtual time when last nothing was left) and `claims`
(since something aged was looked for).

Fields of a conversation: `id`, `tenant`, `model` (of its last request), `lifetime` (ms), `summary`, `summary_tokens`, `covered` (the summary
stands for so many turns, counted from the first), `context_len` (tokens, of the model that answered last), `busy` (the request that is being
answered), `folding` (the request that makes the next summary), `folded` (the one before), `fold_failures` (since the last success), and times in ms:
`created`, `updated`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

RETENTION_SECONDS = 600
"""How long a request and its events are kept after its end."""
IDEMPOTENCY_SECONDS = 86_400
CONVERSATION_SECONDS = 30 * 86_400
"""How long a conversation is kept after its last turn."""
MAX_ATTEMPTS = 3
"""Attempts in a row that may be lost without a new token; then a request is a dead letter."""
WORKER_SECONDS = 10
"""A worker that has not been heard of for so long is not shown any more."""


REPLY_SECONDS = 120
"""How long a reply waits for whoever gave the command."""


def conversation_name(tenant: str, conversation_id: str) -> str:
    """What a deployment calls a tenant's conversation. Two tenants may use the same id, and neither can reach the other's."""
    return f"{quote(tenant, safe='')}:{quote(conversation_id, safe='')}"


@dataclass(frozen=True, slots=True)
class Keys:
    """Names the keys of one deployment."""

    namespace: str = "glmq"

    @property
    def prefix(self) -> str:
        return f"{{{self.namespace}}}:"

    def request(self, request_id: str) -> str:
        return f"{self.prefix}request:{request_id}"

    def events(self, request_id: str) -> str:
        return f"{self.prefix}events:{request_id}"

    def queue(self, model: str) -> str:
        return f"{self.prefix}queue:{model}"

    def queued(self, model: str, priority: int, tenant: str) -> str:
        return f"{self.prefix}queued:{priority}:{model}|{tenant}"

    def shares(self, model: str) -> str:
        return f"{self.prefix}shares:{model}"

    def usage(self, model: str, tenant: str) -> str:
        return f"{self.prefix}usage:{model}|{tenant}"

    def load(self, model: str) -> str:
        return f"{self.prefix}load:{model}"

    @property
    def deadlines(self) -> str:
        return f"{self.prefix}deadlines"

    def promised(self, model: str) -> str:
        return f"{self.prefix}promised:{model}"

    def expected(self, model: str) -> str:
        return f"{self.prefix}expected:{model}"

    @property
    def tenants(self) -> str:
        return f"{self.prefix}tenants"

    @property
    def leases(self) -> str:
        return f"{self.prefix}leases"

    def running(self, worker: str) -> str:
        return f"{self.prefix}running:{worker}"

    def idempotency(self, tenant: str, key: str) -> str:
        return f"{self.prefix}idempotency:{tenant}:{quote(key, safe='')}"

    def conversation(self, name: str) -> str:
        return f"{self.prefix}conversation:{name}"

    def turns(self, name: str) -> str:
        return f"{self.prefix}turns:{name}"

    @property
    def conversations(self) -> str:
        return f"{self.prefix}conversations"

    def worker(self, worker: str) -> str:
        return f"{self.prefix}worker:{worker}"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    @property
    def dead(self) -> str:
        return f"{self.prefix}dead"

    def push(self, reader: str) -> str:
        return f"{self.prefix}push:{reader}"

    def control(self, worker: str) -> str:
        return f"{self.prefix}control:{worker}"

    def replies(self, command_id: str) -> str:
        return f"{self.prefix}replies:{command_id}"

    def celery_queue(self, model: str) -> str:
        """The Celery queue on which tickets for this model travel."""
        return f"{self.namespace}.{model}"
