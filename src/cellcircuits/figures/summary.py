"""Figure 6: what was traced, what survives and which claims stand, drawn from the numbers."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import FuncFormatter

from cellcircuits.claim import FAILS, HOLDS, OPEN
from cellcircuits.collected import BY_LAYER, TRACE
from cellcircuits.figures.style import BLUE, GREEN, GREY, ORANGE, SKY, VERMILION, Point, chosen, escaped, page
from cellcircuits.kept_results import Results
from cellcircuits.study_claims import CLAIMS
from cellcircuits.wording import count

LAYERS, FUNNEL, VERDICTS = "a layers", "b edges", "c claims"
MARKS = {HOLDS: ("+", GREEN), FAILS: ("\N{MINUS SIGN}", VERMILION), OPEN: ("?", GREY)}
MAX_WIDTH = 7.0  # points


def points(results: Results) -> list[Point]:
    """What the figure draws.

    Raises:
        UserError: a result is missing or malformed.
    """
    source = results.document(TRACE, BY_LAYER).parts("sources")[0]
    calibration = results.document(TRACE, "calibration.json")
    rule = calibration.part("published_rule")
    layer = source.number("source_layer")
    found = [Point(LAYERS, "source", f"L{layer:.0f}", layer)]
    for of in source.parts("layers"):
        layer = of.number("target_layer")
        found.append(Point(LAYERS, "target", f"L{layer:.0f}", layer, of.number("n_calibrated")))
    n = rule.number("observed_edges")
    ends = [None if share is None else share * n for share in rule.interval("fdr")]
    found += [
        Point(FUNNEL, "edges", "by the study's rule", 0, n),
        Point(FUNNEL, "edges", "of these expected by chance", 1, rule.number("expected_null_edges"), *ends),
        Point(FUNNEL, "edges", "at a false discovery rate of 5%", 2, calibration.number("n_edges_bh")),
        Point(FUNNEL, "edges", "calibrated", 3, calibration.number("n_edges_calibrated")),
    ]
    rows = [claim.judged(results) for claim in CLAIMS]
    found += [
        Point(VERDICTS, row["verdict"], row["short"], i, row["estimate"], row["estimate_low"], row["estimate_high"])
        for i, row in enumerate(rows)
    ]
    return found


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    claims = chosen(drawn, VERDICTS)
    counts = [sum(p.series == verdict for p in claims) for verdict in MARKS]
    title = f"of {len(claims)} claims {counts[0]} hold, {counts[1]} do not, {counts[2]} cannot be said here"
    figure = page(3.4, inputs_name, title)
    layers, funnel, verdicts = figure.subplots(1, 3, width_ratios=(0.55, 1, 1.2))
    _draw_layers(layers, chosen(drawn, LAYERS))
    _draw_funnel(funnel, chosen(drawn, FUNNEL))
    _draw_verdicts(verdicts, claims)
    return figure


def _draw_layers(axes: Axes, of: Sequence[Point]) -> None:
    axes.set_title("a  Calibrated")
    axes.axis("off")
    levels = {point.x: i for i, point in enumerate(sorted(of, key=lambda p: p.x))}
    most = max((p.y for p in of if p.y), default=1)
    for point in of:
        level = levels[point.x]
        face, letters = (BLUE, "white") if point.series == "source" else (SKY, "black")
        axes.plot(0, level, "o", color=face, markersize=18)
        axes.text(0, level, point.name, ha="center", va="center", color=letters)
        if point.y:
            width = max(0.4, MAX_WIDTH * point.y / most)
            arrow = FancyArrowPatch(
                (0.3, 0.05), (0.3, level), connectionstyle=f"arc3,rad={0.25 + 0.1 * level}", linewidth=width,
                arrowstyle="-", color=BLUE, alpha=0.35, capstyle="butt",
            )  # fmt: skip
            axes.add_patch(arrow)
            axes.text(-0.42, level, f"{point.y:,.0f}", ha="right", va="center")
    axes.set(xlim=(-1.3, 1.7), ylim=(-0.5, len(levels) - 0.4))


def _draw_funnel(axes: Axes, of: Sequence[Point]) -> None:
    axes.set_title("b  Edges that survive")
    colours = (GREY, ORANGE, SKY, BLUE)
    axes.barh([p.x for p in of], [p.y for p in of], color=colours, height=0.5)
    for point, _ in zip(of, colours, strict=True):
        if point.low is not None:
            axes.hlines(point.x, point.low, point.high, color="black", linewidth=0.8)
        axes.text(0, point.x - 0.32, f"{point.y:,.0f} {escaped(point.name)}", va="bottom", fontsize=6.5)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set(ylim=(3.5, -0.75), xlabel="edges")
    axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value)))


def _draw_verdicts(axes: Axes, of: Sequence[Point]) -> None:
    axes.set_title("c  The study's claims")
    axes.axis("off")
    for point in of:
        mark, colour = MARKS[point.series]
        axes.plot(0.03, point.x, "o", color=colour, markersize=7.5)
        axes.text(0.03, point.x, mark, ha="center", va="center_baseline", color="white", fontweight="bold")
        axes.text(0.08, point.x, escaped(point.name), va="center")
    for x, (verdict, (_, colour)) in zip((0.03, 0.22, 0.53), MARKS.items(), strict=True):
        axes.plot(x, len(of) + 0.2, "o", color=colour, markersize=4)
        axes.text(x + 0.03, len(of) + 0.2, verdict, va="center", fontsize=6.5, color=colour)
    axes.set(xlim=(0, 1), ylim=(len(of) + 0.6, -0.6))
