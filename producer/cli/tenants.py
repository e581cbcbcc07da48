"""`glmq tenants`: what each tenant has running and waiting; its weight and its limits."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from producer.client import Client
from producer.contract import InvalidRequest
from producer.contract.tenants import TenantSettings
from producer.settings import Settings
from producer.tenants import Tenants, TenantStatus

app = typer.Typer(
    help="Tenants: their shares of the tokens, and what each may have running and waiting.",
    no_args_is_help=True,
)

Name = Annotated[str, typer.Argument(help="As requests name it: `tenant`.")]
Model = Annotated[
    str | None, typer.Option(help="Whose queue to look at. Default: the deployment's (GLMQ_MODEL).")
]


@app.command("list")
def list_tenants(
    model: Model = None, as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False
) -> None:
    """Show the tenants of the last hour and those for which something is set.

    In brackets: the default, where nothing is set. A star: as much is running as may.
    """
    settings = Settings.from_environ()
    with Client(settings) as client:
        tenants = Tenants(client, model).list()
    if as_json:
        print(json.dumps([_as_json(tenant) for tenant in tenants]))
        return
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in (
        "tenant",
        "weight",
        "running",
        "of",
        "queued",
        "of",
        "tokens queued",
        "of",
        "tokens used",
    ):
        table.add_column(heading, justify="left" if heading == "tenant" else "right")
    for tenant in tenants:
        own = tenant.settings
        table.add_row(
            tenant.tenant,
            _limit(own.weight, 1),
            f"{tenant.num_running}{'*' if tenant.is_held else ''}",
            _limit(own.max_running, settings.order.tenant_max_running),
            str(tenant.num_queued),
            _limit(own.max_queued, settings.bounds.tenant_max_queued),
            str(tenant.num_queued_tokens),
            _limit(own.max_queued_tokens, settings.bounds.tenant_max_queued_tokens),
            str(tenant.num_used_tokens),
        )
    Console(highlight=False, soft_wrap=True).print(table)


@app.command("set")
def set_tenant(
    name: Name,
    weight: Annotated[
        float | None, typer.Option(help="Of its share of the tokens: 3 is three times what 1 gets.")
    ] = None,
    max_running: Annotated[
        int | None, typer.Option(help="Requests that may run at a time, of each model; 0: no limit.")
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(help="Requests that may wait, of each model; 0: no bound.")
    ] = None,
    max_queued_tokens: Annotated[
        int | None, typer.Option(help="Their tokens, by estimate; 0: no bound.")
    ] = None,
) -> None:
    """Change what is given, and leave the rest. It counts at once, also for what waits.

    glmq tenants set clinic --weight 3 --max-running 8
    """
    given = {
        "weight": weight,
        "max_running": max_running,
        "max_queued": max_queued,
        "max_queued_tokens": max_queued_tokens,
    }
    if all(value is None for value in given.values()):
        raise InvalidRequest(
            "tenant",
            "nothing is to be changed",
            "Give --weight, --max-running, --max-queued or --max-queued-tokens.",
        )
    with Client() as client:
        now = Tenants(client).set(name, TenantSettings.of(**given))
    told = ", ".join(f"{field} {value:g}" for field, value in now.model_dump(exclude_none=True).items())
    print(f"{name}: {told}")


@app.command("unset")
def unset_tenant(name: Name) -> None:
    """Treat a tenant like all for which nothing is set."""
    with Client() as client:
        Tenants(client).unset(name)
    print(f"{name}: as every other tenant")


def _limit(own: float | None, default: float) -> str:
    value = default if own is None else own
    text = "no limit" if value == 0 else f"{value:g}" if value < 1e6 else str(round(value))
    return f"({text})" if own is None else text


def _as_json(tenant: TenantStatus) -> dict[str, object]:
    return {
        "tenant": tenant.tenant,
        "settings": tenant.settings.model_dump(exclude_none=True),
        "running": tenant.num_running,
        "queued": tenant.num_queued,
        "queued_tokens": tenant.num_queued_tokens,
        "used_tokens": tenant.num_used_tokens,
        "is_held": tenant.is_held,
    }
