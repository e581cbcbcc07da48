"""The options of a worker on its command line. What they mean, and their defaults, `settings.py` says."""

from __future__ import annotations

import argparse
from pathlib import Path

from workers.logs import FORMS, LEVELS
from workers.settings import ACTIVATIONS, BACKENDS, CACHE_DTYPES, DTYPES, QUANTIZE, SPECULATION


def parser() -> argparse.ArgumentParser:
    """What is not given is None, so that the environment decides."""
    options = argparse.ArgumentParser(
        prog="glmq worker",
        description="Answers chat and summary requests from the queue with one engine on one device. "
        "SIGTERM or Ctrl-C drains: nothing new is taken, running requests finish within the grace time; "
        "a second one releases them at once.",
        epilog="Each option has an environment variable (GLMQ_CHECKPOINT and so on), which the option overrides. "
        "Redis is found by REDIS_URL, else it is the embedded server that `glmq up` started.",
    )
    options.add_argument("--model", help="name under which requests ask for it (default: GLMQ_MODEL)")
    options.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="its folder (default: the bundled demo)"
    )
    options.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: auto)")
    options.add_argument("--dtype", choices=DTYPES, help="of the computation (default: auto)")
    options.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="linear layers of an fp16 checkpoint to int8, int4 or (GPU) fp8 while loading (faster: glmq quantize, once)",
    )
    options.add_argument(
        "--quantize-head",
        action="store_true",
        default=None,
        help="the head to int8 (with fp8: to fp8) while loading",
    )
    options.add_argument(
        "--activations",
        choices=ACTIVATIONS,
        help="of quantized layers on a CPU: int8 (fast), full (exact); auto: int8",
    )
    options.add_argument(
        "--speculation",
        choices=SPECULATION,
        help="auto: answers that copy from their prompt get several tokens a step, the same ones (default); off: never",
    )
    options.add_argument(
        "--backend",
        choices=BACKENDS,
        help="native, or reference: the checkpoint's own code on transformers, one request at a time",
    )
    options.add_argument(
        "--trust-remote-code",
        action="store_true",
        default=None,
        help="let the reference backend run the Python files of the checkpoint's folder",
    )
    options.add_argument("--slots", type=int, help="requests answered at the same time (default: 64)")
    options.add_argument(
        "--context", type=int, dest="context_len", metavar="TOKENS", help="prompt and answer together"
    )
    options.add_argument("--cache-gib", type=float, metavar="GIB", help="memory for the KV cache")
    options.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="int8: twice the tokens in the KV cache (GPU only)"
    )
    options.add_argument(
        "--adapter",
        action="append",
        dest="adapters",
        metavar="NAME=PATH",
        help="a LoRA adapter (PEFT's folder), loaded at the start, for requests that name it; may be repeated",
    )
    options.add_argument(
        "--adapters-dir",
        type=Path,
        metavar="PATH",
        help="each folder in it is an adapter of that name, loaded when a request first names it",
    )
    options.add_argument(
        "--merge",
        action="store_true",
        default=None,
        dest="merge_adapter",
        help="add the one --adapter to the weights: every request is answered with it",
    )
    options.add_argument(
        "--max-adapters",
        type=int,
        metavar="N",
        help="adapters in memory at the same time; the least recently used one makes room (default: 8)",
    )
    options.add_argument(
        "--max-adapter-rank", type=int, metavar="R", help="refuse adapters of a larger rank (default: 64)"
    )
    options.add_argument(
        "--threads", type=int, dest="num_threads", metavar="N", help="CPU threads of the engine"
    )
    options.add_argument(
        "--grace-seconds",
        type=float,
        metavar="S",
        help="how long a drain waits for running requests (default: 25)",
    )
    options.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="metrics are served at http://GLMQ_METRICS_HOST:PORT/metrics, PORT plus the GPU's index; 0: not at all "
        "(default: from 9750 on the first that is free, on 127.0.0.1)",
    )
    options.add_argument("--log-level", choices=LEVELS, help="default: INFO")
    options.add_argument(
        "--log-format", choices=FORMS, dest="log_form", help="auto: console at a terminal, else json"
    )
    return options
