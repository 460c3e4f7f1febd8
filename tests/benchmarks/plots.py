"""Curves as small SVG files that can be read on a dark page and on a light one.

There is no background, and every colour stands out against black and against white by at least 3 to 1. Text stays
text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

INK = "#7a7a7a"
COLOURS = ("#2f7fd1", "#d1642f", "#2f9160", "#a35fc4", "#a88212")
MARKS = "osD^v"


def draw(series: Mapping[str, Any], path: Path) -> None:
    """One line a side over logarithmic axes (steps are linear); the same numbers give the same file.

    Raises:
        ImportError: matplotlib is not installed: pip install 'rtrl[bench]'.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": series["name"],
        "font.size": 10,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(6, 3.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for (side, values), colour, mark in zip(series["values"].items(), COLOURS, MARKS, strict=False):
            axes.plot(series["at"], values, color=colour, marker=mark, markersize=4, linewidth=1.8, label=side)
        axes.set_yscale("log")
        lowest, highest = (f(v for values in series["values"].values() for v in values) for f in (min, max))
        if highest < 10 * lowest:  # a flat line in less than a power of ten has no tick
            middle = (lowest * highest) ** 0.5
            axes.set_ylim(middle / 10, middle * 10)
        if series["over"] != "steps":
            axes.set_xscale("log")
            axes.set_xticks(series["at"], [f"{at:g}" for at in series["at"]])
        axes.minorticks_off()
        axes.set_title(series["title"], fontsize=10)
        axes.set_xlabel(series["over"])
        axes.set_ylabel(series["unit"])
        axes.grid(True, color=INK, alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
