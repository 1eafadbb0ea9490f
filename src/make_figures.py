"""Draw a finished trace: degree distribution, edges per layer, top hubs.

    python src/make_figures.py --out-dir results/layer5

Reads exhaustive_summary.json, features.parquet and edges.parquet; writes exhaustive_tracing.png beside them.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cellcircuits import cli
from cellcircuits.catalog import display_name
from cellcircuits.errors import UserError
from cellcircuits.graph_store import read_edges, read_features
from cellcircuits.jsonio import read_json, write_atomically

N_HUBS_SHOWN = 12
LABEL_LENGTH = 44
COLOUR = "#2f6f8f"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw degree distribution, edges per layer and top hubs of a trace.")
    cli.add_out_dir_flag(parser, "folder of the trace")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    args = build_parser().parse_args(argv)
    return cli.run_script(lambda: draw(args.out_dir), "nothing was changed.")


def draw(out_dir: Path) -> int:
    """Draw the trace in `out_dir` into one PNG."""
    path = out_dir / "exhaustive_summary.json"
    summary = read_json(path)
    if not isinstance(summary, dict) or not summary.keys() >= {"source_layer", "total_edges", "top_20_hubs"}:
        raise UserError(f"{path}: is not the summary of a trace; run exhaustive_feature_tracing.py --analysis-only.")
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
        f"{summary['total_edges']:,} edges"
    )
    path = out_dir / "exhaustive_tracing.png"
    write_atomically(path, lambda stream: figure.savefig(stream, dpi=130, format="png"))
    print(f"Figure: {path}")
    return 0


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


def _shortened(label: str) -> str:
    return label if len(label) <= LABEL_LENGTH else f"{label[: LABEL_LENGTH - 1]}…"


if __name__ == "__main__":
    sys.exit(main())
