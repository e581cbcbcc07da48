"""`glmq quantize`: an fp16 checkpoint to one with int8 or int4 weights, with what it costs as a table.

Exit code 0 when the new checkpoint is there, 1 when it is not. torch is imported only to quantize.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from workers.models.config import CheckpointError

if TYPE_CHECKING:
    from workers.models.quantized_checkpoint import Report


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m workers.quantize SRC DST --bits 4`."""
    options = _parser().parse_args(argv)
    # Imported after the options are known to be right: it takes seconds.
    import torch  # noqa: PLC0415

    from workers.models.quantized_checkpoint import write_quantized  # noqa: PLC0415

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    started = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(f"quantizing to int{options.bits}", total=None)
            report = write_quantized(
                options.source,
                options.target,
                options.bits,
                adapter=options.adapter,
                head_bits=8 if options.head == "int8" else None,
                on_progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except CheckpointError as error:
        print(f"glmq quantize: {error}", file=sys.stderr)
        return 1
    _print(report, options.target, time.monotonic() - started)
    return 0


def _print(report: Report, target: Path, seconds: float) -> None:
    console = Console(highlight=False)
    table = Table(title=str(target), title_justify="left")
    for column in ("layers", "weights", "number", "error", "largest", "clamped rows"):
        table.add_column(column, justify="left" if column == "layers" else "right", no_wrap=True)
    for name, errors in sorted(report.errors.items()):
        table.add_row(
            name,
            f"int{errors.bits}",
            str(errors.num_layers),
            f"{errors.relative:.2%}",
            f"{errors.largest:.3g}",
            str(errors.num_clamped_rows),
        )
    console.print(table)
    before, after = report.source_bytes, report.target_bytes
    console.print(f"{decimal(before)} to {decimal(after)} ({after / before:.0%}) in {seconds:.0f} s.")
    if any(errors.num_clamped_rows for errors in report.errors.values()):
        console.print(
            "Clamped rows have weights so small that the original's own quantization overflows or divides by zero there; "
            "they differ from what it would write."
        )
    console.print(f"Serve it: glmq worker --checkpoint {target}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmq quantize",
        description="Writes a checkpoint whose linear layers have int8 or int4 weights with one fp16 scale a row, bit for bit "
        "those of the original's quantize(). It loads in seconds, by memory map, and takes a half or a quarter of the memory.",
        epilog="The table: the root mean square of the weights' errors over that of the weights, and the largest one. One tensor is in memory at a time: a 12 GB checkpoint needs less than 4 GB.",
    )
    parser.add_argument("source", type=Path, metavar="SRC", help="the folder of the fp16 checkpoint")
    parser.add_argument("target", type=Path, metavar="DST", help="the folder to write; it must not exist")
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True, help="of each weight")
    parser.add_argument(
        "--adapter", type=Path, metavar="PATH", help="merge this LoRA (PEFT's folder) into the weights first"
    )
    parser.add_argument(
        "--head",
        choices=("fp16", "int8"),
        default="fp16",
        help="the layer that gives the logits, and an embedding that shares its weights (default: fp16, as the original)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
