"""`glmq verify`: our reading of a checkpoint beside what the checkpoint's own code makes of it, as a table.

Exit code 0 when they agree, 1 when they do not, 2 when one of the two cannot be run. torch is imported only to compare.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

DTYPES = ("auto", "float16", "bfloat16", "float32")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m workers.verify CHECKPOINT --trust-remote-code`."""
    options = _parser().parse_args(argv)
    if not options.trust_remote_code:
        print(
            f"glmq verify: it runs the Python files in {options.reference or options.checkpoint} with all your rights. "
            "Read them, then say --trust-remote-code.",
            file=sys.stderr,
        )
        return 2
    console = Console(highlight=False)
    errors = Console(stderr=True, highlight=False)
    # Imported after the options are known to be right: it takes seconds.
    import torch  # noqa: PLC0415

    from workers.engine.loading import find_device  # noqa: PLC0415
    from workers.models.loader import DTYPES as TORCH_DTYPES  # noqa: PLC0415
    from workers.reference.comparison import compare  # noqa: PLC0415

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    try:
        device = find_device(options.device)
        dtype = options.dtype
        if dtype == "auto":
            dtype = "float32" if device.type == "cpu" else "float16"
        with errors.status("loading the checkpoint with its own code") as status:
            for comparison in compare(
                options.checkpoint,
                reference_folder=options.reference,
                device=device,
                dtype=TORCH_DTYPES[dtype],
                max_new_tokens=options.max_new_tokens,
                tolerance=options.tolerance,
                adapter=options.adapter,
            ):
                rows.append(comparison)
                status.update(f"compared: {comparison.what}")
    except ValueError as error:  # a CheckpointError, or a setting
        print(f"glmq verify: {error}", file=sys.stderr)
        return 2
    table = Table(title=f"{options.checkpoint} in {dtype} on {device}", title_justify="left")
    for column in ("what", "compared", "worst difference", "verdict"):
        table.add_column(column, overflow="fold")
    for row in rows:
        verdict = row.verdict or ("equal" if row.is_equal else "DIFFERENT")
        style = "" if row.is_equal else "bold red"
        table.add_row(row.what, row.compared, row.worst, verdict, style=style)
    console.print(table)
    num_different = sum(not row.is_equal for row in rows)
    print(
        "Both say the same." if not num_different else f"{num_different} of {len(rows)} comparisons differ."
    )
    return int(bool(num_different))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmq verify",
        description="Compares this project's reading of a checkpoint (tokenizer, prompts, logits, greedy answers) with what "
        "the Python code in the checkpoint's own folder says, and prints a table. Exit code 0: they agree; 1: they differ; "
        "2: one of the two could not be run.",
        epilog="The code runs on transformers 4.30.2 (the extra glmq[reference], Python 3.11). On a CPU both compute in "
        "float32: a 6B model needs 26 GB of memory.",
    )
    parser.add_argument("checkpoint", type=Path, help="its folder, with the original's .py files in it")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="the code in the folder may run (needed)"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="PATH",
        help="hold the checkpoint against the code and the weights in this folder instead, such as what it was made of",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        metavar="PATH",
        help="compare the logits with this LoRA, too (PEFT's and ours)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of both (default: float32 on a CPU, float16 on a GPU)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=32,
        metavar="N",
        help="tokens of each greedy answer (default: 32)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument(
        "--tolerance", type=float, metavar="X", help="logits may differ by so much (default: by dtype)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
