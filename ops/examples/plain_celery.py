"""Ask glmq from a service that has nothing but Celery and redis-py (`pip install "celery[redis]"`).

`python plain_celery.py 新冠肺炎怎么预防` sends one task by name and reads one Redis stream. Exit code 1 if there is no answer.
"""

import json
import os
import sys
import uuid

import redis
from celery import Celery

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost:6379/0")
NAMESPACE = os.environ.get("GLMQ_NAMESPACE", "glmq")
MODEL = os.environ.get("GLMQ_MODEL", "chatglm-6b")

app = Celery(broker=REDIS_URL)
# Celery's own keys of this deployment begin so; without it the message goes where no worker looks.
app.conf.broker_transport_options = {"global_keyprefix": f"{NAMESPACE}:"}
# Nobody reads Celery results: the answer comes as a stream.
app.conf.task_ignore_result = True


def ask(query: str) -> str:
    """Send the question; returns the request id, which is the task's. Sent twice, it is answered once."""
    request_id = uuid.uuid4().hex
    app.send_task(
        "glmq.chat",  # or "glmq.summarize" with text, style and max_length
        kwargs={"query": query, "sampling": {"max_new_tokens": 256}},
        task_id=request_id,
        queue=f"{NAMESPACE}.{MODEL}",
    )
    return request_id


def events(request_id: str, after: str = "0"):
    """The request's events as dicts, as they come; the last one is of type finished or failed.

    `after` is the id of the last entry that was read: a reader that was cut off goes on from there.
    """
    server = redis.Redis.from_url(REDIS_URL, decode_responses=True)
    key = f"{{{NAMESPACE}}}:events:{request_id}"
    while True:
        # Shorter than the socket timeout of redis-py (5 s).
        for _, entries in server.xread({key: after}, block=2000) or ():
            for entry_id, fields in entries:
                after = entry_id
                event = json.loads(fields["event"])
                yield event
                if event["type"] in ("finished", "failed"):
                    return


def main(query: str) -> int:
    for event in events(ask(query)):
        if event["type"] == "token":
            print("".join(event["texts"]), end="", flush=True)
        elif event["type"] == "failed":
            print(f"{event['code']}: {event['message']}", file=sys.stderr)
            return 1
        elif event["type"] == "finished":
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:]) or "你好"))
