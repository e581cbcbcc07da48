"""Every Redis key and its lifetime, on one page.

All keys of one deployment share the hash tag `{<namespace>}`, so that scripts which touch several of them also run on
Redis Cluster. `R` is a request id.

======================================  =========  ==============================================================
key                                     type       content and lifetime
======================================  =========  ==============================================================
{ns}:request:R                          hash       the request and its state (fields below); while it lives,
                                                   then `retention_seconds`
{ns}:events:R                           stream     its events, id `<token index>-<n>`, one field, `event` (JSON);
                                                   same lifetime
{ns}:queue:<model>                      zset       queued request ids by (priority, age); no expiry
{ns}:leases                             zset       running request ids by the time (ms) at which their lease ends;
                                                   no expiry
{ns}:running:<worker>                   set        request ids that this worker has claimed; no expiry, empty when idle
{ns}:idempotency:<tenant>:<key>         string     `R <digest of the body>`, the key percent-encoded;
                                                   `idempotency_seconds`
{ns}:worker:<worker>                    hash       what a worker says of itself (model, slots, speed,
                                                   adapters); `worker_seconds`, renewed with the leases
{ns}:workers                            zset       worker ids by last sign of life (ms); pruned when read
{ns}:push:<reader>                      channel    events of all requests that this reader process follows: lines of
                                                   R, id of the entry before, id of the entry, event; tabs between
{ns}:control:<worker>                   channel    commands (`contract.control`): `cancel R`, or a verb and JSON
{ns}:replies:<command>                  list       a `Reply` (JSON) of each worker that has got the command;
                                                   `reply_seconds`
======================================  =========  ==============================================================

Fields of a request: `request` (JSON), `digest` (of the body as it was submitted), `state` (queued, running, done, failed, cancelled,
dead), `model`, `tenant`, `priority`, `attempt` (the fencing token), `worker`, `started` (the attempt whose Started is in the stream),
`count` (answer tokens emitted), `last` (id of the stream's last entry), `readers` (comma-separated), `cancel` (1 when asked for),
`retention` (ms), and times in ms on Redis' clock: `submitted`, `claimed` (first), `deadline`, `ended`.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import quote

RETENTION_SECONDS = 600
"""How long a request and its events are kept after its end."""
IDEMPOTENCY_SECONDS = 86_400
WORKER_SECONDS = 10
"""A worker that has not been heard of for so long is not shown any more."""


REPLY_SECONDS = 120
"""How long a reply waits for whoever gave the command."""


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

    @property
    def leases(self) -> str:
        return f"{self.prefix}leases"

    def running(self, worker: str) -> str:
        return f"{self.prefix}running:{worker}"

    def idempotency(self, tenant: str, key: str) -> str:
        return f"{self.prefix}idempotency:{tenant}:{quote(key, safe='')}"

    def worker(self, worker: str) -> str:
        return f"{self.prefix}worker:{worker}"

    @property
    def workers(self) -> str:
        return f"{self.prefix}workers"

    def push(self, reader: str) -> str:
        return f"{self.prefix}push:{reader}"

    def control(self, worker: str) -> str:
        return f"{self.prefix}control:{worker}"

    def replies(self, command_id: str) -> str:
        return f"{self.prefix}replies:{command_id}"

    def celery_queue(self, model: str) -> str:
        """The Celery queue on which tickets for this model travel."""
        return f"{self.namespace}.{model}"
