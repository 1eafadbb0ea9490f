"""The figure of controlled steering: per readout and layer, features' effects beside those of their controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Okabe and Ito's colours, told apart by the colour-blind; the kinds differ in their markers as well
STYLES = {
    "feature": ("the feature", "o", "#d55e00"),
    "frequency_matched": ("features of like frequency", "s", "#0072b2"),
    "random_feature": ("random features", "^", "#009e73"),
    "random_direction": ("random directions", "x", "#7f7f7f"),
}
READOUTS = {
    "signature": "shift of the state signature\n(difference of cosines)",
    "markers": "masked-gene log probability,\nlate minus early markers (nats)",
    "probe": "log-odds of late\nof the maturity probe",
}
KINDS = ("ON", "OFF")
OFFSETS = dict(zip(STYLES, (-0.27, -0.09, 0.09, 0.27), strict=True))


def controlled_figure(tests: Mapping[str, Any]) -> Figure:
    """A row per readout, a column per layer, at the dose of the primary test; above 0 is towards late cells.

    Args:
        tests: content of `steering_tests.json`.
    """
    asked = tests["primary"]["dose"]
    features = [f for f in tests["features"] if _is_dose(f["dose"], asked)]
    layers = list(tests["layers"])
    figure = Figure(figsize=(3.6 + 3.3 * len(layers), 10.6), layout="constrained")
    grid = figure.subplots(len(READOUTS), len(layers), squeeze=False, sharex="col")
    for row, (readout, name) in zip(grid, READOUTS.items(), strict=True):
        for axes, layer in zip(row, layers, strict=True):
            chosen = _ordered([f for f in features if str(f["layer"]) == layer])
            readout_panel(axes, chosen, readout)
            if readout == next(iter(READOUTS)):
                axes.set_title(_layer_title(layer, tests["layers"][layer]))
        row[0].set_ylabel(name)
    for axes in grid[-1]:
        axes.set_xlabel("feature")
    handles = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=name)
        for name, marker, colour in STYLES.values()
    ]
    handles.append(Line2D([], [], color="black", linestyle=":", label="direct path alone (linear)"))
    handles.append(Line2D([], [], color="0.3", linewidth=1.2, marker="|", label="95% over cells"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(_title(tests))
    return figure


def _is_dose(dose: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    return dose["alpha"] == asked["alpha"] and (asked["norm"] is None or dose["norm"] == asked["norm"])


def _ordered(features: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """ON features by falling d, then OFF by rising d."""
    rank = {kind: number for number, kind in enumerate(KINDS)}
    return sorted(features, key=lambda f: (rank.get(f["kind"], len(KINDS)), -abs(f["switch_d"] or 0), f["feature_idx"]))


def _layer_title(layer: str, facts: Mapping[str, Any]) -> str:
    if facts["analytic"]:
        return f"layer {layer}: closed form\n(no block after it, not tested)"
    return f"layer {layer}\n({facts['n_blocks_after']} blocks after it)"


def _title(tests: Mapping[str, Any]) -> str:
    primary, halves = tests["primary"], tests["halves"]
    dose = primary["dose"]
    size = f"alpha {dose['alpha']:g}" if dose["norm"] is None else f"{dose['norm']:g} of the stream's norm"
    found = "no primary test" if primary["p"] is None else (
        f"primary test, probe: ON minus OFF features, each less features of like frequency: {primary['estimate']:+.2g} "
        f"({primary['low']:+.2g} to {primary['high']:+.2g}), p = {primary['p']:.2g}"
    )  # fmt: skip
    return (
        f"Features amplified by {size} in {halves['n_steered']} early cells that did not choose them; "
        f"above 0 is towards late cells\n{found}"
    )


def readout_panel(axes: Axes, features: Sequence[Mapping[str, Any]], readout: str) -> None:
    """Means over cells with 95% intervals of each feature and its controls, and the direct path as a dotted line."""
    axes.axhline(0, color="0.4", linewidth=0.8)
    n_shown = 0
    for x, feature in enumerate(features):
        found = feature["readouts"][readout]
        for kind, (_, marker, colour) in STYLES.items():
            shown = found if kind == "feature" else found["controls"][kind]
            if shown["mean"] is None:
                continue
            n_shown += 1
            at = x + OFFSETS[kind]
            axes.plot(at, shown["mean"], marker, color=colour, markersize=5)
            if shown["low"] is not None:
                axes.vlines(at, shown["low"], shown["high"], color=colour, linewidth=1.2)
        if found["linear_prediction"] is not None and not feature["analytic"]:
            axes.hlines(found["linear_prediction"], x - 0.4, x + 0.4, color="black", linestyle=":", linewidth=1)
    n_on = sum(feature["kind"] == "ON" for feature in features)
    if 0 < n_on < len(features):
        axes.axvline(n_on - 0.5, color="0.8", linewidth=0.8)
    for kind, place in zip(KINDS, ((n_on - 1) / 2, (n_on + len(features) - 1) / 2), strict=True):
        if any(feature["kind"] == kind for feature in features):
            axes.annotate(kind, (place, 0.97), xycoords=("data", "axes fraction"), ha="center", va="top", color="0.3")
    axes.set_xticks(np.arange(len(features)), [f"F{feature['feature_idx']}" for feature in features], rotation=90)
    axes.set_xlim(-0.6, max(0, len(features) - 1) + 0.6)
    axes.margins(y=0.15)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    if not n_shown:
        axes.annotate("measured in no cell", (0.5, 0.5), xycoords="axes fraction", ha="center", color="0.5")
