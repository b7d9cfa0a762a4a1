"""Charts as inline SVG, which uses the page's font and text colour and refers to no other file."""

from __future__ import annotations

import io
import re
from typing import Any

from dlkernels.trainer.plots import Curves, draw_curves, new_figure

INK = "#010203"  # a placeholder, replaced by the page's text colour
STYLE: dict[Any, Any] = dict.fromkeys(
    ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK
)
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "grid.color": "#808080"}
STYLE |= {"svg.fonttype": "none", "text.parse_math": False, "font.size": 11.0, "lines.linewidth": 1.8}
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def chart(name: str, curves: Curves) -> dict[str, Any]:
    """The values of a chart in ``templates/macros.html``: its name, and lines over epochs as an ``<svg>`` element."""
    import matplotlib
    from markupsafe import Markup

    file = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure, (panel,) = new_figure(1, width=5.2, height=3.4)
        draw_curves(panel, curves, "")
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    svg = file.getvalue()
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'\sid="[\w.]+_\d+"', "", svg)  # unused, and the same in every chart
    svg = svg.replace("xlink:href", "href").replace(INK, "currentColor")
    return {"name": name, "svg": Markup(svg.replace("<svg", '<svg role="img"', 1))}
