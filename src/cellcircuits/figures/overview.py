"""Figure 1: degrees, selective against exhaustive tracing, edges over layers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cellcircuits.claim import resampled
from cellcircuits.collected import BY_LAYER, SELECTIVE, TRACE
from cellcircuits.figures.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    Point,
    chosen,
    intervals,
    page,
    say,
    series_of,
)
from cellcircuits.kept_features import traced_features
from cellcircuits.kept_results import Document, Results

DEGREES, COVERAGE, LAYERS = "a degrees", "b coverage", "c layers"
N_BINS = 30


def points(results: Results) -> list[Point]:
    """What the figure draws.

    Raises:
        UserError: a result is missing or malformed.
    """
    layer = int(results.document(TRACE, "exhaustive_summary.json").number("source_layer"))
    degrees = [feature.degree for feature in traced_features(results)]
    selective = results.document(SELECTIVE, "selective_summary.json").parts("features")
    of_chosen = [int(feature.number("n_edges")) for feature in selective if feature.get("layer") == layer]
    found = [_histogram_bar(*bar) for bar in _bars(degrees)]
    if degrees:
        found.append(Point(DEGREES, "median", "median", float(np.median(degrees))))
    found += [_mean(f"all {len(degrees)}", 0, degrees), _mean(f"{len(of_chosen)} chosen", 1, of_chosen)]
    for name, document in (
        ("all features", results.document(TRACE, BY_LAYER)),
        ("chosen", results.document(SELECTIVE, BY_LAYER)),
    ):
        for source in document.parts("sources"):
            found += _layers(name, source)
    return found


def _bars(degrees: Sequence[int]) -> list[tuple[float, float, int]]:
    if not degrees:
        return []
    counts, ends = np.histogram(degrees, bins=min(N_BINS, max(5, len(degrees) // 6)))
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), counts.tolist(), strict=True))


def _histogram_bar(low: float, high: float, count: int) -> Point:
    return Point(DEGREES, "histogram", "features with degrees low to high", (low + high) / 2, count, low, high)


def _mean(name: str, x: float, degrees: Sequence[int]) -> Point:
    if not degrees:
        return Point(COVERAGE, f"0 edges of {name}", name, x)
    mean, low, high = resampled([degrees], lambda samples: samples[0].mean(axis=-1))
    return Point(COVERAGE, f"{sum(degrees):,} edges in all", name, x, mean, low, high)


def _layers(name: str, source: Document) -> list[Point]:
    series = f"{name} of L{source.number('source_layer'):.0f} ({source.number('n_features'):.0f})"
    return [
        Point(
            LAYERS, series, f"L{of.number('target_layer'):.0f}", of.number("target_layer"), of.maybe("edges_mean"),
            *of.interval("edges_mean"),
        )
        for of in source.parts("layers")
    ]  # fmt: skip


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    n_edges = [point.series.removesuffix(" in all") for point in chosen(drawn, COVERAGE)]
    figure = page(2.5, inputs_name, f"removing features one at a time, {n_edges[0]}")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 0.75, 1.25))
    _draw_degrees(left, drawn)
    _draw_coverage(middle, chosen(drawn, COVERAGE))
    _draw_layers(right, drawn)
    return figure


def _draw_degrees(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(xlabel="edges of a source feature", ylabel="features", title="a  Degrees")
    bars = chosen(drawn, DEGREES, "histogram")
    if not bars:
        say(axes, "no feature was traced")
        return
    axes.bar([b.low for b in bars], [b.y for b in bars], [b.high - b.low for b in bars], align="edge", color=BLUE)
    for median in chosen(drawn, DEGREES, "median"):
        axes.axvline(median.x, color=BLACK, linestyle="--", label=f"median {median.x:g}")
    axes.set_ylim(0, 1.2 * max(b.y for b in bars))  # the legend above the data
    axes.legend(loc="upper right")


def _draw_coverage(axes: Axes, of: Sequence[Point]) -> None:
    axes.set(ylabel="edges per feature", title="b  Selective tracing")
    known = [point for point in of if point.y is not None]
    axes.plot([point.x for point in known], [point.y for point in known], "o", color=BLUE)
    intervals(axes, known, color=BLUE)
    axes.set_xticks([point.x for point in of], [f"{p.name}\n{p.series.replace(' in all', '')}" for p in of])
    axes.tick_params(axis="x", labelsize=6)
    axes.set(xlim=(-0.6, 1.6))
    axes.set_ylim(0, 1.25 * max((point.high or 1 for point in known), default=1))


def _draw_layers(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(xlabel="target layer", ylabel="edges per feature", title="c  Edges over layers")
    looks = [(BLUE, "o-"), (VERMILION, "s--"), (GREEN, "^--"), (PURPLE, "v--"), (ORANGE, "D--"), (SKY, "P--")]
    names = series_of(drawn, LAYERS)
    for i, name in enumerate(names):
        colour, marks = looks[i % len(looks)]
        of = [point for point in chosen(drawn, LAYERS, name) if point.y is not None]
        shift = 0.22 * (i - (len(names) - 1) / 2)  # intervals beside each other
        moved = [Point(p.panel, p.series, p.name, p.x + shift, p.y, p.low, p.high) for p in of]
        axes.plot([p.x for p in moved], [p.y for p in moved], marks, color=colour, label=name)
        intervals(axes, moved, color=colour, linewidth=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    top = axes.get_ylim()[1]
    axes.set_ylim(0, 1.45 * top)
    axes.legend(loc="upper left", ncols=2, columnspacing=0.8, handlelength=1.8)
