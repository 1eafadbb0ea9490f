"""How the main figures look, and the points that they draw, which are also what stands in the table beside each."""

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.2  # widths in inches
# Okabe and Ito's colours, told apart by the colour-blind
BLACK, ORANGE, SKY, GREEN = "#000000", "#e69f00", "#56b4e9", "#009e73"
BLUE, VERMILION, PURPLE, GREY = "#0072b2", "#d55e00", "#cc79a7", "#8c8c8c"
LABEL_LENGTH = 34
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: the same on every machine
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 7,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "figure.titlesize": 8,
    "figure.constrained_layout.h_pad": 0.06,
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
}


@dataclass(frozen=True)
class Point:
    """Something drawn: which panel and series, a name, where, and its 95% interval; None where there is none."""

    panel: str
    series: str
    name: str
    x: float | None = None
    y: float | None = None
    low: float | None = None
    high: float | None = None


@contextmanager
def styled() -> Iterator[None]:
    """Inside the `with`, figures are made and saved in our style, whatever the user's matplotlibrc says."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def page(height: float, inputs_name: str, title: str) -> Figure:
    """A figure of page width whose title says which inputs it is of."""
    figure = Figure(figsize=(PAGE, height), layout="constrained")
    figure.suptitle(f"{inputs_name}: {escaped(title)}", x=0.01, ha="left")
    return figure


def chosen(points: Sequence[Point], panel: str, series: str | None = None) -> list[Point]:
    """The points of a panel, or of one series in it."""
    return [point for point in points if point.panel == panel and series in (None, point.series)]


def series_of(points: Sequence[Point], panel: str) -> list[str]:
    """Names of the panel's series, in order."""
    return list(dict.fromkeys(point.series for point in points if point.panel == panel))


def intervals(axes: Axes, points: Sequence[Point], *, horizontal: bool = False, **style: Any) -> None:
    """Lines from the low to the high end of every point that has both.

    Args:
        axes: where.
        points: their intervals are of y, or, if `horizontal`, of x.
        horizontal: whether intervals lie along x.
        style: for the lines.
    """
    known = [point for point in points if point.low is not None and point.high is not None]
    lines = axes.hlines if horizontal else axes.vlines
    at = [point.y if horizontal else point.x for point in known]
    lines(at, [point.low for point in known], [point.high for point in known], **style)


def say(axes: Axes, text: str) -> None:
    """Put a remark where there is nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color=GREY, wrap=True)
    axes.set_xticks([])
    axes.set_yticks([])


def shortened(label: str, length: int = LABEL_LENGTH) -> str:
    """A label that fits beside an axis."""
    return escaped(label if len(label) <= length else f"{label[: length - 1]}…")


def escaped(text: str) -> str:
    """A text in which no two dollar signs start a formula."""
    return text.replace("$", r"\$")


def as_csv(points: Sequence[Point], inputs_name: str) -> str:
    """The points as a table, numbers to nine digits."""
    stream = io.StringIO()
    names = [field.name for field in fields(Point)]
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["inputs", *names])
    for point in points:
        writer.writerow([inputs_name, *(_cell(getattr(point, name)) for name in names)])
    return stream.getvalue()


def _cell(value: str | float | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.9g}"
