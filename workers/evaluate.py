"""`glmq evaluate`: what int8 and int4 cost a checkpoint, measured on a text, as a table and a picture.

torch is imported only once the options are known to be right.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from workers.models.config import Dtype
    from workers.quality.evaluation import Measured

CHART = Path("quality.png")
MIB = 1 << 20


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m workers.evaluate CHECKPOINT`. Exit code 0, or 2 when something could not be loaded or read."""
    options = _parser().parse_args(argv)
    errors = Console(stderr=True, highlight=False)
    import torch  # noqa: PLC0415

    from workers.engine.loading import find_device  # noqa: PLC0415
    from workers.quality import chart, sample  # noqa: PLC0415
    from workers.quality.evaluation import evaluate  # noqa: PLC0415

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        if options.chart is not None:
            chart.check_matplotlib()
        passages = sample.read_passages(options.text or sample.BUILT_IN)
        device = find_device(options.device)
        dtype: Dtype = options.dtype
        if options.dtype == "auto":
            dtype = "float32" if device.type == "cpu" else "float16"
        with errors.status("reading the sample") as status:
            measured = list(
                evaluate(
                    options.checkpoint,
                    passages,
                    device=device,
                    dtype=dtype,
                    adapter=options.adapter,
                    max_len=options.max_len,
                    max_targets=options.max_tokens,
                    progress=status.update,
                )
            )
        num_targets = measured[0].quality.num_targets
        text = options.text.name if options.text else "the built-in sample"
        title = (
            f"{options.checkpoint.resolve().name} on {num_targets} tokens of {text}, {dtype} on {device.type}"
        )
        Console(highlight=False).print(_table(measured, title))
        if options.chart is not None:
            chart.draw(measured, title, options.chart)
            print(f"The picture is in {options.chart}", file=sys.stderr)
    except (ValueError, OSError) as error:  # CheckpointError, SampleError and the like name what is wrong
        print(f"glmq evaluate: {error}", file=sys.stderr)
        return 2
    return 0


def _table(measured: Sequence[Measured], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("form")
    for column in ("weights", "perplexity", "change", "same token", "mean KL", "KL, 99 %"):
        table.add_column(column, justify="right")
    whole: dict[str | None, float] = {}
    for one in measured:
        quality = one.quality
        base = whole.setdefault(one.adapter, quality.perplexity)
        table.add_row(
            f"{one.form} + {one.adapter}" if one.adapter else one.form,
            f"{one.weight_bytes / MIB:,.1f} MiB",
            f"{quality.perplexity:.4f}",
            f"{100 * (quality.perplexity / base - 1):+.2f} %",
            f"{100 * quality.agreement:.2f} %",
            f"{quality.divergence:.2e}",
            f"{quality.worst_divergence:.2e}",
        )
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="glmq evaluate",
        description="Measures a checkpoint unquantized, in int8, in int4 and, on a GPU that has it, in fp8, with and without an adapter: the perplexity of a "
        "text, how often the likeliest next token is the same as unquantized, and the divergence of the predictions (KL, in "
        "nats). Prints a table and draws it.",
        epilog="The unquantized predictions are kept in memory: for a 6B model and 4096 tokens, 2 GB.",
    )
    parser.add_argument("checkpoint", type=Path, help="its folder, not quantized")
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help='plain text, or .jsonl with lines like {"query": "...", "answer": "..."} (default: a built-in sample in Chinese '
        "and English)",
    )
    parser.add_argument("--adapter", type=Path, metavar="PATH", help="measure a LoRA on each form, too")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", default=CHART, help=f"the picture (default: {CHART})"
    )
    parser.add_argument("--no-chart", dest="chart", action="store_const", const=None, help="the table alone")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float16", "bfloat16", "float32"),
        default="auto",
        help="of the computation (default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument(
        "--max-tokens",
        type=_positive,
        default=4096,
        metavar="N",
        help="measure so many, at most (default: 4096)",
    )
    parser.add_argument(
        "--max-len", type=_positive, default=512, metavar="N", help="tokens of one sequence (default: 512)"
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: all cores)")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return number


if __name__ == "__main__":
    sys.exit(main())
