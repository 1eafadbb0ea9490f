"""The figure of `calibration.json`: how many edges chance makes, where among the degrees, and what tests leave."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from cellcircuits.graph_figures import DATA, LAW, LOGNORMAL, OTHER, say
from cellcircuits.stats import EdgeRule

PLAIN = FuncFormatter(lambda value, _: f"{value:,g}")  # 1,000 for 10^3
BELOW_ZERO = -0.55  # where features without a calibrated degree are drawn, on an axis that is linear up to 1


def calibration_figure(
    title: str,
    content: Mapping[str, Any],
    rule: EdgeRule,
    degrees: NDArray[np.float64],
    calibrated: NDArray[np.float64],
) -> Figure:
    """Three panels.

    Args:
        title: what was traced.
        content: of `calibration.json`.
        rule: the published rule's thresholds.
        degrees: (n_traced,) edges of every feature by that rule.
        calibrated: (n_traced,) calibrated degree, NaN for features active in too few cells.
    """
    figure = Figure(figsize=(17, 5.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    threshold_panel(left, content["sweep"], rule)
    strata_panel(middle, content["published_rule"], content["published_rule_by_degree"])
    degrees_panel(right, degrees, calibrated, content["settings"]["min_cells"])
    figure.suptitle(f"{title}: {summary_of(content)}")
    return figure


def summary_of(content: Mapping[str, Any]) -> str:
    """The figure in a sentence."""
    published, n_edges = content["published_rule"], content["n_edges"]
    if not n_edges:
        return "no edge by the published rule"
    interval = "" if published["fdr_low"] is None else f", {published['fdr_low']:.1%} to {published['fdr_high']:.1%}"
    return (
        f"{n_edges:,} edges by the published rule, {published['expected_null_edges']:,.0f} "
        f"({published['fdr']:.1%}{interval}) expected by chance;\n{content['n_edges_bh']:,} pass a test at a false "
        f"discovery rate of 5%, {content['n_edges_calibrated']:,} of these also by size and sign (calibrated)"
    )


def threshold_panel(axes: Axes, sweep: Sequence[Mapping[str, Any]], rule: EdgeRule) -> None:
    """Edges observed and expected by chance against the threshold of |d|, the shares of chance written between them."""
    axes.set(xlabel="threshold of |d|", ylabel="edges", title="a  Edges observed and expected by chance")
    if not any(row["edges"] for row in sweep):
        say(axes, "no edge at any threshold")
        return
    levels = sorted({row["min_consistency"] for row in sweep})
    nearest = min(levels, key=lambda level: abs(level - rule.min_consistency))
    for level, named in ((nearest, f"sign consistency > {nearest:g}"), (levels[-1], "all cells of one sign")):
        rows = [row for row in sweep if row["min_consistency"] == level]
        d = [row["min_abs_d"] for row in rows]
        style = {"linewidth": 2.2 if level == nearest else 1, "markersize": 6 if level == nearest else 4}
        for key, of_key, colour, form in (
            ("edges", "observed", LOGNORMAL, "o-"), ("expected_null_edges", "expected by chance", LAW, "s--"),
        ):  # fmt: skip
            values = [row[key] or np.nan for row in rows]  # a logarithmic axis has no 0
            axes.plot(d, values, form, color=colour, label=f"{of_key}, {named}", **style)
        if level == nearest:
            _write_shares(axes, rows)
    axes.axvline(rule.min_abs_d, color=OTHER, linewidth=1, zorder=0)
    axes.annotate(
        "the published rule", (rule.min_abs_d, 0.02), xycoords=("data", "axes fraction"), rotation=90, fontsize=8,
        ha="right", va="bottom", color="0.4",
    )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(PLAIN)
    axes.set_xticks(sorted({row["min_abs_d"] for row in sweep}))
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set(xlim=(0.2, 2.4), ylim=(None, 8 * axes.get_ylim()[1]))


def _write_shares(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """The false discovery rate at each threshold, beside the point of the edges expected by chance."""
    for row in rows:
        if row["fdr"] is None:
            continue
        share = f"{row['fdr']:.1%}" if row["fdr"] >= 5e-4 or not row["fdr"] else "under 0.1%"
        place = (row["min_abs_d"], row["expected_null_edges"] or row["edges"])
        shift, aligned = ((6, 3), "left") if row["expected_null_edges"] else ((0, -12), "right")
        axes.annotate(f"FDR {share}", place, xytext=shift, textcoords="offset points", fontsize=8, ha=aligned)


def strata_panel(axes: Axes, whole: Mapping[str, Any], strata: Sequence[Mapping[str, Any]]) -> None:
    """Share of the published rule's edges that chance makes, by degree, with intervals over cells."""
    axes.set(
        xlabel="features by degree (edges of a feature; number of features)",
        ylabel="share of edges expected by chance",
        title="b  Chance edges by degree",
    )
    if not strata:
        say(axes, "no feature has an edge")
        return
    if whole["fdr_low"] is not None:
        axes.axhspan(whole["fdr_low"], whole["fdr_high"], color=OTHER, alpha=0.35, linewidth=0)
    axes.axhline(whole["fdr"], color=DATA, linestyle="--", label=f"all features: {whole['fdr']:.1%}, 95% interval")
    places = np.arange(len(strata))
    for x, stratum in zip(places, strata, strict=True):
        if stratum["fdr_low"] is not None:
            axes.vlines(x, stratum["fdr_low"], stratum["fdr_high"], color=LOGNORMAL, linewidth=2)
    axes.plot(places, [stratum["fdr"] for stratum in strata], "o", color=LOGNORMAL, label="by degree, 95% interval")
    names = [f"{x['min_degree']:,} to {x['max_degree']:,}\n(n {x['n_features']:,})" for x in strata]
    axes.set_xticks(places, names, fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlim=(-0.6, len(strata) - 0.4))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)


def degrees_panel(axes: Axes, degrees: NDArray[np.float64], calibrated: NDArray[np.float64], min_cells: int) -> None:
    """Calibrated against published degree of every feature; those without one lie in a strip below."""
    axes.set(
        xlabel="edges by the published rule", ylabel="calibrated edges", title="c  What tests leave of each feature"
    )
    if not len(degrees):
        say(axes, "no feature was traced")
        return
    is_known = ~np.isnan(calibrated)
    most = float(max(1, degrees.max()))
    axes.set_xscale("symlog", linthresh=1)
    axes.set_yscale("symlog", linthresh=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PLAIN)
    axes.plot([0, most], [0, most], color=DATA, linewidth=1, linestyle="--", label="all edges kept")
    style = {"s": 14, "alpha": 0.5, "linewidth": 0}
    axes.scatter(degrees[is_known], calibrated[is_known], color=LOGNORMAL, label="features", **style)
    if not is_known.all():
        n_few = int((~is_known).sum())
        axes.axhspan(-1, -0.15, color=OTHER, alpha=0.25, linewidth=0)
        axes.scatter(
            degrees[~is_known], np.full(n_few, BELOW_ZERO), color=LAW, marker="x", s=18, linewidth=1,
            label=f"{n_few:,} active in fewer than {min_cells} cells: no calibrated degree",
        )  # fmt: skip
    axes.set(xlim=(-0.3, 1.6 * most), ylim=(-0.3 if is_known.all() else -0.95, 1.6 * most))
    axes.legend(frameon=False, fontsize=8, loc="upper left")
