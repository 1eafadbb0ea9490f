"""Figure 7: what the controls say: chance edges, other pushes of the same size, steering less its controls."""

from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from cellcircuits.collected import SPECIFICITY, STEERING_TESTS, TRACE
from cellcircuits.figures.style import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    VERMILION,
    Point,
    chosen,
    intervals,
    page,
    say,
    series_of,
)
from cellcircuits.kept_results import Document, Results
from cellcircuits.specificity_results import TITLES
from cellcircuits.wording import count, percent

THRESHOLDS, STRATA, OWN, SHARED, STEERED = "a threshold", "b degree", "c edges", "d targets", "e steering"
OBSERVED, EXPECTED, SHARE, RULE = "observed", "expected by chance", "share expected by chance", "the study's rule"
ALL, BY_DEGREE = "all features", "by edges of a feature"
EDGES, EFFECTS = "number of edges", "size of mean effects"
OVERLAP, RANDOM = "shared targets", "random targets, as many"
MEASURED, BEYOND, PRIMARY = "measured", "beyond the direct path", "the declared contrast"
READOUTS = {
    "signature": ("State signature", "difference of cosines"),
    "markers": ("Masked markers", "log probability, late $-$ early"),
    "probe": ("Maturity probe", "log-odds of late"),
}
CONTRASTS = {
    "ON": "features that rise",
    "OFF": "features that fall",
    "ON_minus_OFF": "rising minus falling",
}
CONTROL, LAYER = "frequency_matched", "all"
# how a series is drawn: colour, mark, and how far from its row
LOOKS = {
    EDGES: (BLUE, "o", -0.1),
    EFFECTS: (ORANGE, "s", 0.1),
    OVERLAP: (BLUE, "o", 0.0),
    RANDOM: (VERMILION, "|", 0.0),
    MEASURED: (BLUE, "o", -0.1),
    PRIMARY: (BLACK, "*", -0.1),
    BEYOND: (ORANGE, "s", 0.1),
}
ABSENT = "not measured"


def points(results: Results) -> list[Point]:
    """What the figure draws; rows of c, d and e count downwards.

    Raises:
        UserError: a result is missing or malformed.
    """
    calibration = results.document(TRACE, "calibration.json")
    settings = results.document(TRACE, "manifest.json").part("settings")
    found = [*_thresholds(calibration, settings), *_strata(calibration)]
    specificity = results.maybe(SPECIFICITY, "specificity.json")
    if specificity is not None:
        found += _controls(specificity)
    steering = results.maybe(STEERING_TESTS, "steering_tests.json")
    if steering is not None:
        found += _steering(steering)
    return found


def _thresholds(calibration: Document, settings: Document) -> list[Point]:
    """Edges observed and expected above each |d|, at the consistency of the run's rule or that nearest to it."""
    asked = settings.number("min_consistency")
    rows = calibration.parts("sweep")
    nearest = min((row.number("min_consistency") for row in rows), key=lambda level: abs(level - asked), default=asked)
    found = [Point(THRESHOLDS, RULE, f"|d| > {settings.number('min_abs_d'):g}", settings.number("min_abs_d"))]
    for row in rows:
        if row.number("min_consistency") != nearest:
            continue
        d = row.number("min_abs_d")
        name = f"|d| > {d:g}, consistency > {nearest:g}"
        found += [
            Point(THRESHOLDS, series, name, d, value)
            for series, value in (
                (OBSERVED, row.number("edges")),
                (EXPECTED, row.number("expected_null_edges")),
                (SHARE, row.maybe("fdr")),
            )
        ]
    return found


def _strata(calibration: Document) -> list[Point]:
    rule = calibration.part("published_rule")
    found = [Point(STRATA, ALL, ALL, None, rule.maybe("fdr"), *rule.interval("fdr"))]
    for x, row in enumerate(calibration.parts("published_rule_by_degree")):
        name = f"{row.number('min_degree'):,.0f} to {row.number('max_degree'):,.0f}"
        found.append(Point(STRATA, BY_DEGREE, name, x, row.maybe("fdr"), *row.interval("fdr")))
    return found


def _controls(document: Document) -> list[Point]:
    """Each control a row; `x` with its interval."""
    found = []
    names = [name for name in TITLES if document.get("controls", name, default=None) is not None]
    for y, name in enumerate(names):
        control = document.part("controls", name)
        for panel, series, key in ((OWN, EDGES, "edge_ratio"), (OWN, EFFECTS, "effect_norm_ratio")):
            found.append(Point(panel, series, TITLES[name], control.maybe(key), y, *control.interval(key)))
        low, high = control.interval("jaccard")
        found += [
            Point(SHARED, OVERLAP, TITLES[name], control.maybe("jaccard_mean"), y, low, high),
            Point(SHARED, RANDOM, TITLES[name], control.maybe("jaccard_expected"), y),
        ]
    return found


def _steering(document: Document) -> list[Point]:
    """Contrasts over all layers at the largest dose, less the features that fire as often."""
    primary = document.part("primary")
    dose = primary.part("dose").content
    found = []
    for contrast in (*document.parts("contrasts"), primary):
        place = (contrast.text("layer"), contrast.text("control"), contrast.part("dose").content)
        readout, name = contrast.text("readout"), contrast.text("contrast")
        if place != (LAYER, CONTROL, dose) or readout not in READOUTS or name not in CONTRASTS:
            continue
        y = list(CONTRASTS).index(name)
        series = PRIMARY if contrast is primary else MEASURED
        ends = (contrast.maybe("low"), contrast.maybe("high"))
        panel = f"{STEERED}: {readout}"
        found += [
            Point(panel, series, CONTRASTS[name], contrast.maybe("estimate"), y, *ends),
            Point(panel, BEYOND, CONTRASTS[name], contrast.maybe("excess_estimate"), y, *contrast.interval("excess")),
        ]
    return found


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    figure = page(6.6, inputs_name, "what chance and controls give")
    upper, middle, lower = figure.subfigures(3, 1, height_ratios=(1.15, 1, 0.95))
    left, right = upper.subplots(1, 2)
    _draw_thresholds(left, drawn)
    _draw_strata(right, drawn)
    left, right = middle.subplots(1, 2, sharey=True)
    left.set(title="c  Own edges over those of other pushes", xlabel="removed feature over control, 1: as large")
    right.set(title="d  Targets shared with other pushes", xlabel="Jaccard index")
    _draw_rows(left, chosen(drawn, OWN), 1.0)
    _draw_rows(right, chosen(drawn, SHARED), 0.0)
    right.tick_params(axis="y", labelleft=False)
    right.set_xlim(left=0)
    panels = lower.subplots(1, len(READOUTS), sharey=True)
    for axes, (readout, (title, label)) in zip(panels, READOUTS.items(), strict=True):
        first = readout == next(iter(READOUTS))
        axes.set(title=f"e  Steering: {title.lower()}" if first else title, xlabel=label)
        _draw_rows(axes, chosen(drawn, f"{STEERED}: {readout}"), 0.0, legend=False)
        axes.locator_params(axis="x", nbins=5)
        axes.ticklabel_format(axis="x", scilimits=(-3, 3))
        axes.tick_params(axis="y", labelleft=first)
    _legend_below(lower, panels)
    return figure


def _draw_thresholds(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(xlabel="threshold of |d|", ylabel="edges", title="a  Edges by threshold, and share due to chance")
    observed = chosen(drawn, THRESHOLDS, OBSERVED)
    if not any(p.y for p in observed):
        say(axes, "no edge at any threshold")
        return
    for name, colour, form in ((OBSERVED, BLUE, "o-"), (EXPECTED, VERMILION, "s--")):
        of = [p for p in chosen(drawn, THRESHOLDS, name) if p.y]  # a logarithmic axis has no 0
        axes.plot([p.x for p in of], [p.y for p in of], form, color=colour, label=name)
    edges = {p.x: p.y for p in observed if p.y}
    for p in chosen(drawn, THRESHOLDS, SHARE):
        if p.y is not None and p.x in edges:
            share = "0" if not p.y else percent(p.y) if p.y >= 5e-4 else "<0.05%"
            axes.annotate(
                share, (p.x, edges[p.x]), xytext=(0, 5), textcoords="offset points", fontsize=6.5, ha="center",
                va="bottom",
            )  # fmt: skip
    for p in chosen(drawn, THRESHOLDS, RULE):
        axes.axvline(p.x, color=GREY, linewidth=0.8, linestyle=":", label=f"{RULE}, {p.name}", zorder=0)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value) if value >= 1 else f"{value:g}"))
    axes.set_xticks([p.x for p in observed])
    axes.margins(x=0.08)
    axes.set_ylim(top=60 * axes.get_ylim()[1])  # room for the legend
    axes.legend(loc="upper right")


def _draw_strata(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(
        xlabel="edges of a feature (equal groups)",
        ylabel="share expected by chance",
        title="b  Chance by degree",
    )
    of = [p for p in chosen(drawn, STRATA, BY_DEGREE) if p.y is not None]
    if not of:
        say(axes, "no feature has an edge")
        return
    for whole in chosen(drawn, STRATA, ALL):
        if whole.low is not None:
            axes.axhspan(whole.low, whole.high, color=GREY, alpha=0.3, linewidth=0)
        if whole.y is not None:
            axes.axhline(whole.y, color=BLACK, linestyle="--", linewidth=0.8, label=f"{ALL}, 95% interval")
    axes.plot([p.x for p in of], [p.y for p in of], "o", color=BLUE, label=f"{BY_DEGREE}, 95% intervals")
    intervals(axes, of, color=BLUE)
    axes.set_xticks([p.x for p in of], [p.name for p in of])
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlim(min(p.x for p in of) - 0.5, max(p.x for p in of) + 0.5)
    axes.set_ylim(0, 1.45 * max(p.high or p.y for p in (*of, *chosen(drawn, STRATA, ALL)) if p.y is not None) or 1)
    axes.legend(loc="upper right")


def _draw_rows(axes: Axes, of: Sequence[Point], line: float, *, legend: bool = True) -> None:
    """Values with intervals along x, a row for each name, and a line at what no difference gives."""
    known = [p for p in of if p.x is not None]
    if not known:
        say(axes, ABSENT)
        return
    axes.axvline(line, color=GREY, linewidth=0.8, linestyle="--", zorder=0)
    for name in series_of(known, known[0].panel):
        colour, mark, shift = LOOKS[name]
        moved = [replace(p, y=p.y + shift) for p in known if p.series == name]
        size = {"*": 9, "|": 10}.get(mark, 4)
        axes.plot(
            [p.x for p in moved], [p.y for p in moved], mark, color=colour, label=name, linestyle="none",
            markersize=size, zorder=3,
        )  # fmt: skip
        intervals(axes, moved, horizontal=True, color=colour)
    rows = {p.y: p.name for p in of}
    for y in set(rows) - {p.y for p in known}:
        axes.annotate("too few", (line, y), fontsize=6.5, ha="center", va="center", color=GREY)
    axes.set_yticks(list(rows), list(rows.values()))
    axes.set_ylim(max(rows) + 0.5, -1.1 if legend else -0.5)
    if legend:
        axes.legend(loc="upper right", ncols=2, borderaxespad=0, frameon=True, framealpha=1, edgecolor="none")


def _legend_below(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend for all panels, with what any of them shows."""
    handles = {name: handle for axes in panels for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
