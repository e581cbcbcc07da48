"""The `glmq` command. Errors of ours are one line on stderr and exit code 1; answers go to stdout, everything else to stderr."""

from __future__ import annotations

import sys

import typer

from producer.cli import (
    adapters,
    cancel,
    chat,
    conversations,
    dead,
    doctor,
    evaluate,
    quantize,
    status,
    summarize,
    tenants,
    top,
    up,
    verify,
    worker,
)
from producer.contract import GlmqError

app = typer.Typer(
    name="glmq",
    help="ChatGLM-6B with a LoRA for many users at once: ask, summarize, and run the workers that answer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="The server is REDIS_URL, or the one that `glmq up` started on this machine.",
)

app.command("up", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(up.up)
# Their options are those of programs in the workers package, which have a help of their own.
_PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
app.command("worker", context_settings=_PASSED_ON)(worker.worker)
app.command("verify", context_settings=_PASSED_ON)(verify.verify)
app.command("quantize", context_settings=_PASSED_ON)(quantize.quantize)
app.command("evaluate", context_settings=_PASSED_ON)(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("summarize")(summarize.summarize)
app.command("status")(status.status)
app.command("top")(top.top)
app.command("cancel")(cancel.cancel)
app.command("doctor")(doctor.doctor)
app.add_typer(adapters.app, name="adapters")
app.add_typer(conversations.app, name="conversations")
app.add_typer(dead.app, name="dead")
app.add_typer(tenants.app, name="tenants")


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="glmq")
    except GlmqError as error:
        print(f"glmq: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        # The reader of our output (head, less) is gone: nobody is left to tell.
        sys.stderr.close()
        sys.exit(141)
