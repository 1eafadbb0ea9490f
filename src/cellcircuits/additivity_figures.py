"""The figure of experiment 2: the study's ratios beside those of additive effects, and what shows redundancy."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cellcircuits.combination_results import KINDS
from cellcircuits.combinations import CROSS, LISTED, RANDOM, SAME

# Okabe and Ito's colours, told apart by the colour-blind; classes differ in their markers as well
OBSERVED, ADDITIVE, MEDIAN = "#0072b2", "#b0b0b0", "#1a1a1a"
CLASSES = {SAME: ("#0072b2", "o"), CROSS: ("#d55e00", "s"), RANDOM: ("#009e73", "D"), LISTED: ("#4d4d4d", "^")}
LEAST = 0.1  # the axis of the index reaches so far at least, so that small departures look small
GAP = 1.5  # between classes, in combinations


@dataclass(frozen=True)
class Column:
    """Combinations drawn above each other: their ratios of |d|, and those if effects added."""

    name: str
    observed: list[float]
    if_additive: list[float]


def combination_figure(summary: Mapping[str, Any], additivity: Mapping[str, Any]) -> Figure:
    """Two panels from `summary.json` and `additivity.json`."""
    order = additivity["order"]
    kind = KINDS[order]
    listed, controls = summary[f"per_{kind}_results"], summary[f"control_{kind}_results"]
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.3))
    ratios_by_order(left, ratio_columns([*listed, *controls] if order == 2 else listed or controls, order))
    indices_by_class(right, additivity)
    n_cells, layer = additivity["n_cells"], additivity["target_layer"]
    figure.suptitle(f"{len(listed) + len(controls)} {kind}s, {n_cells} cells, read at layer {layer}")
    return figure


def ratio_columns(records: Sequence[Mapping[str, Any]], order: int) -> list[Column]:
    """Pairs by how they were chosen; for triplets the pairs inside them, then the triplets."""

    def values(key: str, chosen: Sequence[Mapping[str, Any]] = records) -> list[float]:
        return [r[key] for r in chosen]

    if order == 2:
        groups = {group: [r for r in records if r["pair_type"] == group] for group in values("pair_type")}
        return [
            Column(group.replace("_", " "), *(values(key, chosen) for key in _keys("ratio_median")))
            for group, chosen in groups.items()
        ]
    inside = [[ratio for of_one in values(key) for ratio in of_one.values()] for key in _keys("pairwise_ratios")]
    return [
        Column("order 2\n(pairs inside the triplets)", *inside),
        Column("order 3\n(without the random ones)", *map(values, _keys("threeway_ratio"))),
    ]


def _keys(key: str) -> tuple[str, str]:
    return key, f"{key}_if_additive"


def ratios_by_order(axes: Axes, columns: Sequence[Column]) -> None:
    """Dots of the median ratio of each combination, the additive expectation beside it, joined by a line."""
    for x, column in enumerate(columns):
        for low, high in zip(column.observed, column.if_additive, strict=True):
            axes.plot((x - 0.12, x + 0.12), (low, high), color="0.85", zorder=1)
        _dots(axes, x - 0.12, column.observed, OBSERVED, "o", None if x else "observed")
        label = None if x else "exactly additive effects, same cells"
        _dots(axes, x + 0.12, column.if_additive, ADDITIVE, "s", label)
    axes.set_xticks(range(len(columns)), [column.name for column in columns])
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylabel="joint |d| over the sum of single |d|")
    axes.set_title("a  The study's ratio, and if effects added exactly")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="lower left")


def _dots(axes: Axes, x: float, values: Sequence[float], colour: str, marker: str, label: str | None) -> None:
    if values:
        axes.scatter([x] * len(values), values, color=colour, marker=marker, zorder=2, label=label)
        axes.hlines(np.median(values), x - 0.1, x + 0.1, color=MEDIAN, zorder=3)


def indices_by_class(axes: Axes, additivity: Mapping[str, Any]) -> None:
    """Redundancy index of each combination with its interval, ascending within each class; 0 is exactly additive."""
    axes.axhline(0, color="black", linestyle="--", linewidth=1)
    known = [entry for entry in additivity["combinations"] if entry["redundancy_index"] is not None]
    start, ticks = 0.0, []
    for kind, (colour, marker) in CLASSES.items():
        entries = sorted((e for e in known if e["kind"] == kind), key=lambda entry: entry["redundancy_index"])
        if not entries:
            continue
        places = start + np.arange(len(entries))
        indices = [entry["redundancy_index"] for entry in entries]
        bounded = [(x, e) for x, e in zip(places, entries, strict=True) if e["redundancy_index_low"] is not None]
        for x, entry in bounded:
            axes.vlines(x, entry["redundancy_index_low"], entry["redundancy_index_high"], color=colour, alpha=0.5)
        axes.scatter(places, indices, color=colour, marker=marker, s=18, zorder=2)
        axes.hlines(np.median(indices), places[0] - 0.5, places[-1] + 0.5, color=MEDIAN, zorder=3)
        ticks.append((places.mean(), f"{kind.replace('_', ' ')}\n({len(entries)})"))
        start = places[-1] + 1 + GAP
    axes.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    if not known:
        axes.text(0.5, 0.5, "no index is known", ha="center", transform=axes.transAxes, color="0.4")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, -LEAST), max(high, LEAST))
    axes.set(ylabel="redundancy index, 95% interval over cells")
    axes.set_title("b  Joint mean effect against the sum: 0 is exactly additive")
    for y, va, text in ((0.98, "top", "above 0: joint effect smaller"), (0.02, "bottom", "below 0: larger")):
        axes.text(0.02, y, text, va=va, transform=axes.transAxes, fontsize=8, color="0.3")
    family = additivity["family"]
    axes.set_xlabel(f"interactions found at q < 0.05: {family['n_interactions']:,} of {family['n_tests']:,} tests")
