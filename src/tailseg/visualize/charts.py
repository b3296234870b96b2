"""Parts that all charts of the pages share: style, a panel, a legend, SVG whose ink is the text colour of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Matplotlib writes this colour, the page replaces it by its own text colour.
INK = "#0a0b0c"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}


@contextmanager
def new_figure(size: tuple[float, float] = (5.4, 3.9)) -> Iterator[tuple[Figure, Axes]]:
    """Lend one panel, narrow enough (inches) that the text stays legible on a phone.

    The style of the charts holds inside the ``with`` block, where the panel is also turned into SVG.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        axes.grid(axis="y", color=INK, alpha=0.15, lw=0.8)
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        yield figure, axes


def add_legend(figure: Figure, axes: Axes, columns: int = 3, marker_scale: float = 1) -> None:
    """Put a legend above the axes, if they have labelled parts."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=columns, markerscale=marker_scale)


def to_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an <svg> element that fits into a page beside others.

    Args:
        figure: what is drawn.
        name: different for each chart of a page; the ids inside begin with it.
        alt: the chart in words, for readers who do not see it.
    """
    name = re.sub(r"[^\w-]", "-", name)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    # Names of elements hold for the whole page, and matplotlib gives those of two figures the same.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))
