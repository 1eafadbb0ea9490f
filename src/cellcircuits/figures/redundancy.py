"""Figure 3: the published ratio by order beside that of exactly additive effects, and the redundancy index."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellcircuits.collected import PAIRS, TRIPLETS
from cellcircuits.figures.style import BLACK, BLUE, GREY, ORANGE, VERMILION, Point, chosen, intervals, page, say
from cellcircuits.kept_results import Document, Results, all_triplets

RATIO, INDEX = "a ratio", "b redundancy index"
OBSERVED, ADDITIVE, THEORY = "observed", "exactly additive effects, same cells", "independent and equal effects"
KINDS = {
    "same_pathway": ("one pathway", BLUE, "o"),
    "cross_pathway": ("two pathways", ORANGE, "s"),
    "random": ("random", GREY, "^"),
}
WIDTH = 0.3


def points(results: Results) -> list[Point]:
    """What the figure draws.

    Raises:
        UserError: a result is missing or malformed.
    """
    pairs, triplets = (results.document(folder, "summary.json") for folder in (PAIRS, TRIPLETS))
    listed = [*pairs.parts("per_pair_results"), *pairs.parts("control_pair_results")]
    of_three = all_triplets(triplets)
    found = [*_ratios("2", listed, "pair_id", "ratio_median"), *_ratios("3", of_three, "triplet_id", "threeway_ratio")]
    found += [
        Point(RATIO, THEORY, f"order {order}", order, results.published(f"additive_{kind}_ratio"))
        for order, kind in ((2, "pair"), (3, "triplet"))
    ]
    for order, folder in ((2, PAIRS), (3, TRIPLETS)):
        document = results.maybe(folder, "additivity.json")
        if document is not None:
            found += _indices(order, document)
    return found


def _ratios(order: str, records: Sequence[Document], name: str, key: str) -> list[Point]:
    """Ratio of each combination as it is and as it would be if effects added, side by side."""
    return [
        Point(RATIO, series, f"{record.text(name)}", float(order) + shift, record.maybe(of))
        for record in records
        for series, of, shift in ((OBSERVED, key, -0.14), (ADDITIVE, f"{key}_if_additive", 0.14))
    ]


def _indices(order: int, document: Document) -> list[Point]:
    rows = [row for row in document.parts("combinations") if row.maybe("redundancy_index") is not None]
    kinds = list(KINDS)
    for row in rows:
        if row.text("kind") not in kinds:
            kinds.append(row.text("kind"))
    ranked = sorted(rows, key=lambda row: (kinds.index(row.text("kind")), row.number("redundancy_index")))
    return [
        Point(
            INDEX, row.text("kind"), f"order {order}: {row.text('id')}",
            order - WIDTH + 2 * WIDTH * i / max(1, len(ranked) - 1), row.number("redundancy_index"),
            *row.interval("redundancy_index"),
        )
        for i, row in enumerate(ranked)
    ]  # fmt: skip


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    observed = chosen(drawn, RATIO, OBSERVED)
    n_pairs = sum(p.x < 2.5 for p in observed)
    figure = page(2.9, inputs_name, f"{n_pairs} pairs and {len(observed) - n_pairs} triplets removed together")
    left, right = figure.subplots(1, 2)
    _draw_ratios(left, drawn)
    _draw_indices(right, chosen(drawn, INDEX))
    return figure


def _draw_ratios(axes: Axes, drawn: Sequence[Point]) -> None:
    axes.set(ylabel="joint |d| over the sum of single |d|", title="a  The study's ratio")
    for series, colour, mark in ((OBSERVED, BLUE, "o"), (ADDITIVE, ORANGE, "s")):
        of = [p for p in chosen(drawn, RATIO, series) if p.y is not None]
        jitter = np.random.default_rng(0).uniform(-0.08, 0.08, len(of))
        axes.plot(
            [p.x + j for p, j in zip(of, jitter, strict=True)], [p.y for p in of], mark, color=colour, markersize=2.5,
            alpha=0.6, linestyle="none", label=series,
        )  # fmt: skip
        for order in (2, 3):
            values = [p.y for p in of if round(p.x) == order]
            if values:
                middle = next(p.x for p in of if round(p.x) == order)
                axes.hlines(np.median(values), middle - 0.11, middle + 0.11, color=BLACK, linewidth=1.5, zorder=3)
    theory = chosen(drawn, RATIO, THEORY)
    for i, point in enumerate(theory):
        label = THEORY if i == 0 else None
        axes.hlines(point.y, point.x - 0.32, point.x + 0.32, color=VERMILION, linestyle="--", label=label)
    _orders(axes)
    axes.set_ylim(0, 1.3)
    axes.legend(loc="upper left")


def _draw_indices(axes: Axes, of: Sequence[Point]) -> None:
    axes.set(ylabel="redundancy index", title="b  Size of mean effects, 0 is exactly additive")
    if not of:
        say(axes, "not measured")
        return
    axes.axhline(0, color=BLACK, linewidth=0.6)
    for kind, (name, colour, mark) in KINDS.items():
        seen = [p for p in of if p.series == kind]
        if seen:
            axes.plot(
                [p.x for p in seen],
                [p.y for p in seen],
                mark,
                color=colour,
                markersize=2.5,
                linestyle="none",
                label=name,
            )
            intervals(axes, seen, color=colour, linewidth=0.6, alpha=0.7)
    _orders(axes)
    axes.legend(loc="upper right")


def _orders(axes: Axes) -> None:
    axes.set_xticks([2, 3], ["pairs", "triplets"])
    axes.set_xlim(1.5, 3.5)
