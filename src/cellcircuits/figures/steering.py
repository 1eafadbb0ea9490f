"""Figure 4: where steering moves early cells, per feature, layer and alpha, with intervals."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellcircuits.claim import proportion_interval
from cellcircuits.collected import STEERING
from cellcircuits.figures.style import (  # fmt: skip
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    VERMILION,
    Point,
    chosen,
    intervals,
    page,
    say,
    series_of,
    shortened,
)
from cellcircuits.kept_results import Document, Results

SHARE, SHIFT = "a share of cells", "b mean shift"
LOOKS = [("o", BLUE), ("s", VERMILION), ("^", GREEN), ("D", ORANGE)]
ROW = 0.17  # inches
MAX_CELLS = 10**9


def points(results: Results) -> list[Point]:
    """What the figure draws; rows count downwards, layers apart by half a row.

    Raises:
        UserError: a result is missing or malformed.
    """
    features = results.document(STEERING, "summary.json").parts("features")
    ordered = sorted(features, key=lambda f: (f.number("layer"), -(f.maybe("switch_d") or 0), f.number("feature_idx")))
    found, row, last = [], 0.0, None
    for feature in ordered:
        layer = feature.number("layer")
        row += 1.0 if last in (None, layer) else 1.6
        last = layer
        for alpha in feature.ascending("alpha_results"):
            found += _of(feature, alpha, row)
    return found


def _of(feature: Document, alpha: str, row: float) -> list[Point]:
    result = feature.part("alpha_results", alpha)
    n = int(result.within(0, MAX_CELLS, "n_cells_steered"))
    name, series = _name(feature), f"alpha {float(alpha):g}"
    if not n:
        return [Point(SHARE, series, name, None, row), Point(SHIFT, series, name, None, row)]
    share, mean = result.within(0, 1, "frac_positive_shift"), result.number("mean_state_shift")
    half = _half_width(result.maybe("std_state_shift"), n)
    return [
        Point(SHARE, series, name, share, row, *proportion_interval(round(share * n), n)),
        Point(SHIFT, series, name, mean, row, *((None, None) if half is None else (mean - half, mean + half))),
    ]


def _half_width(sd: float | None, n: int) -> float | None:
    """Half of the mean's 95% interval by Student's t."""
    from scipy.stats import t

    return None if sd is None or n < 2 else float(t.ppf(0.975, n - 1) * sd / n**0.5)


def _name(feature: Document) -> str:
    d = feature.maybe("switch_d")
    along = "" if d is None else " rises" if d > 0 else " falls"
    closed = "" if feature.number("n_blocks_after") else " (closed form)"
    where = f"L{feature.number('layer'):.0f}/F{feature.number('feature_idx'):.0f}"
    return f"{where}{along}{closed}  {feature.text('label')}"


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    rows = {p.y: p.name for p in drawn}
    height = 1.1 + ROW * max(5.0, max(rows, default=0.0))
    figure = page(height, inputs_name, f"{len(rows)} features amplified in early cells")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_panel(left, drawn, SHARE)
    _draw_panel(right, drawn, SHIFT)
    left.set(xlabel="share of cells moved towards late", xlim=(-0.03, 1.03), title="a  Cells (95% Wilson)")
    left.axvline(0.5, color=GREY, linewidth=0.6, linestyle="--")
    right.set(xlabel="mean state shift (difference of cosines)", title="b  Mean shift (95% over cells)")
    right.axvline(0, color=GREY, linewidth=0.6, linestyle="--")
    shifts = [abs(p.x) for p in chosen(drawn, SHIFT) if p.x]
    if shifts:
        right.set_xscale("symlog", linthresh=float(10 ** np.floor(np.log10(np.median(shifts)))))
        right.tick_params(axis="x", labelrotation=45)
        right.margins(x=0.06)
    left.set_yticks(list(rows), [shortened(name, 48) for name in rows.values()], fontsize=6)
    left.set_ylim(max(rows, default=1.0) + 0.8, 0.2)
    right.tick_params(axis="y", labelleft=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper right", ncols=len(LOOKS))
    return figure


def _draw_panel(axes: Axes, drawn: Sequence[Point], panel: str) -> None:
    names = series_of(drawn, panel)
    if not names:
        say(axes, "no feature was steered")
    for i, name in enumerate(names):
        mark, colour = LOOKS[i % len(LOOKS)]
        shift = 0.22 * (i - (len(names) - 1) / 2)
        of = [p for p in chosen(drawn, panel, name) if p.x is not None]
        moved = [replace(p, y=p.y + shift) for p in of]
        axes.plot([p.x for p in moved], [p.y for p in moved], mark, color=colour, markersize=2.5, label=name)
        intervals(axes, moved, horizontal=True, color=colour, linewidth=0.8)
    for p in chosen(drawn, panel, names[0] if names else None):
        if p.x is None:
            axes.annotate("active in no early cell", (0, p.y), fontsize=6, color=BLACK, va="center")
