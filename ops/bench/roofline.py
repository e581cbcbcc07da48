"""The picture of what the engine reaches and what memory bandwidth allows, from results.jsonl.

    python ops/bench/roofline.py [roofline.png]

Above, tokens a second over the number of users, each measured point under its roof; below, each case's share of its roof. Of several
measurements of a case the last one counts. Needs matplotlib.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
DECODE = re.compile(r"decode (\w+) head (\w+) kv (\w+) batch (\d+) context (\d+)")
REFERENCE = {1: 28.1, 16: 418.0}
"""The original code in fp16 on transformers 4.30.2, on such a card (2026-11-24)."""
LINES = [
    ("int4", "fp16", "int8", 512, "tab:blue", "o"),
    ("int4", "fp16", "fp16", 512, "tab:green", "s"),
    ("int4", "fp16", "fp16", 256, "tab:olive", "^"),
    ("fp16", "fp16", "fp16", 256, "tab:purple", "D"),
]
"""Weights, head, cache, context, colour, marker."""


def last_results(file: Path) -> dict[str, dict[str, Any]]:
    lines = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    return {line["case"]: line for line in lines}


def main(target: Path) -> None:
    results = last_results(FOLDER / "results.jsonl")
    decodes = {
        match.groups(): result for case, result in results.items() if (match := DECODE.fullmatch(case))
    }
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(8.5, 10), height_ratios=(3, 2), constrained_layout=True
    )
    for weights, head, kv, context, colour, marker in LINES:
        points = sorted(
            (int(batch), one["tokens_per_s"], one["roof"])
            for (w, h, k, batch, c), one in decodes.items()
            if (w, h, k, int(c)) == (weights, head, kv, context)
        )
        batches, speeds, roofs = zip(*points, strict=True)
        label = f"{weights} weights, {kv} cache, context {context}"
        above.plot(batches, speeds, marker=marker, color=colour, label=label)
        above.plot(batches, roofs, linestyle="--", color=colour, linewidth=1)
    above.plot(
        list(REFERENCE), list(REFERENCE.values()), marker="x", color="black", label="the original code, fp16"
    )
    above.set(xscale="log", yscale="log", xlabel="users", ylabel="tokens a second")
    above.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    above.set_title("Decode on one H100, and the roof that memory bandwidth sets (dashed)", fontsize=11)
    above.legend(loc="lower right", fontsize=8)
    above.grid(visible=True, which="both", alpha=0.2)

    shown = sorted(decodes.items(), key=lambda one: one[1]["share"])
    names = [f"{w}, {h} head, {k} cache, {b} x {c}" for (w, h, k, b, c), _ in shown]
    shares = [one["share"] * 100 for _, one in shown]
    below.barh(range(len(shown)), shares, color="tab:blue")
    below.set_yticks(range(len(shown)), names, fontsize=6)
    below.set(xlabel="percent of the roof", xlim=(0, 100))
    below.grid(visible=True, axis="x", alpha=0.3)
    figure.savefig(target, dpi=110)
    print(f"{len(decodes)} cases in {target}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER / "roofline.png")
