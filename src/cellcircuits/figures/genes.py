"""Figure 5: the genes whose logits steering moves most, for the feature of each layer that moves the state most."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from cellcircuits.collected import STEERING
from cellcircuits.figures.style import BLUE, VERMILION, Point, chosen, escaped, page, say, series_of, shortened
from cellcircuits.kept_results import Document, Results
from cellcircuits.steering_claims import largest_dose, steered_features

N_GENES = 8
RISE, FALL = "rises", "falls"


def points(results: Results) -> list[Point]:
    """What the figure draws: one panel a layer, the genes that rise most and those that fall most.

    Raises:
        UserError: a result is missing or malformed.
    """
    strongest: dict[int, Document] = {}
    for feature in steered_features(results):
        layer = int(feature.number("layer"))
        if layer not in strongest or _size(feature) > _size(strongest[layer]):
            strongest[layer] = feature
    found = []
    for layer, feature in sorted(strongest.items()):
        name = f"steering_F{feature.number('feature_idx'):.0f}_L{layer}.json"
        record = results.document(STEERING, name)
        alpha = (record.ascending("alpha_results") or ["none"])[-1]
        closed = "" if feature.number("n_blocks_after") else " (closed form)"
        where = f"L{layer}/F{feature.number('feature_idx'):.0f}{closed}"
        panel = f"{where}  {feature.text('label')}, alpha {float(alpha):g}"
        found += _genes(panel, record.part("alpha_results", alpha))
    return found


def _size(feature: Document) -> float:
    result = largest_dose(feature)
    return 0.0 if result is None else abs(result.number("mean_state_shift"))


def _genes(panel: str, result: Document) -> list[Point]:
    rise, fall = (result.parts(key)[:N_GENES] for key in ("top_upregulated", "top_downregulated"))
    rows = [(RISE, gene) for gene in rise] + [(FALL, gene) for gene in reversed(fall)]
    return [
        Point(panel, series, gene.text("gene"), gene.number("delta"), row) for row, (series, gene) in enumerate(rows)
    ]


def draw(drawn: Sequence[Point], inputs_name: str) -> Figure:
    """The figure of the points."""
    panels = list(dict.fromkeys(point.panel for point in drawn))
    figure = page(3.2, inputs_name, "genes whose mean logit steering moves most")
    axes_of = figure.subplots(1, max(1, len(panels)), squeeze=False)[0]
    if not panels:
        say(axes_of[0], "no feature was steered")
    for axes, panel in zip(axes_of, panels, strict=False):
        for series in series_of(drawn, panel):
            of = chosen(drawn, panel, series)
            axes.barh([p.y for p in of], [p.x for p in of], color=BLUE if series == RISE else VERMILION)
        rows = chosen(drawn, panel)
        axes.set_yticks([p.y for p in rows], [escaped(p.name) for p in rows], fontsize=6)
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_xlabel("change of the mean logit")
        where, _, label = panel.partition("  ")
        axes.set_title(f"{where}\n{shortened(label, 30)}", fontsize=6.5)
        axes.locator_params(axis="x", nbins=4)
        axes.tick_params(axis="x", labelsize=6)
    return figure
