"""The chapters' pictures: shown in a notebook, saved by a script, readable on light and dark."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

GREY = "#808080"
COLOURS = ("#4c8bf5", "#e07b39", "#2f9e6e", "#b15fd3", "#c9a227", "#d9536f")
"""told apart on white and on black, and by most colour-blind readers"""

FOLDER = Path("runs/book")
"""where a script leaves its pictures"""


def style() -> dict[str, Any]:
    """Return matplotlib's settings: mid-grey lines on nothing, no box around the plot."""
    from cycler import cycler

    greys = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    empty = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    return {
        **dict.fromkeys(greys, GREY),
        **dict.fromkeys(empty, "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        "axes.prop_cycle": cycler(color=COLOURS),
        "figure.figsize": (7, 3.5),
        "figure.constrained_layout.use": True,
        "savefig.dpi": 100,
        "svg.fonttype": "none",
    }


def picture(name: str, draw: Callable[[Any], Any]) -> None:
    """Let `draw(plt)` make a figure in the book's style; show it, or save it as runs/book/NAME.png.

    Without matplotlib the chapter goes on without the picture, and says so.
    """
    try:
        import matplotlib
    except ImportError:
        print("(no picture: matplotlib is not installed)")
        return
    notebook = "ipykernel" in sys.modules
    if not notebook:
        matplotlib.use("Agg")  # writes files; opens no window that waits to be closed
    import matplotlib.pyplot as plt

    settings: Any = style()  # matplotlib's own type for them lists all three hundred names
    with plt.rc_context(settings):
        figure = draw(plt)
        if notebook:
            plt.show()
        else:
            FOLDER.mkdir(parents=True, exist_ok=True)
            path = FOLDER / f"{name}.png"
            figure.savefig(path)
            print(f"picture: {path}")
        plt.close(figure)
