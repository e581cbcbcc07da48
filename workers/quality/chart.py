"""The picture of an evaluation: perplexity, agreement and divergence of each form. matplotlib is an extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from workers.quality.evaluation import Measured

SIZE_INCHES: Final = (13.0, 3.8)
DOTS_PER_INCH: Final = 110
COLOURS: Final = ("#5b6b7a", "#e08a3c")
"""Without an adapter, with it."""

_PANELS: Final[tuple[tuple[str, str, Callable[[Measured], float], str], ...]] = (
    ("perplexity", "lower is better", lambda measured: measured.quality.perplexity, "{:.4g}"),
    ("same likeliest token", "% of tokens", lambda measured: 100 * measured.quality.agreement, "{:.1f}"),
    ("divergence", "mean KL, nats", lambda measured: measured.quality.divergence, "{:.2g}"),
)


class NoMatplotlib(ValueError):
    """The picture cannot be drawn here."""


def check_matplotlib() -> None:
    """Raises NoMatplotlib, which says what to install."""
    if importlib.util.find_spec("matplotlib") is None:
        raise NoMatplotlib(
            "matplotlib is not installed: install glmq[evaluate], or say --no-chart for the table alone"
        )


def draw(measured: Sequence[Measured], title: str, path: Path) -> None:
    """Writes the picture, in the format that the path's suffix names."""
    check_matplotlib()
    import matplotlib  # noqa: PLC0415  (an extra)

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=SIZE_INCHES, layout="constrained")
    adapters = list(dict.fromkeys(one.adapter for one in measured))
    for axis, (name, unit, value, text) in zip(axes, _PANELS, strict=True):
        width = 0.8 / len(adapters)
        for index, adapter in enumerate(adapters):
            group = [one for one in measured if one.adapter == adapter]
            shift = (index - (len(adapters) - 1) / 2) * width
            places = [place + shift for place in range(len(group))]
            heights = [value(one) for one in group]
            bars = axis.bar(places, heights, 0.92 * width, color=COLOURS[index % len(COLOURS)])
            axis.bar_label(bars, [text.format(height) for height in heights], fontsize=8, padding=2)
            axis.set_xticks(range(len(group)), [one.form.replace(" ", "\n") for one in group], fontsize=8)
        axis.set_title(name, fontsize=11)
        axis.set_ylabel(unit, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    if len(adapters) > 1:
        labels = [f"with {adapter}" if adapter else "base" for adapter in adapters]
        figure.legend(axes[0].containers, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None} if path.suffix == ".png" else None)
    pyplot.close(figure)
