"""Curves as inline SVG, which uses the page's font and text colour and refers to no other file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dlkernels.trainer.plots import draw_curves, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK = "#010203"  # a placeholder, replaced by the page's text colour
STYLE: dict[Any, Any] = dict.fromkeys(
    ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK
)
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.color": "#808080"}
STYLE |= {"svg.fonttype": "none", "text.parse_math": False, "font.size": 11.0, "lines.linewidth": 1.8}


def curves_svg(curves: Mapping[str, tuple[list[int], list[float]]], name: str) -> str:
    """Return a chart of lines over epochs as an ``<svg>`` element of flexible width."""
    import matplotlib

    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, (panel,) = new_figure(1, width=5.2, height=3.4)
        draw_curves(panel, curves, "")
        return _inline(figure, name)


def _inline(figure: Figure, name: str) -> str:
    """Return the figure's SVG without prologue, metadata, size, and unused ids."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # matplotlib's style element would apply to the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    tag, rest = text.split(">", 1)
    text = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", tag) + ">" + rest
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r'\sid="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{name} per epoch"', 1).strip()
