"""Figure 2: features by rank, the top 20, annotation against rank, degree against frequency."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellcircuits.collected import TRACE
from cellcircuits.figures.style import BLUE, GREY, VERMILION, Point, chosen, intervals, page, say, shortened
from cellcircuits.kept_features import traced_features
from cellcircuits.kept_results import Document, Results

RANK, TOP, SHARE, FREQUENCY = "a rank", "b top", "c annotated share", "d frequency"
ANNOTATED, UNANNOTATED = "annotated", "unannotated"
LOOKS = {ANNOTATED: (BLUE, "o"), UNANNOTATED: (VERMILION, "^")}
SHARE_LOOKS = {
    "annotated": (BLUE, "o"),
    "expected from frequency (model)": (VERMILION, "_"),
    "others that fire as often": (VERMILION, "D"),
}
N_TOP = 20


def points(results: Results) -> list[Point]:
    """What the figure draws.

    Raises:
        UserError: a result is missing or malformed.
    """
    features = traced_features(results)
    layer = int(results.document(TRACE, "exhaustive_summary.json").number("source_layer"))
    statistics = results.document(TRACE, "graph_statistics.json")
    found = []
    for rank, feature in enumerate(features, 1):
        series = ANNOTATED if feature.is_annotated else UNANNOTATED
        name = f"L{layer}/F{feature.index}  {feature.name}"
        found.append(Point(RANK, series, name, rank, feature.degree))
        if rank <= N_TOP:
            found.append(Point(TOP, series, name, rank, feature.degree))
        if feature.frequency is not None:
            found.append(Point(FREQUENCY, series, name, feature.frequency, feature.degree))
    return [*found, *_shares(statistics), *_curve(statistics)]


def _shares(statistics: Document) -> list[Point]:
    """Annotated share of each tenth by degree, highest first, what frequency lets expect, and the top 20."""
    if statistics.get("annotation", "result") is None:
        return []
    result = statistics.part("annotation", "result")
    found = []
    for x, group in enumerate(result.parts("deciles"), 1):
        name = f"tenth {x}"
        low, high = (group.maybe("interval", i) for i in (0, 1))
        found.append(Point(SHARE, "annotated", name, x, group.maybe("annotated_share"), low, high))
        found.append(
            Point(SHARE, "expected from frequency (model)", name, x, group.maybe("expected_share_by_frequency"))
        )
    if result.get("top", "top_20", "result", default=None):
        top = result.part("top", "top_20", "result")
        low, high = (top.maybe("annotated_share_interval", i) for i in (0, 1))
        found.append(Point(SHARE, "annotated", "top 20", -0.2, top.maybe("annotated_share"), low, high))
        low, high = (top.maybe("matched", "expected_range", i) for i in (0, 1))
        expected = top.maybe("matched", "expected_share")
        found.append(Point(SHARE, "others that fire as often", "top 20", 0.2, expected, low, high))
    return found


def _curve(statistics: Document) -> list[Point]:
    """The model of degree on frequency."""
    place = ("drivers", "result", "model", "frequency_curve")
    if not statistics.get(*place, default=None):
        return []
    alone = statistics.number("drivers", "result", "model", "terms", "activation_freq", "deviance_explained_alone")
    series = f"model: explains {100 * alone:.0f}% of the deviance"
    columns = [statistics.numbers(*place, key) for key in ("activation_freq", "mean", "low", "high")]
    return [Point(FREQUENCY, series, "model", *values) for values in zip(*columns, strict=False)]


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    figure = page(5.6, inputs_name, f"the {N_TOP} features with most edges, and how often features fire")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.15, 1))  # long labels above leave no gap below
    rank, top = upper.subplots(1, 2, width_ratios=(1, 1.1))
    share, frequency = lower.subplots(1, 2)
    _draw_rank(rank, drawn)
    _draw_top(top, chosen(drawn, TOP))
    _draw_shares(share, drawn)
    _draw_frequency(frequency, drawn)
    return figure


def _draw_rank(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(xlabel="rank by edges", ylabel="edges", xscale="log", title="a  Edges by rank")
    for name in (UNANNOTATED, ANNOTATED):
        colour, mark = LOOKS[name]
        of = chosen(drawn, RANK, name)
        axes.plot(
            [p.x for p in of], [p.y for p in of], mark, color=colour, markersize=3, label=f"{name} ({len(of)})",
            linestyle="none",
        )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend()


def _draw_top(axes: Axes, of: Sequence[Point]) -> None:
    axes.set(xlabel="edges", title=f"b  Top {len(of)}: label, or (top genes)")
    if not of:
        say(axes, "no feature has an edge")
        return
    axes.barh([p.x for p in of], [p.y for p in of], color=[LOOKS[p.series][0] for p in of])
    axes.set_yticks([p.x for p in of], [shortened(p.name, 44) for p in of], fontsize=6)
    axes.set_ylim(len(of) + 0.6, 0.4)


def _draw_shares(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(ylabel="annotated share", title="c  Annotation by rank", xlabel="top 20, then tenths by edges, most first")
    of = chosen(drawn, SHARE)
    if not of:
        say(axes, "too few annotated features")
        return
    for name, (colour, mark) in SHARE_LOOKS.items():
        known = [p for p in of if p.series == name and p.y is not None]
        if known:
            axes.plot([p.x for p in known], [p.y for p in known], mark, color=colour, label=name, linestyle="none")
            intervals(axes, known, color=colour, linewidth=0.8)
    tenths = sorted({(p.x, p.name.removeprefix("tenth ")) for p in of if p.name.startswith("tenth")})
    axes.set_xticks([0, *(x for x, _ in tenths)], ["top", *(name for _, name in tenths)])
    top = max([p.high or p.y or 0 for p in of] + [0.05])
    axes.set_ylim(-0.03 * top, 1.35 * top)
    axes.legend(loc="upper left")


def _draw_frequency(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(xlabel="activation frequency (share of gene positions)", ylabel="edges", title="d  Edges by frequency")
    of = chosen(drawn, FREQUENCY)
    if not of:
        say(axes, "no activation frequency is known")
        return
    for name in (UNANNOTATED, ANNOTATED):
        colour, mark = LOOKS[name]
        seen = [p for p in of if p.series == name and p.y]
        axes.plot([p.x for p in seen], [p.y for p in seen], mark, color=colour, markersize=2.5, linestyle="none")
    curve = [p for p in of if p.name == "model"]
    if curve:
        axes.plot([p.x for p in curve], [p.y for p in curve], color="black", label=curve[0].series)
        axes.fill_between(
            [p.x for p in curve], [p.low for p in curve], [p.high for p in curve], color=GREY, alpha=0.35, linewidth=0
        )
        axes.legend(loc="upper left")
    axes.set(xscale="log", yscale="log")
