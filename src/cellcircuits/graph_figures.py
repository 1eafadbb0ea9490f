"""The figure of a graph's statistics: degree distribution, what drives degree, annotation against rank."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellcircuits.degree_table import DegreeTable
from cellcircuits.degree_tail import FORMS

# Okabe and Ito's colours, told apart by the colour-blind; the forms differ in their dashes as well
DATA, LAW, LOGNORMAL, BINOMIAL, OTHER = "#4d4d4d", "#d55e00", "#0072b2", "#009e73", "#b0b0b0"
TOP_SPACING = 1.7  # the groups at the top carry more text than the tenths


def graph_figure(table: DegreeTable, content: Mapping[str, Any]) -> Figure:
    """Three panels from the table and what `graph_statistics` found in it."""
    figure = Figure(figsize=(18, 5.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.5))
    degree_tail_panel(left, table, content)
    frequency_panel(middle, table, content["drivers"])
    annotation_panel(right, content["annotation"])
    figure.suptitle(f"{content['of']}: degrees of {content['degree']['n']:,} features")
    return figure


def degree_tail_panel(axes: Axes, table: DegreeTable, content: Mapping[str, Any]) -> None:
    """Share of features with at least so many edges, with the fitted distributions."""
    axes.set(xlabel="degree (edges of a feature)", ylabel="share of features with at least this degree")
    axes.set_title("a  Degree distribution")
    positive = np.sort(table.degrees[table.degrees > 0])
    if not len(positive):
        say(axes, "no feature has an edge")
        return
    values, first = np.unique(positive, return_index=True)
    share = len(positive) / len(table.degrees)
    axes.loglog(values, share * (1 - first / len(positive)), "o", color=OTHER, markersize=6, label="features")
    axes.set_ylim(0.5 / len(table.degrees), 1.6)
    whole, tail = content["distribution"]["result"], content["tail"]["result"]
    if whole:
        for name, colour, dashes in (("lognormal", LOGNORMAL, "-"), ("negative_binomial", BINOMIAL, "--")):
            label = f"{FORMS[name].removeprefix('a ')}, all degrees"
            _curve(axes, whole["curves"], name, share, {"color": colour, "linestyle": dashes, "label": label})
    if tail:
        law = tail["power_law"]
        label = f"power law from {law['x_min']:,} on: alpha {law['alpha']:.2f}, p {law['p']:.2g}"
        styled = {"color": LAW, "linestyle": "-.", "linewidth": 2.5, "label": label}
        _curve(axes, tail["curves"], "power_law", law["share_of_features"], styled)
        axes.axvline(law["x_min"], color=LAW, linewidth=0.8, linestyle=":")
    axes.legend(frameon=False, loc="lower left", fontsize=9)


def _curve(axes: Axes, curves: Mapping[str, Any], name: str, share: float, style: Mapping[str, Any]) -> None:
    axes.plot(curves["degree"], share * np.array(curves[name]), **style)


def frequency_panel(axes: Axes, table: DegreeTable, drivers: Mapping[str, Any]) -> None:
    """Every feature's degree against how often it fires, and the model of degree on frequency."""
    axes.set(
        xlabel="activation frequency (share of positions)",
        ylabel="degree",
        title="b  Degree against activation frequency",
    )
    known = ~np.isnan(table.frequency)
    if not known.any():
        say(axes, "no activation frequency is known")
        return
    # features without an edge are drawn below 1, where a logarithmic axis has no 0
    axes.scatter(
        table.frequency[known], np.maximum(table.degrees[known], 0.7), s=7, color=DATA, alpha=0.35, linewidth=0
    )
    axes.set(xscale="log", yscale="log")
    result = drivers["result"] or {}
    curve = result.get("model", {}).get("frequency_curve")
    if curve:
        explained = result["model"]["terms"]["activation_freq"]["deviance_explained_alone"]
        label = f"model: frequency explains {100 * explained:.0f}% of the deviance"
        axes.plot(curve["activation_freq"], curve["mean"], color=LAW, linewidth=2.5, label=label)
        axes.fill_between(curve["activation_freq"], curve["low"], curve["high"], color=LAW, alpha=0.25, linewidth=0)
        axes.legend(frameon=False, loc="upper left", fontsize=9)


def annotation_panel(axes: Axes, annotation: Mapping[str, Any]) -> None:
    """Annotated share by tenth of the rank, with what frequency lets expect; the top features at the left."""
    axes.set(ylabel="share of features that are annotated", title="c  Annotation against degree", ylim=(0, 1.3))
    axes.set_yticks(np.linspace(0, 1, 6))
    result = annotation["result"]
    if result is None:
        say(axes, annotation["reason"])
        return
    tops = [top for top in result["top"].values() if top["result"]]
    groups = result["deciles"]
    places = [*(TOP_SPACING * x for x in range(len(tops))), *(TOP_SPACING * len(tops) + x for x in range(len(groups)))]
    for x, top in zip(places, tops, strict=False):
        _matched(axes, x, top["result"]["matched"], is_first=x == 0)
    shares = [(top["result"]["annotated_share"], top["result"]["annotated_share_interval"]) for top in tops]
    shares += [(group["annotated_share"], group["interval"]) for group in groups]
    axes.plot(places, [share for share, _ in shares], "o", color=LOGNORMAL, label="annotated, 95% interval")
    axes.vlines(places, *np.transpose([interval for _, interval in shares]), color=LOGNORMAL)
    expected = [group["expected_share_by_frequency"] for group in groups]
    if None not in expected:
        axes.plot(places[len(tops) :], expected, "--", color=LAW, linewidth=2, label="expected from frequency (model)")
    if tops:
        axes.vlines(places[len(tops)] - 0.8, 0, 1, color=OTHER, linewidth=0.8)
    names = [_top_name(top) for top in tops] + [f"{low:,}\nto {high:,}" for low, high in map(_degrees, groups)]
    axes.set_xticks(places, names, fontsize=8)
    axes.set_xlabel("the top features, then tenths of all features by degree, highest first (their degrees)")
    axes.legend(frameon=False, loc="upper left", fontsize=9, ncols=2)


def _matched(axes: Axes, x: float, matched: Mapping[str, Any], *, is_first: bool) -> None:
    if matched["p"] is not None:
        label = "others of the same frequency, 95% of draws" if is_first else None
        axes.plot(x + 0.25, matched["expected_share"], "D", color=LAW, label=label)
        axes.vlines(x + 0.25, *matched["expected_range"], color=LAW)


def _top_name(top: Mapping[str, Any]) -> str:
    matched = top["result"]["matched"]
    tested = "too few matches" if matched["p"] is None else f"{matched['n_matched']} matched\np {matched['p']:.2g}"
    return f"top {top['k']}\n{tested}"


def _degrees(group: Mapping[str, Any]) -> tuple[int, int]:
    low, high = group["degrees"]
    return low, high


def say(axes: Axes, text: str) -> None:
    """Write why there is nothing to draw."""
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="0.4", wrap=True)
