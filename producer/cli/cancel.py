"""`glmq cancel`."""

from __future__ import annotations

from typing import Annotated

import typer

from producer.client import Client


def cancel(request_id: Annotated[str, typer.Argument(help="As printed by submit, logs and status.")]) -> None:
    """Cancel a request, queued or running. What it answered so far stays readable."""
    with Client() as client:
        state = client.cancel(request_id)
    print(
        f"{request_id} was {state}"
        + ("; it is cancelled" if state in ("queued", "running", "waiting") else ": nothing to cancel")
    )
