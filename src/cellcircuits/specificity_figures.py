"""The figure of specificity controls: edges of ablations against those of controls, and how many targets they share."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from cellcircuits.graph_figures import BINOMIAL, DATA, LAW, LOGNORMAL
from cellcircuits.specificity_results import TITLES

# Okabe and Ito's colours, told apart by the colour-blind; each control has its marker as well
COLOURS = dict(zip(TITLES, (LOGNORMAL, BINOMIAL, LAW, "#cc79a7"), strict=True))
MARKERS = dict(zip(TITLES, "osD^", strict=True))
OVERLAP = ("jaccard_mean", "jaccard_low", "jaccard_high", "jaccard_expected")
EXPECTED = "random targets, as many"
LEAST = 0.5  # where no edge is drawn on a logarithmic axis


def specificity_figure(summary: Mapping[str, Any]) -> Figure:
    """Two panels from the content of `specificity.json`, of one feature or more."""
    figure = Figure(figsize=(13.5, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
    names = [name for name in TITLES if name in summary["controls"]]
    edges_panel(left, summary, names)
    overlap_panel(right, summary, names)
    figure.suptitle(
        f"Layer {summary['source_layer']}: {summary['n_features']} features, each removed, and replaced by pushes of "
        f"the same size ({summary['n_draws']} draws)"
    )
    return figure


def edges_panel(axes: Axes, summary: Mapping[str, Any], names: Sequence[str]) -> None:
    """A feature's own edges against the mean edges of each control; on the line both have as many."""
    axes.set(xlabel="edges when the feature is removed", ylabel="edges under the control (mean of its draws)")
    axes.set_title("a  Number of edges")
    rows = summary["features"]
    own = np.maximum([row["n_edges"] for row in rows], LEAST)
    lowest, highest = min([*own, 10.0]), max([1.0, *own])
    for name in names:
        edges = np.array([row["controls"][name]["edges_mean"] for row in rows])
        lowest, highest = min([lowest, *np.maximum(edges, LEAST)]), max([highest, *edges])
        axes.scatter(
            own,
            np.maximum(edges, LEAST),
            s=30,
            marker=MARKERS[name],
            facecolor="none",
            edgecolor=COLOURS[name],
            label=f"{TITLES[name]}: own edges / these {_with_interval(summary['controls'][name], 'edge_ratio')}",
        )
    ends = (0.8 * lowest, 1.4 * highest)
    axes.plot(ends, ends, "--", color=DATA, linewidth=1, label="as many")
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=(ends[0], ends[1] * 6))
    axes.xaxis.set_major_formatter(FuncFormatter(_edges_at))
    axes.yaxis.set_major_formatter(FuncFormatter(_edges_at))
    axes.legend(frameon=False, loc="upper left", fontsize=8.5)


def overlap_panel(axes: Axes, summary: Mapping[str, Any], names: Sequence[str]) -> None:
    """How many targets controls share with the feature's own, beside what random targets would share."""
    axes.set(ylabel="overlap of targets (edges of both / of either)", title="b  The same targets?")
    columns = [(TITLES[name], COLOURS[name], summary["controls"][name], _overlaps(summary, name)) for name in names]
    columns.append(("removals of two\ndifferent features", DATA, summary["real"]["between_features"], np.zeros(0)))
    for x, (_, colour, content, of_features) in enumerate(columns):
        spread = np.linspace(-0.22, 0.22, len(of_features)) if len(of_features) else of_features
        axes.scatter(x + spread, of_features, s=12, color=colour, alpha=0.35, linewidth=0)
        mean, low, high, expected = (content[key] for key in OVERLAP)
        if mean is not None:
            axes.plot(x, mean, "o", color=colour, markersize=9, label=_once(x, "mean, 95% interval (dots: features)"))
        if low is not None:
            axes.vlines(x, low, high, color=colour, linewidth=3)
        if expected is not None:
            axes.hlines(
                expected, x - 0.32, x + 0.32, color="black", linewidth=2, linestyle=":", label=_once(x, EXPECTED)
            )
    axes.set_xticks(range(len(columns)), [title.replace(", ", ",\n") for title, *_ in columns], fontsize=9)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(0, max(0.1, axes.get_ylim()[1]) * 1.15)
    axes.legend(frameon=False, loc="upper right", fontsize=9)


def _overlaps(summary: Mapping[str, Any], name: str) -> NDArray[np.float64]:
    """The overlap of each feature for which it is known, ascending."""
    known = [row["controls"][name]["jaccard_mean"] for row in summary["features"]]
    return np.sort([value for value in known if value is not None])


def _once(x: int, label: str) -> str | None:
    return None if x else label


def _edges_at(value: float, _place: int) -> str:
    return f"{value:g}" if value >= 1 else ""


def _with_interval(content: Mapping[str, Any], name: str) -> str:
    value, low, high = (content[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return "undefined"
    return f"{value:.2f}" if low is None or high is None else f"{value:.2f} ({low:.2f} to {high:.2f})"
