"""The table of a run: a line for each kind of event."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tests.chaos.strikes import Row

_HEAD: Final = (
    "event",
    "tried",
    "streams hit",
    "lost",
    "doubled",
    "differing",
    "in noise",
    "longest gap",
    "bound",
    "",
)


def print_table(rows: Sequence[Row]) -> None:
    lines = [_HEAD, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    print()
    for line in lines:
        first, *others = zip(line, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip())
    print(flush=True)


def _cells(row: Row) -> tuple[str, ...]:
    if row.skipped:
        return (row.event, *[""] * (len(_HEAD) - 2), f"skipped: {row.skipped}")
    has_bound = row.bound != float("inf")
    return (
        row.event,
        str(row.num_tries),
        str(row.num_streams),
        str(row.num_lost),
        str(row.num_duplicated),
        str(row.num_differing),
        str(row.num_differing - row.num_beyond_noise),
        f"{row.longest_gap:.2f} s" if row.gaps else "-",
        f"{row.bound:.2f} s" if has_bound else "-",
        "ok" if row.is_right else "BROKEN",
    )
