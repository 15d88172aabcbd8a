"""Figures as SVG for HTML pages, in colors that follow the page's light or dark theme."""

import re
from html import escape
from io import StringIO
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from megagrow.analysis.plots import GREY, GRID_GREY, PLOT_STYLES


class ThemeColor(NamedTuple):
    """CSS variable of a color in both themes."""

    variable: str
    light: str
    dark: str


_DARK_STYLES = ("#F2894B", "#5BB8F0", "#2FCB9C", "#E9A6CD", "#F4BC45", "#9AD3F7", "#E8E6E3")
THEME = (
    ThemeColor("grid", GRID_GREY, "#3A3F45"),
    ThemeColor("muted", GREY, "#A9AEB4"),
    ThemeColor("ink", "#000000", "#E8E6E3"),
    *(
        ThemeColor(f"run{index}", style.color, dark)
        for index, (style, dark) in enumerate(zip(PLOT_STYLES, _DARK_STYLES, strict=True))
        if style.color != "#000000"
    ),
)
"""Colors of the plots."""

_HEAD = re.compile(r"^.*?(?=<svg)", re.DOTALL)
_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_UNUSED_ID = re.compile(r' id="[A-Za-z0-9.]+_\d+"')
_SIZE = re.compile(r'(<svg[^>]*?) width="[^"]*"|(<svg[^>]*?) height="[^"]*"')


def svg_text(figure: Figure, name: str) -> str:
    """Return the SVG document of a figure; `name` makes its references unique in a page."""
    text = StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return text.getvalue()


def inline_svg(svg: str, label: str) -> str:
    """Return an SVG document as an element of a page: in theme colors, as wide as its container.

    `label` describes it for screen readers.
    """
    element = _UNUSED_ID.sub("", _METADATA.sub("", _HEAD.sub("", svg)))
    for _ in range(2):
        element = _SIZE.sub(lambda match: match[1] or match[2], element, count=1)
    for color in THEME:
        element = re.sub(color.light, f"var(--{color.variable})", element, flags=re.IGNORECASE)
    return element.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
