"""Draw what an output folder holds; its manifest says which experiment that is. With --results, the main figures.

    python src/make_figures.py --out-dir results/layer5
    python src/make_figures.py --results results --out-dir paper/figures

- exhaustive_feature_tracing: exhaustive_tracing.png (degree distribution, edges per layer, top hubs) and
  calibration.png (edges expected by chance, by threshold and by degree; calibrated against published degrees);
- higher_order_ablation: higher_order_ablation.png (ratios by order beside those of exactly additive effects,
  redundancy index);
- trajectory_steering: trajectory_steering.png (state shift per feature, layer and alpha, spread over cells);
- specificity_controls: specificity.png (edges of features and of their controls, and how many targets they share);
- controlled_steering: controlled_steering.png (features' effects beside those of their controls, readout by readout).
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cellcircuits import cli, cli_check
from cellcircuits.additivity_figures import combination_figure
from cellcircuits.calibration_figures import calibration_figure
from cellcircuits.catalog import display_name
from cellcircuits.combination_results import KINDS
from cellcircuits.controlled_results import TESTS_FILE
from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_edges, read_features
from cellcircuits.jsonio import read_json, write_atomically
from cellcircuits.kept_results import PUBLISHED, Results
from cellcircuits.main_figures import FIGURES, draw_all, tables
from cellcircuits.manifest import open_folder
from cellcircuits.plan_report import free_disk
from cellcircuits.results import quantity_note
from cellcircuits.specificity_figures import specificity_figure
from cellcircuits.stats import EdgeRule
from cellcircuits.steering_figures import controlled_figure
from cellcircuits.trace_folder import CALIBRATION
from cellcircuits.trace_layers import holds_layers

N_HUBS_SHOWN = 12
LABEL_LENGTH = 44
COLOUR = "#2f6f8f"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the results of an experiment into pictures beside them.")
    cli.add_out_dir_flag(parser, "folder of the experiment's results")
    cli_check.add_check_flag(parser, "draw")
    parser.add_argument(
        "--results",
        type=Path,
        default=None,
        metavar="FOLDER",
        help="draw the main figures of these kept results (collect_results.py) into --out-dir as PDF, PNG and CSV",
    )
    parser.add_argument(
        "--published",
        type=Path,
        default=PUBLISHED,
        metavar="FILE",
        help="the study's own figures, for --results (default: those of this software)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = cli_check.parse(build_parser(), argv)
    if args.results is not None:
        return cli.run_script(lambda: draw_main(args), "run the same command again.")
    return cli.run_script(lambda: check(args) if args.check else draw(args.out_dir), "nothing was changed.")


def draw_main(args: argparse.Namespace) -> int:
    """Draw the main figures, or say what would be drawn; returns the exit status.

    Raises:
        UserError: a result is missing or malformed, or the folder cannot be written.
    """
    results = Results(args.results, args.published)
    if args.check:
        n_points = sum(text.count("\n") - 1 for text in tables(results).values())
        print(f"{len(FIGURES)} figures of {n_points:,} points to draw into {args.out_dir}.\nDraw: {args.command}")
        return 0
    draw_all(results, args.out_dir, lambda name: print(f"Figure: {args.out_dir / name}.pdf, .png, .csv"))
    return 0


def check(args: argparse.Namespace) -> int:
    """Say what would be drawn, of results that can be drawn; returns the exit status.

    Raises:
        UserError: see `figures_of`, or the folder cannot be written.
    """
    figures = figures_of(args.out_dir)
    free_disk(args.out_dir)
    for path, figure in figures:
        print(f"{len(figure.axes)} panels to {'replace' if path.exists() else 'write'} as {path}.")
    print(f"Draw: {args.command}")
    return 0


def draw(out_dir: Path) -> int:
    """Draw the results in `out_dir` into PNGs.

    Raises:
        UserError: see `figures_of`.
    """
    for path, figure in figures_of(out_dir):
        write_atomically(path, lambda stream, figure=figure: figure.savefig(stream, dpi=130, format="png"))
        print(f"Figure: {path}")
    return 0


def figures_of(out_dir: Path) -> list[tuple[Path, Figure]]:
    """The figures of the results in `out_dir`, and where each goes.

    Raises:
        UserError: the folder holds no run, none that has a figure, or a damaged summary.
    """
    if (out_dir / "selective_summary.json").is_file() or holds_layers(out_dir):
        raise UserError(
            f"{out_dir}: there is no figure for a trace of several layers as a whole; draw its layer folders."
        )
    experiment = open_folder(out_dir)["settings"].get("experiment")
    figures: dict[str, dict[str, Callable[[Path], Figure]]] = {
        "exhaustive_feature_tracing": {
            "exhaustive_tracing.png": exhaustive_tracing,
            "calibration.png": calibration,
        },
        "higher_order_ablation": {"higher_order_ablation.png": higher_order_ablation},
        "trajectory_steering": {"trajectory_steering.png": trajectory_steering},
        "specificity_controls": {"specificity.png": specificity_controls},
        "controlled_steering": {"controlled_steering.png": controlled_steering},
    }
    if experiment not in figures:
        raise UserError(f"{out_dir}: there is no figure for {experiment}; there is one for {', '.join(figures)}.")
    return [(out_dir / name, make(out_dir)) for name, make in figures[experiment].items()]


def _summary(path: Path, keys: set[str]) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict) or not content.keys() >= keys:
        raise UserError(f"{path}: is not the summary of this experiment; make it again with --analysis-only.")
    return content


def exhaustive_tracing(out_dir: Path) -> Figure:
    """Degree distribution, edges per layer and top hubs of a trace."""
    summary = _summary(out_dir / "exhaustive_summary.json", {"source_layer", "total_edges", "top_20_hubs"})
    features = read_features(out_dir)
    edges = read_edges(out_dir)
    degrees = features.filter(pc.field("is_traced"))["n_edges"].to_numpy()
    figure = Figure(figsize=(15, 4.6), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 0.8, 1.2))
    degree_distribution(left, degrees)
    edges_per_layer(middle, edges["target_layer"].to_numpy())
    genes = {(row["layer"], row["feature"]): row["top_genes"] for row in features.to_pylist()}
    top_hubs(right, summary, genes)
    figure.suptitle(
        f"Layer {summary['source_layer']}: {summary['n_features_traced']} features ablated one at a time, "
        f"{summary['total_edges']:,} edges{quantity_note(summary)}"
    )
    return figure


def calibration(out_dir: Path) -> Figure:
    """How far to trust the edges of a trace."""
    path = out_dir / CALIBRATION
    content = _summary(path, {"settings", "published_rule", "published_rule_by_degree", "sweep", "n_edges"})
    settings = open_folder(out_dir)["settings"]
    traced = read_features(out_dir).filter(pc.field("is_traced"))
    columns = (traced[name].cast("float64").to_numpy() for name in ("n_edges", "degree_calibrated"))
    title = f"Layer {settings['source_layer']}{quantity_note(settings)}"
    try:
        rule = EdgeRule(float(settings["min_abs_d"]), float(settings["min_consistency"]))
        return calibration_figure(title, content, rule, *columns)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}); make it again with exhaustive_feature_tracing.py "
            "--analysis-only."
        ) from None


def degree_distribution(axes: Axes, degrees: NDArray[np.integer]) -> None:
    """Histogram of edges per source feature, (n_traced,)."""
    axes.hist(degrees, bins=min(40, max(5, len(degrees) // 6)), color=COLOUR)
    if len(degrees):
        axes.axvline(float(np.median(degrees)), color="black", linestyle="--", label=f"median {np.median(degrees):g}")
        axes.legend(frameon=False)
    axes.set(xlabel="edges of a source feature", ylabel="features", title="Degree distribution")


def edges_per_layer(axes: Axes, target_layers: NDArray[np.integer]) -> None:
    """Bars of edges per target layer; `target_layers` (n_edges,)."""
    layers, counts = np.unique(target_layers, return_counts=True)
    bars = axes.bar(np.arange(len(layers)), counts, color=COLOUR)
    axes.set_xticks(np.arange(len(layers)), [str(layer) for layer in layers])
    axes.bar_label(bars, labels=[f"{count:,}" for count in counts])
    axes.set(xlabel="target layer", ylabel="edges", title="Edges per layer")


def top_hubs(axes: Axes, summary: Mapping[str, Any], genes: Mapping[tuple[int, int], Sequence[str]]) -> None:
    """Bars of the features with most edges, named by their labels or, without one, by their first top genes.

    `genes` maps (layer, feature) to its top genes.
    """
    hubs = summary["top_20_hubs"][:N_HUBS_SHOWN][::-1]
    layer = summary["source_layer"]
    names = []
    for hub in hubs:
        named = display_name(hub["label"], genes.get((layer, hub["feature_idx"]), ()))
        names.append(f"F{hub['feature_idx']}  {_shortened(named)}")
    axes.barh(names, [hub["total_edges"] for hub in hubs], color=COLOUR)
    axes.tick_params(axis="y", labelsize=8)
    axes.set(xlabel="edges", title="Top hubs: label, or (top genes)")


def higher_order_ablation(out_dir: Path) -> Figure:
    """Redundancy: ratios of pairs and triplets, what exactly additive effects would give, and the redundancy index."""
    kind = KINDS[open_folder(out_dir)["settings"]["order"]]
    summary = _summary(out_dir / "summary.json", {f"per_{kind}_results", f"control_{kind}_results", "config"})
    if not (summary[f"per_{kind}_results"] or summary[f"control_{kind}_results"]):
        raise UserError(f"{out_dir}: holds no finished {kind}; run higher_order_ablation.py first.")
    return combination_figure(summary, _summary(out_dir / "additivity.json", {"combinations", "family", "order"}))


def trajectory_steering(out_dir: Path) -> Figure:
    """State shift of every steered feature: one panel per alpha, the spread over cells as boxes."""
    listed = _summary(out_dir / "summary.json", {"features"})["features"]
    paths = [out_dir / f"steering_F{feature['feature_idx']}_L{feature['layer']}.json" for feature in listed]
    features = [
        _summary(path, {"alpha_results", "switch_d", "label"}) for path in paths
    ]  # with the shift of every cell
    alphas = list(dict.fromkeys(alpha for feature in features for alpha in feature["alpha_results"]))
    if not alphas:
        raise UserError(f"{out_dir}: holds no steered feature; run trajectory_steering.py first.")
    height = max(3.2, 0.3 * len(features) + 1.6)
    figure = Figure(figsize=(4.6 + 3.6 * len(alphas), height), layout="constrained")
    panels = figure.subplots(1, len(alphas), sharey=True, squeeze=False)[0]
    for axes, alpha in zip(panels, alphas, strict=True):
        state_shifts(axes, features, alpha)
    names = [_steered_name(feature) for feature in features]
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.suptitle("Shift of the model's state towards late cells when a feature is amplified in early cells")
    return figure


def controlled_steering(out_dir: Path) -> Figure:
    """Features' effects and those of their controls, per readout and layer."""
    tests = _summary(out_dir / TESTS_FILE, {"primary", "features", "layers", "halves"})
    if not tests["features"]:
        raise UserError(f"{out_dir}: holds no steered feature; run controlled_steering.py first.")
    return controlled_figure(tests)


def _steered_name(feature: Mapping[str, Any]) -> str:
    d = "" if feature["switch_d"] is None else f"  (d {feature['switch_d']:+.2f})"
    return f"L{feature['layer']}/F{feature['feature_idx']}  {_shortened(feature['label'])}{d}"


def state_shifts(axes: Axes, features: Sequence[Mapping[str, Any]], alpha: str) -> None:
    """Per-cell state shifts: a box over the quartiles, a line from 5% to 95%, the median, and the mean as a dot."""
    layers = sorted({feature["layer"] for feature in features})
    shades = {layer: f"C{i}" for i, layer in enumerate(layers)}
    for y, feature in enumerate(features):
        shifts = feature["alpha_results"].get(alpha, {}).get("state_shifts", [])
        if not shifts:
            axes.annotate("active in no early cell", (0, y), fontsize=7, ha="center", va="center", color="0.5")
            continue
        low, q1, median, q3, high = np.percentile(shifts, (5, 25, 50, 75, 95))
        axes.hlines(y, low, high, color="0.4", linewidth=1)
        axes.barh(y, q3 - q1, 0.6, left=q1, color=shades[feature["layer"]], alpha=0.7)
        axes.vlines(median, y - 0.3, y + 0.3, color="black", linewidth=1)
        axes.plot(np.mean(shifts), y, "o", color="black", markersize=3)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set(xlabel="state shift (difference of cosines)", title=f"alpha {float(alpha):g}")
    axes.ticklabel_format(axis="x", style="sci", scilimits=(-2, 2))


def specificity_controls(out_dir: Path) -> Figure:
    """Edges and shared targets of features and their controls."""
    needed = {"source_layer", "n_features", "n_draws", "real", "controls", "features"}
    summary = _summary(out_dir / "specificity.json", needed)
    if not summary["features"]:
        raise UserError(f"{out_dir}: holds no measured feature; run specificity_controls.py first.")
    return specificity_figure(summary)


def _shortened(label: str) -> str:
    shown = label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"
    return shown.replace("$", r"\$")  # between two of them, the text would be read as a formula


if __name__ == "__main__":
    cli.leave(main())
